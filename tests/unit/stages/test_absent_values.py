"""What the pages do not show is in no record: documents of three requests whose values stand on one of them, and documents without any.

The engine writes the least that the schema of its request allows, as a constrained decoder does on pages that show nothing.
"""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from pipeline import schema as schemas
from pipeline.job import Job
from pipeline.records import Completion, FinishReason, Request, Token, Usage
from pipeline.stages.ask import AskStage
from tests.support.engines import ScriptedEngine, make_completion
from tests.support.least import list_scalars, write_least
from tests.support.stages import Row, make_settle_stage
from tests.support.workspace import Workspace
from tests.unit.stages.test_settle import NO_EXTRAS, PAGE, document, ledger

PARTY = {"type": "object", "required": ["name", "vat"], "properties": {"name": {"type": "string"}, "vat": {"type": "integer"}}}
RULES: dict[str, Any] = {
    "type": "object",
    "required": ["number", "total", "paid", "currency", "day", "seller", "lines", "box"],
    "properties": {
        "number": {"type": "string", "minLength": 1},
        "total": {"type": "number", "multipleOf": 0.01},
        "paid": {"type": "boolean"},
        "currency": {"enum": ["EUR", "USD"]},
        "day": {"type": "string", "format": "date"},
        "seller": PARTY,
        "buyer": {"anyOf": [{"$ref": "#/$defs/party"}, {"type": "null"}]},
        "lines": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["text", "amount"],
                "properties": {"text": {"type": "string"}, "amount": {"type": "number"}},
            },
        },
        "box": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
        "note": {"type": "string"},
    },
    "$defs": {"party": PARTY},
}
VALUE = {
    "number": "A-7",
    "total": 19.99,
    "paid": True,
    "currency": "EUR",
    "day": "2024-02-29",
    "seller": {"name": "Tea Ltd", "vat": 7},
    "buyer": {"name": "Milk Ltd", "vat": 8},
    "lines": [{"text": "tea", "amount": 19.99}],
    "box": [1, 2, 3, 4],
    "note": "thanks",
}


class LeastEngine(ScriptedEngine):
    """Writes a value on one page and the least that is allowed on all others."""

    def __init__(self, shown_on: int, value: Any) -> None:
        super().__init__()
        self.shown_on, self.value = shown_on, value

    async def complete(self, request: Request) -> Completion:
        self.requests.append(request)
        form = json.loads(request.schema)
        least = write_least(form, form)
        return make_completion(json.dumps(least | self.value if request.key == f"k{self.shown_on}" else least))


@pytest.fixture
def job(workspace: Workspace) -> Job:
    (workspace.folder / "schema.json").write_text(json.dumps(RULES))
    return workspace.job("pages.per_request=1", "extract.re_asks=0")


def settle_answers(job: Job, engine: ScriptedEngine, pages: int) -> Row:
    """Return the record of a document of so many pages, each of them a request of its own."""
    stage, listed = make_settle_stage(job, NO_EXTRAS), document(page_count=pages)
    requests = ledger(stage, listed, *[{}] * pages)
    asked = AskStage(job, engine)
    pixels = [np.zeros((PAGE["height_px"], PAGE["width_px"], 3), np.uint8)]
    rows = [
        {
            **row,
            **asyncio.run(
                asked.answer_row({**row, "key": f"k{n}", "first_page": n, "last_page": n, "page_count": pages, "pixels": pixels})
            ),
            "key": row["key"],
        }
        for n, row in enumerate(requests, 1)
    ]
    (record,) = stage.build_table([listed], rows).to_pylist()
    return record


@pytest.mark.parametrize("shown_on", [1, 2, 3])
def test_a_value_on_one_of_three_parts_is_the_records(job: Job, shown_on: int) -> None:
    record = settle_answers(job, LeastEngine(shown_on, VALUE), 3)
    assert (record["_status"], record["_errors"], record["_disagreements"]) == ("extracted", [], [])
    assert (record["number"], record["total"], record["paid"], record["currency"]) == ("A-7", Decimal("19.99"), True, "EUR")
    assert (record["seller"], record["buyer"], record["lines"]) == (VALUE["seller"], VALUE["buyer"], VALUE["lines"])
    assert (record["box"], record["note"]) == ([1, 2, 3, 4], "thanks")


@pytest.mark.parametrize("name", [name for name in VALUE if name not in ("buyer", "note")])
def test_a_required_value_that_no_part_shows_is_named_and_not_made_up(job: Job, name: str) -> None:
    shown = {key: value for key, value in VALUE.items() if key != name}
    record = settle_answers(job, LeastEngine(3, shown), 3)
    assert record["_status"] == "invalid"
    assert all(error.startswith(f"$.{name}") for error in record["_errors"])
    assert list_scalars(record[name]) == []


