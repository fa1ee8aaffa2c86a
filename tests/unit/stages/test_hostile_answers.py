"""No answer stops a run: 10,000 mutated answers pass through the ask stage and the settle stage, each as a row."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.records import Request
from pipeline.schema.validate import Validator
from pipeline.stages.ask import AskStage
from pipeline.stages.settle import SettleStage
from tests.support.engines import VALID, ScriptedEngine, make_completion
from tests.support.stages import Row, make_settle_stage
from tests.support.workspace import Workspace
from tests.unit.stages.test_settle import NO_EXTRAS, document, ledger

ANSWERS = 10_000
NUMBERS = (
    "1e99999999999999999999", "-1e-99999999999999999999", "0e999999999999999999999", "1e308", "1e309", "9" * 400, "0." + "1" * 400,
    "-0", "-0.0", "1E+2", "00", "1.", ".5", "NaN", "Infinity", "-Infinity", "0x1F", "1_000", "99999999999999999999", "5e-324", "null",
)  # fmt: skip
STRINGS = (r"\ud800", r"\udfff\ud800", r"\u0000", "\x00", "\x1b[2J", "\ufeff", r"\x41", "\\", '"', "é\u0301", "\U0010ffff", "<|im_end|>")
TEXTS = (
    "",
    " ",
    "null",
    "[]",
    "{}",
    "true",
    "{",
    "[" * 5000,
    '{"a":' * 5000,
    "[" * 50 + "]" * 50,
    '{"total":1,"total":2}',
    "x" * 1000,
    "\ud800",
)


def mutate(rng: random.Random) -> str:
    """Return a valid answer with one to three faults."""
    text = VALID
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(6)
        at = rng.randrange(len(text) + 1)
        if kind == 0:
            text = text.replace("19.99", rng.choice(NUMBERS))
        elif kind == 1:
            text = text.replace("EUR", rng.choice(STRINGS))
        elif kind == 2:
            text = text.replace("[]", f'[{{"amount":{rng.choice(NUMBERS)}}}]')
        elif kind == 3:
            text = text[:at] + rng.choice(STRINGS) + text[at:]
        elif kind == 4:
            text = text[:at]
        else:
            text = rng.choice(TEXTS)
    return text


@pytest.fixture(scope="module")
def answers() -> list[str]:
    rng = random.Random(1)
    long = json.dumps({"currency": "EUR", "total": 1, "lines": [], "note": "x" * 10_000_000})
    return [long, *(mutate(rng) for _ in range(ANSWERS - 1))]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("answers"))


def make_row(number: int) -> Row:
    page = {"page_no": 1, "width_px": 28, "height_px": 28, "dpi": 200.0, "visual_tokens": 1, "warnings": []}
    return {
        "key": str(number),
        "first_page": 1,
        "last_page": 1,
        "page_count": 1,
        "pages": [page],
        "pixels": [np.zeros((28, 28, 3), np.uint8)],
    }


@pytest.fixture(scope="module")
def asked(workspace: Workspace, answers: list[str]) -> list[Row]:
    class Engine(ScriptedEngine):
        async def complete(self, request: Request):  # type: ignore[no-untyped-def]
            return make_completion(answers[int(request.key)])

    async def ask() -> list[Row]:
        stage = AskStage(workspace.job("extract.re_asks=0"), Engine())
        return await asyncio.gather(*(stage.answer_row(make_row(number)) for number in range(len(answers))))

    return asyncio.run(ask())


def test_every_answer_is_a_row_of_the_ledger(asked: list[Row]) -> None:
    statuses = Counter(row["status"] for row in asked)
    assert statuses.total() == ANSWERS
    assert {*statuses} == {"extracted", "invalid"}
    assert min(statuses.values()) > 50
    assert pa.Table.from_pylist(asked, LEDGER_SCHEMA).num_rows == ANSWERS


def test_every_answer_is_a_record(workspace: Workspace, asked: list[Row], answers: list[str]) -> None:
    stage = make_settle_stage(workspace.job("extract.re_asks=0"), NO_EXTRAS)
    listed = [document(str(number), f"d{number}") for number in range(ANSWERS)]
    requests = [row for one, answer in zip(listed, asked, strict=True) for row in ledger(stage, one, {**answer, "attempt": 1})]
    for request, one in zip(requests, listed, strict=True):
        request["key"] = next(iter(ledger(stage, one, "")))["key"]
    records = stage.build_table(listed, requests).to_pylist()
    assert {row["_source"]: row["_status"] for row in records} == {str(number): row["status"] for number, row in enumerate(asked)}
    assert not [row["_failure"] for row in records if (row["_failure"] or {}).get("kind") == "internal"]


# --- faults of our own


def test_an_exception_while_an_answer_is_checked_is_that_requests_row(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(validator: Validator, value: object) -> None:
        raise KeyError("total")

    monkeypatch.setattr(Validator, "find_violations", fail)
    row = asyncio.run(AskStage(workspace.job(), ScriptedEngine()).answer_row(make_row(0)))
    assert (row["status"], row["failure"]) == ("failed", {"stage": "validate", "kind": "internal", "message": "KeyError: 'total'"})
    assert (row["answer"], row["asks"]) == (VALID, 1)


def test_an_exception_while_a_document_is_settled_is_its_record(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make_settle_stage(workspace.job(), NO_EXTRAS)
    listed = [document("a", "d1"), document("b", "d2")]
    requests = [*ledger(stage, listed[0], '{"currency":"EUR","total":666,"lines":[]}'), *ledger(stage, listed[1], VALID)]
    find_violations = Validator.find_violations

    def fail(validator: Validator, value: dict[str, int]) -> list[object]:
        return find_violations(validator, value) if value["total"] != 666 else [1 / 0]

    monkeypatch.setattr(Validator, "find_violations", fail)
    first, second = stage.build_table(listed, requests).to_pylist()
    assert (first["_status"], first["_failure"]["kind"], first["_failure"]["message"]) == (
        "failed", "internal", "ZeroDivisionError: division by zero",
    )  # fmt: skip
    assert second["_status"] == "extracted"


def test_a_row_that_arrow_does_not_take_costs_itself_alone(workspace: Workspace) -> None:
    stage: SettleStage = make_settle_stage(workspace.job(), NO_EXTRAS)
    listed = [document("a", "d1"), document("b", "d2")]
    requests = [
        *ledger(stage, listed[0], {"status": "invalid", "answer": "\ud800", "errors": ["not text"]}),
        *ledger(stage, listed[1], VALID),
    ]
    first, second = stage.build_table(listed, requests).to_pylist()
    assert (first["_source"], first["_status"], first["_failure"]["kind"]) == ("a", "failed", "internal")
    assert second["_status"] == "extracted"
