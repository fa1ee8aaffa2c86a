"""Status of a run: counts by status and failure kind, the worst documents, damaged shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import JobError
from pipeline.output import Output
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.shards import write_shard
from pipeline.output.status import MAX_WORST_DOCUMENTS, RECORD_STATUS_SCHEMA, read_status
from tests.support.ledger import LedgerWriter


def make_row(key: str, source: str, kind: str = "", attempt: int = 1, **columns: Any) -> dict[str, Any]:
    status = "invalid" if kind == "invalid" else "failed" if kind else "extracted"
    failure = {"stage": "validate" if kind == "invalid" else "render", "kind": kind, "message": f"{kind}!"} if kind else None
    document = {"source": source, "size_bytes": 5, "version": "1", "doc_id": source, "page_count": 1}
    return document | {"key": key, "attempt": attempt, "status": status, "failure": failure} | columns


@pytest.fixture
def output(tmp_path: Path) -> Output:
    output = Output(tmp_path / "out")
    output.create()
    output.write_job({"job": {"name": "slips"}, "fingerprint": "f", "asked": {}})
    return output


def add_rows(output: Output, *rows: dict[str, Any]) -> None:
    with LedgerWriter(output) as ledger:
        for row in rows:
            ledger.add(row)


def test_documents_requests_and_records_are_counted(output: Output) -> None:
    add_rows(
        output,
        make_row("k1", "a.pdf"),
        make_row("k2", "b.pdf", "timeout"),
        make_row("k3", "b.pdf", "timeout"),
        make_row("k4", "c.pdf", doc_id=None),
    )
    failure = {"stage": "render", "kind": "timeout", "message": "…"}
    records = [{"_source": "a.pdf", "_status": "extracted"}, {"_source": "b.pdf", "_status": "failed", "_failure": failure}]
    write_shard(output.records, pa.Table.from_pylist(records, RECORD_STATUS_SCHEMA), ["a", "b"])
    found = read_status(output)
    assert (found["job"], found["documents"]) == ("slips", {"listed": 3, "identified": 2})
    assert (found["requests"], found["request_failures"]) == ({"extracted": 2, "failed": 2}, {"render/timeout": 2})
    assert (found["records"], found["record_failures"]) == ({"extracted": 1, "failed": 1}, {"render/timeout": 1})


def test_the_worst_documents_come_first(output: Output) -> None:
    rows = [make_row("k1", "fine.pdf"), make_row("k2", "odd.pdf", "invalid"), make_row("k3", "odd.pdf"), make_row("k4", "bad.pdf", "crash")]
    add_rows(
        output,
        *rows,
        make_row("k5", "worse.pdf", "timeout"),
        make_row("k6", "worse.pdf", "invalid"),
        make_row("k7", "worse.pdf", "timeout"),
    )
    worst = read_status(output)["worst"]
    assert [row["source"] for row in worst] == ["worse.pdf", "bad.pdf", "odd.pdf"]
    assert worst[0] == {
        "source": "worse.pdf", "failed": 2, "invalid": 1, "requests": 3, "kind": "render/timeout", "message": "timeout!"
    }  # fmt: skip


def test_the_number_of_worst_documents_is_limited(output: Output) -> None:
    add_rows(output, *(make_row(f"k{n}", f"{n:03}.pdf", "crash") for n in range(MAX_WORST_DOCUMENTS + 5)))
    assert [row["source"] for row in read_status(output)["worst"]] == [f"{n:03}.pdf" for n in range(MAX_WORST_DOCUMENTS)]


def test_a_successful_attempt_replaces_a_failed_one(output: Output) -> None:
    add_rows(output, make_row("k1", "a.pdf", "timeout"))
    add_rows(output, make_row("k1", "a.pdf", attempt=2))
    assert (read_status(output)["requests"], read_status(output)["worst"]) == ({"extracted": 1}, [])


def test_a_damaged_shard_is_named_and_the_rest_counted(output: Output) -> None:
    add_rows(output, make_row("k1", "a.pdf"))
    bad = (
        output.root.path / "requests" / write_shard(output.requests, pa.Table.from_pylist([make_row("k2", "b.pdf")], LEDGER_SCHEMA), ["k2"])
    )
    bad.write_bytes(b"PAR1")
    found = read_status(output)
    assert (found["damaged"], found["requests"]) == ([str(bad)], {"extracted": 1})
    assert bad.exists()


def test_a_folder_without_job_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"is not an output folder: it has no job\.yaml"):
        read_status(Output(tmp_path))
