"""Outputs as they are scored: which of a ledger's answers gives a record's certainty, and what is no output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import JobError
from pipeline.output import Output
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.records import read_record_table
from pipeline.output.shards import write_shard
from pipeline.score.cells import make_tolerance
from pipeline.score.evaluation import evaluate_output
from pipeline.score.outputs import RecordSet
from tests.support.scored import make_tokens, write_output, write_truth


def make_request(key: str, total: float, logprob: float, **columns: Any) -> dict[str, Any]:
    answer = json.dumps({"total": total})
    whole = {"key": key, "attempt": 1, "doc_id": "a.pdf", "first_page": 1, "status": "extracted", "answer": answer}
    return {**whole, "tokens": make_tokens(answer, {"$.total": logprob}), **columns}


def read(folder: Path, *ledger: dict[str, Any]) -> dict[str, float]:
    """Return the certainties of a document with these requests."""
    out = write_output(folder / "out", {"a.pdf": {"total": 1}})
    output = Output(out)
    output.requests.remove(output.requests.list_names(".parquet").keys())
    write_shard(output.requests, pa.Table.from_pylist(list(ledger), LEDGER_SCHEMA), ["new"])
    return RecordSet(read_record_table(str(out))).read_certainties([0])[0]


def test_the_newest_successful_attempt_counts(tmp_path: Path) -> None:
    first, second = make_request("k", 1, -3.0), make_request("k", 1, -2.0, attempt=2)
    failed = {"key": "k", "attempt": 3, "doc_id": "a.pdf", "first_page": 1, "status": "failed"}
    assert read(tmp_path, first, second, failed) == {"$.total": -2.0}


def test_a_document_of_several_requests_has_none(tmp_path: Path) -> None:
    assert read(tmp_path, make_request("k", 1, -3.0), make_request("l", 1, -2.0, first_page=5)) == {}


@pytest.mark.parametrize("columns", [{"status": "failed"}, {"tokens": None}, {"answer": "no JSON"}, {"answer": None}])
def test_an_answer_without_values_has_none(tmp_path: Path, columns: dict[str, Any]) -> None:
    assert read(tmp_path, make_request("k", 1, -3.0, **columns)) == {}


def test_an_answer_of_a_failed_record_is_not_reviewed(tmp_path: Path) -> None:
    """Settling can fail although the model has answered."""
    out = write_output(tmp_path / "out", {"a.pdf": {"total": 1}, "b.pdf": None}, certainty={})
    write_shard(
        Output(out).requests, pa.Table.from_pylist([make_request("b.pdf", 1, -3.0, doc_id="b.pdf", attempt=2)], LEDGER_SCHEMA), ["b"]
    )
    truth = write_truth(tmp_path / "truth.jsonl", {"a.pdf": {"total": 1}, "b.pdf": {"total": 1}})
    certainty = evaluate_output(str(out), truth, make_tolerance(0, 0))["scores"]["certainty"]
    assert certainty is not None
    assert (certainty["values"], certainty["errors_without"]) == (1, 1)


def test_a_folder_without_a_job_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"is not an output folder: it has no job\.yaml"):
        RecordSet(read_record_table(str(tmp_path)))


def test_an_output_without_records_says_what_to_do(tmp_path: Path) -> None:
    output = Output(write_output(tmp_path / "out", {"a.pdf": {}}))
    output.records.remove(output.records.list_names(".parquet").keys())
    with pytest.raises(JobError, match="has no records: run the job, or `pipeline settle`"):
        RecordSet(read_record_table(str(output.root)))
