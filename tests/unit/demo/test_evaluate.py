"""The comparison of records with the truth, from which the demonstration model's accuracy is counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.demo import evaluate, samples
from pipeline.demo.evaluate import compare_values, is_same_value, judge_record, plan_documents, summarize_verdicts
from pipeline.demo.samples import DrawnDocument, SamplePlan
from pipeline.demo.truth import format_answer
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.shards import write_shard
from pipeline.report import Report
from pipeline.stages.requests import compute_document_keys
from tests.support.stages import make_settle_stage

TRUTH: dict[str, Any] = {
    "merchant_name": "Lide Kiosk",
    "receipt_number": None,
    "date": "2019-04-01",
    "line_items": [
        {"description": "Juice", "quantity": 3, "amount": Decimal("49.02")},
        {"description": "Tea", "quantity": 1, "amount": Decimal("1")},
    ],
    "total": Decimal("50.02"),
}
DOCUMENT = DrawnDocument("receipt", "receipt-01.pdf", 1, b"", TRUTH)


def make_record(**changes: Any) -> dict[str, Any]:
    """Return a correct row, as it is read from Parquet, with changes."""
    items = [
        {"description": "Juice", "quantity": 3.0, "amount": Decimal("49.02")},
        {"description": "Tea", "quantity": 1.0, "amount": Decimal("1.00")},
    ]
    row = {"merchant_name": "Lide Kiosk", "receipt_number": None, "date": date(2019, 4, 1), "line_items": items, "total": Decimal("50.02")}
    return row | {"_failure": None, "_source": "x/receipt-01.pdf"} | changes


def list_wrong_paths(**changes: Any) -> list[str]:
    return [leaf.path for leaf in compare_values("receipt", TRUTH, make_record(**changes)) if not leaf.is_right]


def test_a_perfect_record_is_flawless_and_counts_each_value() -> None:
    verdict = judge_record(DOCUMENT, make_record())
    assert verdict.is_flawless
    assert len(verdict.leaves) == 4 + 2 * 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("merchant_name", "Lide Kiosk "),
        ("merchant_name", None),
        ("receipt_number", ""),
        ("date", date(2019, 1, 4)),
        ("total", Decimal("50.20")),
    ],
)
def test_one_wrong_value_is_one_wrong_leaf(name: str, value: Any) -> None:
    assert list_wrong_paths(**{name: value}) == [f"$.{name}"]


def test_a_missing_line_item_makes_each_of_its_values_wrong() -> None:
    assert list_wrong_paths(line_items=make_record()["line_items"][:1]) == [
        f"$.line_items[1].{name}" for name in ("description", "quantity", "amount")
    ]


def test_a_line_item_too_many_makes_each_of_its_values_wrong() -> None:
    assert len(list_wrong_paths(line_items=make_record()["line_items"] * 2)) == 2 * 3
    assert len(list(compare_values("receipt", TRUTH, make_record(line_items=make_record()["line_items"] * 2)))) == 4 + 4 * 3


@pytest.mark.parametrize("row", [None, make_record(_failure={"stage": "generate", "kind": "length", "message": ""})])
def test_without_a_valid_record_everything_is_wrong_even_what_is_null(row: dict[str, Any] | None) -> None:
    verdict = judge_record(DOCUMENT, row)
    assert [leaf.is_right for leaf in verdict.leaves] == [False] * 10


@pytest.mark.parametrize(
    ("wanted", "found", "equal"),
    [
        (Decimal("1.10"), Decimal("1.1"), True),
        (3, 3.0, True),
        (3, 3.5, False),
        ("3", 3, False),
        (True, 1, False),
        (None, None, True),
        ("2019-04-01", date(2019, 4, 1), True),
    ],
)
def test_values_are_the_same_if_they_mean_the_same(wanted: Any, found: Any, equal: bool) -> None:
    assert is_same_value(wanted, found) is equal


def test_the_summary_counts_by_field_and_by_failure() -> None:
    failed = make_record(_failure={"stage": "generate", "kind": "length", "message": ""})
    verdicts = [judge_record(DOCUMENT, make_record(total=None)), judge_record(replace(DOCUMENT, name="receipt-02.pdf"), failed)]
    text = summarize_verdicts(verdicts, pages=2, elapsed_s=3.0)
    assert "values exactly right         45.00 %  (9 of 20)" in text
    assert "generate/length: 1" in text
    assert "seconds per page              1.50" in text
    assert "receipt.line_items[].amount        50.00 %  (2 of 4)" in text


def test_mistakes_name_the_document_the_place_and_both_values() -> None:
    assert (
        evaluate.list_mistakes([judge_record(DOCUMENT, make_record(total=Decimal("5.00")))]) == "receipt-01.pdf $.total: 50.02 read as 5.00"
    )


def test_the_plan_holds_the_promised_shares() -> None:
    plans = plan_documents(200)
    assert Counter((p.form, p.pages) for p in plans) == {("invoice", 1): 120, ("receipt", 1): 56, ("invoice", 2): 24}
    assert Counter(p.ending == "pdf" for p in plans)[False] == 42 + 19 + 8
    assert {p.ending for p in plans if p.pages == 2} == {"pdf", "tiff"}
    assert {p.ending for p in plans if p.form == "receipt"} == {"pdf", "jpg", "tiff"}


def test_evaluation_draws_other_seeds_than_the_samples() -> None:
    assert samples.SAMPLES_SEED + len(samples.SAMPLES) <= evaluate.EVALUATION_SEED


class PerfectRun:
    """Stands in for `flow.run`: settles as if the model had read every document perfectly, except one that is lost.

    The real one starts Ray and a model, which the end-to-end test does.
    """

    def __init__(self, drawn: list[DrawnDocument], lost: str) -> None:
        self.answers = {one.name: {"status": "extracted", "answer": format_answer(one.truth)} for one in drawn}
        self.answers[lost] = {"status": "failed", "failure": {"stage": "render", "kind": "broken", "message": ""}}

    def __call__(self, job: Job) -> Report:
        files = sorted(Path(job.sections.source.paths[0]).iterdir())
        listed = [{"source": str(file), "size_bytes": 1, "version": "1", "doc_id": file.name, "page_count": 1} for file in files]
        keys = [next(iter(compute_document_keys(document, job.pages_per_request, job.fingerprint))) for document in listed]
        asked = [{"key": key, "attempt": 1, "errors": [], **self.answers[file.name]} for key, file in zip(keys, files, strict=True)]
        write_shard(Output(job.output).records, make_settle_stage(job, pa.schema([])).build_table(listed, asked), keys)
        return Report(job.sections.name, str(job.output), job.sections.model.name, job.uses_demo, elapsed_s=1.0)


def test_records_are_read_back_from_both_jobs_and_matched_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = samples.draw_documents(
        [SamplePlan("invoice", "pdf"), SamplePlan("receipt", "jpg"), SamplePlan("receipt", "pdf")], evaluate.EVALUATION_SEED
    )
    monkeypatch.setattr("pipeline.flow.run", PerfectRun(drawn, lost="receipt-01.jpg"))
    for form in ("invoice", "receipt"):
        (tmp_path / "out" / form / "records").mkdir(parents=True)
    records, reports = evaluate.read_documents(drawn, "demo", tmp_path)
    verdicts = [judge_record(one, records.get(one.name)) for one in drawn]
    assert [(verdict.is_flawless, verdict.failure) for verdict in verdicts] == [(True, ""), (False, "render/broken"), (True, "")]
    assert [report.job for report in reports] == ["invoices", "receipts"]