@pytest.mark.parametrize("name", ["buyer", "note"])
def test_a_value_that_need_not_be_there_is_null(job: Job, name: str) -> None:
    shown = {key: value for key, value in VALUE.items() if key != name}
    record = settle_answers(job, LeastEngine(2, shown), 3)
    assert (record["_status"], list_scalars(record[name])) == ("extracted", [])


def test_a_whole_document_that_shows_nothing_has_no_value(job: Job) -> None:
    record = settle_answers(job, LeastEngine(0, {}), 1)
    assert (record["_status"], record["_failure"]["kind"]) == ("invalid", "invalid")
    assert "$.total: is required and was not found" in record["_errors"]
    assert [record[name] for name in VALUE if list_scalars(record[name])] == []


def test_where_absent_values_are_forbidden_they_are_forced(workspace: Workspace, job: Job) -> None:
    record = settle_answers(workspace.job("pages.per_request=1", "extract.absent=forbid"), LeastEngine(0, {}), 1)
    assert (record["_status"], record["total"], record["number"]) == ("extracted", 0, "x")


def test_a_part_is_held_to_the_bounds_of_its_values(workspace: Workspace, job: Job) -> None:
    engine = LeastEngine(2, {"currency": "FFF"})
    settle_answers(workspace.job("pages.per_request=1", "extract.re_asks=1"), engine, 3)
    assert [request.key for request in engine.requests] == ["k1", "k2", "k2", "k3"]
    correction = engine.requests[2].messages[-1].parts[0]
    assert '- $.currency: "FFF" is not one of ["EUR","USD",null]' in str(correction)


def test_a_value_that_no_column_holds_is_asked_again(workspace: Workspace, job: Job) -> None:
    engine = LeastEngine(1, VALUE | {"seller": {"name": "Tea Ltd", "vat": 2**70}})
    record = settle_answers(workspace.job("pages.per_request=1", "extract.re_asks=1"), engine, 1)
    assert len(engine.requests) == 2
    assert (record["_status"], record["seller"], record["number"]) == ("invalid", {"name": "Tea Ltd", "vat": None}, "A-7")
    assert record["_errors"] == ["$.seller.vat is 1180591620717411303424, which is not a whole number of 64 bits"]


# --- parts that disagree


def disagree(job: Job, *totals: tuple[float, float]) -> Row:
    """Return the record of parts with these totals and the log-probabilities of their tokens."""

    def answer(total: float, logprob: float) -> Completion:
        tokens = (Token('{"total":', 0.0), Token(str(total), logprob), Token("}", 0.0))
        return Completion("".join(token.text for token in tokens), FinishReason.STOP, Usage(300, 3), tokens)

    return settle_answers(job, ScriptedEngine(*(answer(*total) for total in totals)), len(totals))


@pytest.fixture
def totals(workspace: Workspace) -> Workspace:
    total = {"type": "object", "required": ["total"], "properties": {"total": {"type": "number"}}}
    (workspace.folder / "schema.json").write_text(json.dumps(total))
    return workspace


def test_the_part_that_the_model_is_surer_of_is_kept(totals: Workspace) -> None:
    record = disagree(totals.job("pages.per_request=1"), (1.5, -2.0), (2.5, -0.01), (3.5, -1.0))
    assert (record["_status"], record["total"]) == ("extracted", 2.5)
    assert [(d["kept"], d["kept_page"], d["other"], d["other_page"]) for d in record["_disagreements"]] == [
        ("2.5", 2, "1.5", 1),
        ("2.5", 2, "3.5", 3),
    ]


def test_a_job_may_refuse_records_whose_parts_disagree(totals: Workspace) -> None:
    record = disagree(totals.job("pages.per_request=1", "limits.disagreements=invalid"), (1.5, -2.0), (2.5, -0.01), (3.5, -1.0))
    assert (record["_status"], record["total"], record["_answer"]) == ("invalid", 2.5, '{"total":2.5}')
    assert record["_failure"] == {
        "stage": "validate",
        "kind": "disagreement",
        "message": "$.total is 2.5 from page 2 on and 1.5 from page 1 on; 1 more in _disagreements",
    }


def test_parts_that_agree_are_refused_by_nothing(totals: Workspace) -> None:
    record = disagree(totals.job("pages.per_request=1", "limits.disagreements=invalid"), (1.5, -2.0), (1.5, -0.01))
    assert (record["_status"], schemas.dump_json(record["_disagreements"])) == ("extracted", "[]")
