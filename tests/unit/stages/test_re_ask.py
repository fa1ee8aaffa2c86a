"""A rule that an answer breaks has its fields asked again, once; a record takes the second answer where the rules then hold."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from PIL import Image

from pipeline import engines
from pipeline.errors import JobError
from pipeline.job import Job
from pipeline.records import LedgerRow
from pipeline.schema.arrow import ArrowPlan
from pipeline.schema.rules import RuleSet
from pipeline.stages.ask import AskStage
from pipeline.stages.re_ask import find_fields, pick_fields, replace_fields, select_fields
from pipeline.stages.render import RenderPlan, RenderStage
from tests.support.chat_server import ChatServer, Reply, reply_status, reply_text
from tests.support.pdfs import make_page_pdf
from tests.support.stages import Row, claim_all, make_settle_stage
from tests.support.workspace import Workspace, make_listing_row
from tests.unit.stages.test_settle import NO_EXTRAS

NUMBER = {"type": ["number", "null"], "multipleOf": 0.01}
LINES = {"type": "array", "items": {"type": "object", "required": ["amount"], "properties": {"amount": NUMBER, "text": {"type": "string"}}}}
SELLER = {"type": "object", "properties": {"name": {"type": ["string", "null"]}, "tax_id": {"type": ["string", "null"]}}}
BILL = {
    "title": "Bill",
    "type": "object",
    "additionalProperties": False,
    "required": ["number", "net", "tax", "total"],
    "properties": {
        "number": {"type": ["string", "null"]},
        "net": {"title": "Net amount", **NUMBER},
        "tax": NUMBER,
        "total": {**NUMBER, "maximum": 5000},
        "lines": LINES,
        "seller": SELLER,
    },
}
ADDS_UP = '{name: adds_up, expression: "near(net + tax, total, 0.02)", message: Net and tax are not the total., re_ask: true}'
SMALL = '{name: small, expression: "tax == null || tax < 100.0", message: The tax is too large.}'
WRONG = {"number": "A-7", "net": 100.0, "tax": 19.0, "total": 1119.0}
RIGHT = {"net": 100.0, "tax": 19.0, "total": 119.0}
PRINTED = b"BT /F 12 Tf 60 780 Td (Bill A-7) Tj 300 -500 Td (Net 100.00) Tj 0 -20 Td (Tax 19.00) Tj 0 -20 Td (Total 1119.00) Tj ET"


class Bills:
    """A job about one bill whose model is a stub server, asked and settled without Ray."""

    def __init__(self, workspace: Workspace, rules: str, *settings: str) -> None:
        (workspace.folder / "schema.json").write_text(json.dumps(BILL))
        self.file = workspace.put("a.pdf", make_page_pdf(595, 842, PRINTED))
        self.workspace, self.settings = workspace, (f"extract.rules=[{rules}]", "model.engine=openai", "model.max_retries=0", *settings)
        self.requests = list[Any]()

    def ask(self, *replies: Reply) -> tuple[Job, Row, list[LedgerRow]]:
        """Return the job, its document and the rows of its ledger; each request is kept."""
        with ChatServer(reply_text("{}")) as stub:
            given = self.workspace.job(f"model.base_url={stub.base_url}", "model.name=stub-1", *self.settings)
            job = engines.resolve_engine(given, 0.0)
            row = self.render(job)
            stub.requests.clear()
            stub.replies = list(replies)
            with closing(engines.load_engine(job)) as engine:
                rows = asyncio.run(AskStage(job, engine).answer_rows(row))
            assert stub.complaints == []
            self.requests = stub.requests
        return job, {**make_listing_row(self.file, self.workspace.folder), "doc_id": row["doc_id"], "page_count": 1}, rows

    def render(self, job: Job) -> Any:
        stage, read = RenderStage(RenderPlan.of_job(job), claim_all), Future[bytes]()
        read.set_result(self.file.read_bytes())
        with closing(stage):
            (row,) = stage.render_document({**make_listing_row(self.file, self.workspace.folder)}, read)  # type: ignore[typeddict-item]
        return row

    def settle(self, *replies: Reply) -> Row:
        job, document, rows = self.ask(*replies)
        return settle_rows(job, document, rows)


def settle_rows(job: Job, document: Row, rows: list[LedgerRow]) -> Row:
    (record,) = make_settle_stage(job, NO_EXTRAS).build_table([document], rows).to_pylist()  # type: ignore[list-item]
    return record


def says(value: Any) -> Reply:
    return reply_text(json.dumps(value))


def list_images(body: Any) -> Iterator[Image.Image]:
    for part in body["messages"][-1]["content"]:
        if "image_url" in part:
            yield Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))


@pytest.fixture
def bills(workspace: Workspace) -> Bills:
    return Bills(workspace, f"{ADDS_UP}, {SMALL}")


def test_a_second_answer_that_mends_the_sum_is_taken(bills: Bills) -> None:
    record = bills.settle(says(WRONG), says(RIGHT))
    assert (record["_status"], record["number"], record["total"]) == ("extracted", "A-7", Decimal("119.00"))
    assert record["_asked_again"] == [{"rule": "adds_up", "fields": ["net", "tax", "total"], "taken": True}]
    assert {rule["name"]: rule["result"] for rule in record["_rules"]} == {"adds_up": "passed", "small": "passed"}
    assert len(bills.requests) == 2


@pytest.mark.parametrize(
    "second",
    [
        says(WRONG),  # as wrong as before
        says({"net": 6000.0, "tax": 0.0, "total": 6000.0}),  # the sum is right and the schema's maximum is not
        says({"net": 0.0, "tax": 119.0, "total": 119.0}),  # another rule, which held, is broken
        says({"net": None, "tax": None, "total": None}),  # nothing to judge
        reply_text("I cannot."),
        reply_text(json.dumps(RIGHT), finish_reason="length"),
        reply_status(400, "too many images"),
    ],
)
def test_a_second_answer_that_does_not_leaves_the_first(bills: Bills, second: Reply) -> None:
    record = bills.settle(says(WRONG), second)
    assert (record["_status"], record["total"], record["tax"]) == ("extracted", Decimal("1119.00"), Decimal("19.00"))
    assert [found["taken"] for found in record["_asked_again"]] == [False]
    assert {rule["name"]: rule["result"] for rule in record["_rules"]} == {"adds_up": "broken", "small": "passed"}
    assert len(bills.requests) == 2


def test_what_is_asked_again(bills: Bills) -> None:
    """The rule's fields alone, the same page, and the part where they are printed; the rule's message and the values."""
    job, _, _ = bills.ask(says(WRONG), says(RIGHT))
    first, second = bills.requests
    asked = second["response_format"]["json_schema"]["schema"]
    assert list(asked["properties"]) == asked["required"] == ["net", "tax", "total"]
    assert second["messages"][0] == first["messages"][0]
    page, crop = list_images(second)
    assert page.tobytes() == next(list_images(first)).tobytes()
    assert crop.width * crop.height <= job.budget.max_pixels
    assert crop.width % 28 == crop.height % 28 == 0
    text = second["messages"][-1]["content"][-1]["text"]
    assert "Net and tax are not the total." in text
    assert '{"net":100.0,"tax":19.0,"total":1119.0}' in text


def test_the_part_shows_the_values_larger(bills: Bills) -> None:
    """The three lines are all the ink in it, and make up more of it than of the page."""
    bills.ask(says(WRONG), says(RIGHT))
    page, crop = ((image.convert("L").point(lambda grey: 255 * (grey < 128))) for image in list_images(bills.requests[1]))
    across, down = crop.getbbox()[2] - crop.getbbox()[0], crop.getbbox()[3] - crop.getbbox()[1]  # type: ignore[index]
    lines = page.crop((0, page.height // 2, page.width, page.height)).getbbox()
    assert lines
    assert across > 1.5 * (lines[2] - lines[0])
    assert down > 1.5 * (lines[3] - lines[1])


def test_without_words_the_page_alone_is_shown(workspace: Workspace) -> None:
    bills = Bills(workspace, ADDS_UP, "evidence.text=off")
    assert bills.settle(says(WRONG), says(RIGHT))["total"] == Decimal("119.00")
    assert len(list(list_images(bills.requests[1]))) == 1


def test_both_requests_are_in_the_ledger_and_paid_for(bills: Bills) -> None:
    job, document, rows = bills.ask(says(WRONG), says(RIGHT))
    assert [(row.get("rule"), row["asks"], row["status"]) for row in rows] == [(None, 1, "extracted"), ("adds_up", 1, "extracted")]
    assert len({row["key"] for row in rows}) == 2
    record = settle_rows(job, document, rows)
    assert record["_requests"] == 2
    assert record["_completion_tokens"] == sum(row["completion_tokens"] or 0 for row in rows)


def test_a_rule_that_holds_or_does_not_ask_again_costs_nothing(workspace: Workspace) -> None:
    assert Bills(workspace, ADDS_UP).settle(says(WRONG | RIGHT))["_asked_again"] == []
    bills = Bills(workspace, ADDS_UP.replace(", re_ask: true", ""))
    assert bills.settle(says(WRONG))["_asked_again"] == []
    assert len(bills.requests) == 1


def test_an_answer_that_breaks_the_schema_is_no_case_for_rules(bills: Bills) -> None:
    bills.settings += ("extract.re_asks=0",)
    assert bills.settle(says(WRONG | {"total": 9000.0}))["_status"] == "invalid"
    assert len(bills.requests) == 1


def test_each_rule_asks_once_and_sees_what_the_one_before_has_mended(workspace: Workspace) -> None:
    bills = Bills(workspace, f"{ADDS_UP}, {SMALL.replace('large.', 'large., re_ask: true')}")
    job, document, rows = bills.ask(says(WRONG | {"tax": 190.0}), says({"net": 1000.0, "tax": 119.0, "total": 1119.0}), says({"tax": 20.0}))
    assert [row.get("rule") for row in rows] == [None, "adds_up", "small"]
    assert '{"tax":119.0}' in bills.requests[2]["messages"][-1]["content"][-1]["text"]
    record = settle_rows(job, document, rows)
    assert [found["taken"] for found in record["_asked_again"]] == [True, False]  # with a tax of 20 the sum is wrong again
    assert record["tax"] == Decimal("119.00")


def test_settling_forgets_no_second_answer_when_its_rule_is_gone(bills: Bills) -> None:
    job, document, rows = bills.ask(says(WRONG), says(RIGHT))
    extract = job.sections.extract.model_copy(update={"rules": ()})
    record = settle_rows(replace(job, sections=job.sections.model_copy(update={"extract": extract})), document, rows)
    assert (record["total"], record["_requests"], record["_asked_again"]) == (Decimal("1119.00"), 2, [])


def test_a_retried_request_takes_no_second_answer_of_an_earlier_attempt(bills: Bills) -> None:
    job, document, rows = bills.ask(says(WRONG), says(RIGHT))
    record = settle_rows(job, document, [*rows, {**rows[0], "attempt": 2}])
    assert (record["total"], record["_asked_again"]) == (Decimal("1119.00"), [])


def test_a_rule_without_fields_cannot_ask_again(workspace: Workspace) -> None:
    job = Bills(workspace, '{name: never, expression: "1 == 2", message: No., re_ask: true}')
    with pytest.raises(JobError, match="re_ask: true and concerns no column: name its fields"):
        RuleSet(workspace.job(*job.settings, "model.base_url=http://127.0.0.1:1/v1").rules, ArrowPlan(BILL).root)


def test_fields_inside_of_objects_are_picked_and_lists_are_whole() -> None:
    paths = [("lines", "amount"), ("seller", "tax_id")]
    asked = select_fields(BILL, paths)
    assert asked["properties"]["lines"] == LINES
    assert list(asked["properties"]["seller"]["properties"]) == ["tax_id"]
    value = {"number": "A-7", "lines": [{"amount": 1, "text": "x"}], "seller": {"name": "N", "tax_id": "1"}}
    assert pick_fields(value, paths) == {"lines": value["lines"], "seller": {"tax_id": "1"}}
    taken = replace_fields(value, {"lines": [], "seller": {"tax_id": "2", "name": "other"}}, paths)
    assert taken == {"number": "A-7", "lines": [], "seller": {"name": "N", "tax_id": "2"}}
    assert list(find_fields(value, paths, in_lists=True)) == ["$.lines[0].amount", "$.seller.tax_id"]
    assert list(find_fields(value, paths, in_lists=False)) == ["$.lines", "$.seller.tax_id"]
