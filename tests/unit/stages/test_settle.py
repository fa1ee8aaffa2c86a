"""The ledger's rows become typed records, one for each document or page that was listed."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import JobError
from pipeline.output import Output
from pipeline.schema.merge import merge_parts
from pipeline.stages.record_plan import PROVENANCE_COLUMNS, list_record_columns
from pipeline.stages.requests import compute_document_keys
from pipeline.stages.settle import SettleStage
from tests.support.engines import VALID
from tests.support.stages import Row, make_settle_stage
from tests.support.workspace import SCHEMA, Workspace

PAGE = {"width_px": 448, "height_px": 448, "dpi": 200.0, "visual_tokens": 256, "warnings": []}
FAILURE = {"stage": "generate", "kind": "length", "message": "the answer was cut"}
NO_EXTRAS = pa.schema([])


def document(source: str = "a.pdf", doc_id: str | None = "d1", page_count: int | None = 1, **extras: Any) -> Row:
    return {"source": source, "size_bytes": 9, "version": "1", "doc_id": doc_id, "page_count": page_count, **extras}


def ledger(stage: SettleStage, listed: Row, *answers: str | dict[str, Any]) -> list[Row]:
    """Return the requests of a document with these answers; a mapping changes what the row says of itself."""
    keys = compute_document_keys(listed, stage.per_request, stage.fingerprint)
    rows = []
    for (key, (first, last)), answer in zip(keys.items(), answers, strict=True):
        row: Row = {"key": key, "attempt": 1, "status": "extracted", "failure": None, "answer": None, "errors": [], "asks": 1}
        row |= {"prompt_tokens": 300, "completion_tokens": 20, "model": "script-1", "engine": "scripted"}
        row |= {"pages": [PAGE | {"page_no": page_no} for page_no in range(max(1, first), last + 1)]}
        rows.append(row | ({"answer": answer} if isinstance(answer, str) else answer))
    return rows


@pytest.fixture
def stage(workspace: Workspace) -> SettleStage:
    return make_settle_stage(workspace.job("pages.per_request=2"), NO_EXTRAS)


@pytest.fixture
def by_page(workspace: Workspace) -> SettleStage:
    return make_settle_stage(workspace.job("extract.per=page"), NO_EXTRAS)


def settled(stage: SettleStage, listed: Row, *answers: str | dict[str, Any]) -> list[Row]:
    return stage.build_table([listed], ledger(stage, listed, *answers)).to_pylist()


def record(stage: SettleStage, listed: Row, *answers: str | dict[str, Any]) -> Row:
    (row,) = settled(stage, listed, *answers)
    return row


# --- one document


def test_a_record_says_which_second_renderer_drew_a_page(stage: SettleStage) -> None:
    listed = document(page_count=3)
    rows = ledger(stage, listed, VALID, VALID)
    assert stage.build_table([listed], rows).to_pylist()[0]["_renderer"] is None
    rows[1]["pages"][0]["renderer"] = "pdfium"
    assert stage.build_table([listed], rows).to_pylist()[0]["_renderer"] == "pdfium"


def test_an_answer_becomes_typed_columns(stage: SettleStage) -> None:
    row = record(stage, document(), '{"currency":"EUR","total":19.99,"lines":[{"amount":7}]}')
    assert (row["currency"], row["total"], row["lines"]) == ("EUR", Decimal("19.99"), [{"amount": Decimal("7.00")}])
    assert (row["_status"], row["_failure"], row["_errors"]) == ("extracted", None, [])


def test_a_date_is_a_date(workspace: Workspace) -> None:
    day = {"day": {"type": "string", "format": "date"}}
    (workspace.folder / "schema.json").write_text(json.dumps(SCHEMA | {"properties": day, "required": ["day"]}))
    row = record(make_settle_stage(workspace.job(), NO_EXTRAS), document(), '{"day":"2024-02-29"}')
    assert row["day"] == datetime.date(2024, 2, 29)


def test_a_record_says_where_it_comes_from_and_what_it_cost(stage: SettleStage) -> None:
    row = record(stage, document("b.pdf", "d9"), VALID)
    assert (row["_source"], row["_doc_id"], row["_pages"], row["_requests"]) == ("b.pdf", "d9", 1, 1)
    assert (row["_visual_tokens"], row["_prompt_tokens"], row["_completion_tokens"]) == (256, 300, 20)
    assert (row["_model"], row["_engine"]) == ("script-1", "scripted")


def test_a_manifests_columns_travel(workspace: Workspace) -> None:
    stage = make_settle_stage(workspace.job(), pa.schema([("customer", pa.string()), ("tags", pa.list_(pa.int64()))]))
    row = record(stage, document(customer="ACME", tags=[1, 2]), VALID)
    assert (row["customer"], row["tags"]) == ("ACME", [1, 2])


def test_an_invalid_answer_fills_what_it_can_and_says_why(stage: SettleStage) -> None:
    row = record(stage, document(), '{"currency":"EUR","total":-1,"lines":[]}')
    assert (row["_status"], row["currency"], row["total"]) == ("invalid", "EUR", Decimal("-1.00"))
    assert row["_errors"] == ["$.total: -1 is less than 0"]
    assert row["_failure"] == {"stage": "validate", "kind": "invalid", "message": "$.total: -1 is less than 0"}
    assert json.loads(row["_answer"]) == {"currency": "EUR", "total": -1, "lines": []}


def test_a_value_that_fits_no_column_empties_its_own_cell(stage: SettleStage) -> None:
    row = record(stage, document(), '{"currency":"EUR","total":"much","lines":[]}')
    assert (row["_status"], row["currency"], row["total"], row["lines"]) == ("invalid", "EUR", None, [])
    assert '"much"' in row["_answer"]


def test_an_answer_that_is_no_json_is_kept_as_it_came(stage: SettleStage) -> None:
    row = record(stage, document(), {"answer": "Here it is:", "status": "invalid", "errors": ["no JSON"]})
    assert (row["_status"], row["_answer"], row["_errors"]) == ("invalid", "Here it is:", ["no JSON"])


RULE = "extract.rules=[{name: cheap, expression: total < 10.0, message: too dear}]"


def test_a_record_says_what_each_rule_says(workspace: Workspace) -> None:
    judged = make_settle_stage(workspace.job(RULE), NO_EXTRAS)
    row = record(judged, document(), VALID)
    assert row["_rules"] == [{"name": "cheap", "result": "broken", "message": "too dear", "fields": ["total"]}]
    assert row["_status"] == "extracted"
    assert record(judged, document(), VALID.replace("19.99", "null"))["_rules"][0]["result"] == "unknown"
    assert record(judged, document(), {"status": "failed", "failure": FAILURE})["_rules"] == []


def correct(workspace: Workspace, **line: Any) -> SettleStage:
    """Return a settle stage with a correction of a document's total."""
    job = workspace.job(RULE)
    output = Output(job.output)
    output.create()
    about = {"_source": "a.pdf", "_page": None, "_doc_id": "d1", "_corrected": ["$.total"], "total": 5}
    output.root.put("corrections.jsonl", json.dumps(about | line).encode())
    return make_settle_stage(job, NO_EXTRAS)


