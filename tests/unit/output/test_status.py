"""Where a run stands: counts, kinds and the worst documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import JobError
from pipeline.output import Output
from pipeline.output.ledger import LEDGER_SCHEMA, LedgerWriter
from pipeline.output.shards import write_shard
from pipeline.output.status import MAX_WORST_DOCUMENTS, RECORD_STATUS_SCHEMA, read_status


def row(key: str, source: str, kind: str = "", attempt: int = 1, **given: Any) -> dict[str, Any]:
    status = "invalid" if kind == "invalid" else "failed" if kind else "extracted"
    failure = {"stage": "validate" if kind == "invalid" else "render", "kind": kind, "message": f"{kind}!"} if kind else None
    about = {"source": source, "size_bytes": 5, "version": "1", "doc_id": source, "page_count": 1}
    return about | {"key": key, "attempt": attempt, "status": status, "failure": failure} | given


@pytest.fixture
def output(tmp_path: Path) -> Output:
    made = Output(tmp_path / "out")
    made.create()
    made.write_job({"job": {"name": "slips"}, "fingerprint": "f", "asked": {}})
    return made


def write(output: Output, *rows: dict[str, Any]) -> None:
    with LedgerWriter(output) as ledger:
        for one in rows:
            ledger.add(one)


def test_documents_requests_and_records_are_counted(output: Output) -> None:
    write(output, row("k1", "a.pdf"), row("k2", "b.pdf", "timeout"), row("k3", "b.pdf", "timeout"), row("k4", "c.pdf", doc_id=None))
    failure = {"stage": "render", "kind": "timeout", "message": "…"}
    records = [{"_source": "a.pdf", "_status": "extracted"}, {"_source": "b.pdf", "_status": "failed", "_failure": failure}]
    write_shard(output.records, pa.Table.from_pylist(records, RECORD_STATUS_SCHEMA), ["a", "b"])
    found = read_status(output)
    assert (found["job"], found["documents"]) == ("slips", {"listed": 3, "identified": 2})
    assert (found["requests"], found["request_failures"]) == ({"extracted": 2, "failed": 2}, {"render/timeout": 2})
    assert (found["records"], found["record_failures"]) == ({"extracted": 1, "failed": 1}, {"render/timeout": 1})


def test_the_worst_documents_come_first(output: Output) -> None:
    rows = [row("k1", "fine.pdf"), row("k2", "odd.pdf", "invalid"), row("k3", "odd.pdf"), row("k4", "bad.pdf", "crash")]
    write(output, *rows, row("k5", "worse.pdf", "timeout"), row("k6", "worse.pdf", "invalid"), row("k7", "worse.pdf", "timeout"))
    worst = read_status(output)["worst"]
    assert [one["source"] for one in worst] == ["worse.pdf", "bad.pdf", "odd.pdf"]
    assert worst[0] == {
        "source": "worse.pdf", "failed": 2, "invalid": 1, "requests": 3, "kind": "render/timeout", "message": "timeout!"
    }  # fmt: skip


def test_so_many_are_named(output: Output) -> None:
    write(output, *(row(f"k{n}", f"{n:03}.pdf", "crash") for n in range(MAX_WORST_DOCUMENTS + 5)))
    assert [one["source"] for one in read_status(output)["worst"]] == [f"{n:03}.pdf" for n in range(MAX_WORST_DOCUMENTS)]


def test_an_attempt_that_succeeded_counts_before_the_one_that_failed(output: Output) -> None:
    write(output, row("k1", "a.pdf", "timeout"))
    write(output, row("k1", "a.pdf", attempt=2))
    assert (read_status(output)["requests"], read_status(output)["worst"]) == ({"extracted": 1}, [])


def test_a_damaged_shard_is_named_and_the_rest_counted(output: Output) -> None:
    write(output, row("k1", "a.pdf"))
    bad = output.root.path / "requests" / write_shard(output.requests, pa.Table.from_pylist([row("k2", "b.pdf")], LEDGER_SCHEMA), ["k2"])
    bad.write_bytes(b"PAR1")
    found = read_status(output)
    assert (found["damaged"], found["requests"]) == ([str(bad)], {"extracted": 1})
    assert bad.exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"is not an output folder: it has no job\.yaml"):
        read_status(Output(tmp_path))