def test_a_correction_replaces_a_value(workspace: Workspace) -> None:
    row = record(correct(workspace), document(), VALID)
    assert (row["_status"], row["total"], row["currency"], row["_corrected"]) == ("extracted", Decimal("5.00"), "EUR", ["$.total"])
    assert row["_rules"][0]["result"] == "passed"


@pytest.mark.parametrize("line", [{"_doc_id": "d2"}, {"_source": "b.pdf"}, {"_page": 1}])
def test_a_correction_of_another_record_does_not_apply(workspace: Workspace, line: Row) -> None:
    row = record(correct(workspace, **line), document(), VALID)
    assert (row["total"], row["_corrected"]) == (Decimal("19.99"), [])


def test_a_correction_makes_an_invalid_record_valid_and_the_reverse(workspace: Workspace) -> None:
    answer = VALID.replace("19.99", "-1")
    assert record(correct(workspace), document(), answer)["_status"] == "extracted"
    row = record(correct(workspace, total=-2), document(), answer)
    assert (row["_status"], row["_errors"]) == ("invalid", ["$.total: -2 is less than 0"])


def test_a_person_can_fill_in_a_document_that_failed(workspace: Workspace) -> None:
    whole = {"_corrected": ["$.total", "$.currency", "$.lines"], "currency": "USD", "lines": []}
    row = record(correct(workspace, **whole), document(), {"status": "failed", "failure": FAILURE})
    assert (row["_status"], row["_failure"], row["total"], row["currency"]) == ("extracted", None, Decimal("5.00"), "USD")


def test_a_corrected_value_has_no_confidence_and_is_merged_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model was sure of was another value."""
    merged: list[Any] = []
    monkeypatch.setattr("pipeline.stages.settle.merge_parts", lambda *given: merged.append(given) or merge_parts(*given))
    tokens = [{"text": VALID[at : at + 3], "logprob": -0.1} for at in range(0, len(VALID), 3)]
    stage, listed = correct(workspace), document()
    row = record(stage, listed, {"answer": VALID, "tokens": tokens})
    paths = {rated["path"] for rated in row["_confidence"]}
    assert ("$.total" in paths, "$.currency" in paths, len(merged)) == (False, True, 1)


def test_a_correction_is_part_of_what_records_are_made_of(workspace: Workspace) -> None:
    before = str(make_settle_stage(workspace.job(RULE), NO_EXTRAS).plan.schema)
    assert str(correct(workspace).plan.schema) != before


def test_a_rule_that_fails_is_refused(workspace: Workspace) -> None:
    with pytest.raises(JobError, match="the rule cheap fails on a record with all values"):
        make_settle_stage(workspace.job(RULE.replace("10.0", "10 + total")), NO_EXTRAS)


def test_a_failed_request_is_a_failed_record(stage: SettleStage) -> None:
    row = record(stage, document(), {"status": "failed", "failure": FAILURE, "answer": VALID})
    assert (row["_status"], row["_failure"], row["total"], row["_answer"]) == ("failed", FAILURE, None, None)


def test_a_document_that_was_not_opened_is_one_record(stage: SettleStage) -> None:
    failure = FAILURE | {"stage": "source", "kind": "vanished"}
    row = record(stage, document(doc_id=None, page_count=0), {"status": "failed", "failure": failure, "pages": None, "asks": None})
    assert (row["_failure"]["kind"], row["_pages"], row["_requests"], row["_visual_tokens"]) == ("vanished", None, 0, 0)


@pytest.mark.parametrize("listed", [document(), document(doc_id=None, page_count=None)])
def test_what_was_not_asked_yet_is_pending(stage: SettleStage, listed: Row) -> None:
    (row,) = stage.build_table([listed], []).to_pylist()
    assert (row["_status"], row["_failure"]["kind"]) == ("failed", "pending")


# --- attempts


@pytest.mark.parametrize("order", [1, -1])
def test_the_newest_successful_attempt_wins(stage: SettleStage, order: int) -> None:
    good = ledger(stage, document(), VALID)[0]
    older = good | {"attempt": 2, "answer": VALID.replace("19.99", "1.00")}
    later = good | {"attempt": 3}
    latest = good | {"attempt": 4, "status": "failed", "failure": FAILURE, "answer": None}
    (row,) = stage.build_table([document()], [older, later, latest][::order]).to_pylist()
    assert row["total"] == Decimal("19.99")


def test_the_newest_failure_is_told_when_none_succeeded(stage: SettleStage) -> None:
    failed = ledger(stage, document(), {"status": "failed", "failure": FAILURE})[0]
    newer = failed | {"attempt": 2, "failure": FAILURE | {"kind": "timeout"}}
    (row,) = stage.build_table([document()], [newer, failed]).to_pylist()
    assert row["_failure"]["kind"] == "timeout"


# --- long documents


def test_parts_are_merged_in_page_order(stage: SettleStage) -> None:
    parts = '{"currency":"EUR","lines":[]}', '{"currency":null,"total":19.99,"lines":[{"amount":7}]}'
    row = record(stage, document(page_count=3), *parts)
    assert (row["_status"], row["currency"], row["total"], row["lines"]) == ("extracted", "EUR", Decimal("19.99"), [{"amount": Decimal(7)}])
    assert (row["_pages"], row["_requests"], row["_prompt_tokens"], row["_visual_tokens"]) == (3, 2, 600, 768)


def test_parts_that_disagree_say_so(stage: SettleStage) -> None:
    row = record(stage, document(page_count=3), VALID, VALID.replace("19.99", "5"))
    assert row["total"] == Decimal("19.99")
    assert row["_disagreements"] == [{"path": "$.total", "kept": "19.99", "kept_page": 1, "other": "5", "other_page": 3}]


def test_the_merged_record_is_checked_whole(stage: SettleStage) -> None:
    row = record(stage, document(page_count=3), '{"currency":"EUR"}', '{"total":1}')
    assert row["_status"] == "invalid"
    assert "lines" in row["_errors"][0]


def test_one_failed_part_fails_the_document(stage: SettleStage) -> None:
    row = record(stage, document(page_count=3), VALID, {"status": "failed", "failure": FAILURE})
    assert (row["_status"], row["_failure"], row["total"], row["_requests"]) == ("failed", FAILURE, None, 2)


def test_one_part_that_is_no_json_makes_the_document_invalid(stage: SettleStage) -> None:
    row = record(stage, document(page_count=3), VALID, {"answer": "{", "status": "invalid", "errors": ["no JSON"]})
    assert (row["_status"], row["_answer"], row["_errors"]) == ("invalid", "{", ["no JSON"])


def test_a_part_not_asked_yet_leaves_the_document_pending(stage: SettleStage) -> None:
    listed = document(page_count=3)
    (row,) = stage.build_table([listed], ledger(stage, listed, VALID, VALID)[:1]).to_pylist()
    assert (row["_status"], row["_failure"]["kind"], row["_requests"]) == ("failed", "pending", 1)


# --- pages


def test_every_page_has_a_record(by_page: SettleStage) -> None:
    rows = settled(by_page, document(page_count=3), VALID, {"status": "failed", "failure": FAILURE}, VALID)
    assert [(row["_page"], row["_status"], row["_pages"]) for row in rows] == [(1, "extracted", 3), (2, "failed", 3), (3, "extracted", 3)]


def test_a_document_that_was_not_opened_has_a_record_without_page(by_page: SettleStage) -> None:
    row = record(by_page, document(page_count=0), {"status": "failed", "failure": FAILURE})
    assert (row["_page"], row["_status"]) == (None, "failed")


# --- the table


def test_rows_are_in_the_order_of_sources_and_pages(by_page: SettleStage) -> None:
    listed = [document("b", "d1", 2), document("a", "d2", 10)]
    requests = [row for one in listed for row in ledger(by_page, one, *[VALID] * (one["page_count"] or 0))]
    table = by_page.build_table(listed, requests[::-1])
    assert list(zip(table["_source"].to_pylist(), table["_page"].to_pylist(), strict=True)) == [
        *(("a", page) for page in range(1, 11)), ("b", 1), ("b", 2),
    ]  # fmt: skip


def test_two_files_of_the_same_bytes_are_two_records_of_one_answer(stage: SettleStage) -> None:
    listed = [document("a"), document("b")]
    rows = stage.build_table(listed, ledger(stage, listed[0], VALID)).to_pylist()
    assert [(row["_source"], row["total"]) for row in rows] == [("a", Decimal("19.99")), ("b", Decimal("19.99"))]


@pytest.mark.parametrize("answers", [[], [{"status": "failed", "failure": FAILURE}], [VALID], ['{"total":"much"}']])
def test_the_columns_are_the_same_whatever_happened(stage: SettleStage, answers: list[Any]) -> None:
    table = stage.build_table([document()], ledger(stage, document(), *answers)) if answers else stage.build_table([], [])
    assert table.schema == stage.plan.schema


def test_the_same_ledger_gives_the_same_table(stage: SettleStage) -> None:
    requests = ledger(stage, document(page_count=3), VALID, VALID)
    one, other = (stage.build_table([document(page_count=3)], rows) for rows in (requests, requests[::-1]))
    assert one == other


def test_columns_are_the_schemas_the_manifests_and_ours(workspace: Workspace) -> None:
    stage = make_settle_stage(workspace.job(), pa.schema([("customer", pa.string())]))
    assert stage.plan.schema.names == ["currency", "total", "lines", "customer", *(name for name in PROVENANCE_COLUMNS if name != "_page")]


def test_only_pages_have_a_page(by_page: SettleStage, stage: SettleStage) -> None:
    assert ("_page" in by_page.plan.schema.names, "_page" in stage.plan.schema.names) == (True, False)


def test_check_shows_the_columns(workspace: Workspace) -> None:
    shown = list_record_columns(workspace.job())
    assert shown["columns"]["total"] == "decimal128(18, 2)"
    assert shown["columns"]["_doc_id"] == "string"


# --- clashes


@pytest.mark.parametrize("name", ["total", "_source"])
def test_a_manifests_column_of_a_records_name_is_refused(workspace: Workspace, name: str) -> None:
    with pytest.raises(JobError, match=f"the manifest's column '{name}' has the name of a column of the records: rename it"):
        make_settle_stage(workspace.job(), pa.schema([(name, pa.string())]))


# --- documents with pages that cannot be drawn

LOST = {"page": 2, "kind": "timeout", "message": "page 2 took more than 60 s"}
UNDRAWN = {
    "status": "failed",
    "asks": None,
    "failure": {"stage": "render", "kind": "broken", "message": "page 3 cannot be drawn"},
    "pages": None,
}


def test_a_record_that_lacks_a_page_says_so(stage: SettleStage) -> None:
    row = record(stage, document(page_count=4), {"answer": VALID, "page_failures": [LOST]}, VALID)
    assert (row["_status"], row["_partial"], row["_failure"], row["currency"]) == ("extracted", True, None, "EUR")
    assert row["_page_failures"] == [LOST]


def test_a_request_none_of_whose_pages_could_be_drawn_costs_its_pages_alone(stage: SettleStage) -> None:
    lost = [{"page": 3, "kind": "broken", "message": "page 3 cannot be drawn"}]
    for said in (lost, None):  # a ledger of 0.1.0 does not list the pages
        row = record(stage, document(page_count=3), VALID, UNDRAWN | {"page_failures": said})
        assert (row["_status"], row["_partial"], row["_page_failures"], row["_requests"]) == ("extracted", True, lost, 1)


def test_a_document_none_of_whose_pages_could_be_drawn_is_failed(stage: SettleStage) -> None:
    row = record(stage, document(page_count=1), UNDRAWN)
    assert (row["_status"], row["_partial"], row["_failure"]["kind"]) == ("failed", False, "broken")


@pytest.mark.parametrize("other", [FAILURE, {"stage": "generate", "kind": "engine_died", "message": "gone"}])
def test_a_request_that_was_not_answered_fails_the_document_as_before(stage: SettleStage, other: Row) -> None:
    failed = {"status": "failed", "failure": other}
    row = record(stage, document(page_count=4), {"answer": VALID, "page_failures": [LOST]}, failed)
    assert (row["_status"], row["_partial"], row["_failure"]) == ("failed", False, other)


def test_a_job_may_refuse_documents_that_lack_a_page(workspace: Workspace) -> None:
    stage = make_settle_stage(workspace.job("pages.per_request=2", "limits.partial=fail"), NO_EXTRAS)
    row = record(stage, document(page_count=4), {"answer": VALID, "page_failures": [LOST]}, VALID)
    assert (row["_status"], row["_partial"], row["currency"]) == ("failed", False, None)
    assert row["_failure"] == {"stage": "render", "kind": "timeout", "message": "page 2: page 2 took more than 60 s"}


def test_a_page_of_its_own_that_cannot_be_drawn_is_its_record(by_page: SettleStage) -> None:
    good, bad = settled(by_page, document(page_count=2), VALID, UNDRAWN)
    assert [(row["_page"], row["_status"], row["_partial"]) for row in (good, bad)] == [(1, "extracted", False), (2, "failed", False)]
