"""Ledgers of many synthetic documents -> what settling them costs: shards opened for each settle task, and CPU for each document.

    python benchmarks/settle.py [DOCUMENTS ...]        by default 20000 200000

Each document is one request with an answer of four fields and the log-probabilities of its tokens, about 3 kB in the ledger. The ledger is
written in shards of 512 rows, as a run writes it, compacted, and settled in this process without Ray: whole, again with nothing changed,
and again after one request was retried. The counts must not depend on the number of documents, and the CPU for each document must be
within 20 % of the smallest ledger's.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.flow import settle_pass
from pipeline.job import Job
from pipeline.output import SHARD_SUFFIX, Output
from pipeline.output.compaction import compact_shards
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.shards import write_shard
from pipeline.output.sources import SOURCE_SCHEMA
from pipeline.report import ProgressTracker, Report
from pipeline.stages.record_plan import RecordPlan
from pipeline.stages.requests import compute_document_keys
from pipeline.stages.settle import SettleStage
from pipeline.storage.store import FolderStore

SCHEMA = {
    "type": "object",
    "properties": {
        "seller": {"type": "string"},
        "number": {"type": "string"},
        "total": {"type": "number", "multipleOf": 0.01},
        "lines": {"type": "array", "items": {"type": "object", "properties": {"text": {"type": "string"}, "amount": {"type": "number"}}}},
    },
}
JOB = "name: synthetic\nsource: {paths: [in]}\nextract: {schema: schema.json}\nmodel: {name: demo}\noutput: {path: out}\n"
ROWS_PER_SHARD = 512
ALLOWED_GROWTH = 0.2
STARTED_AT = datetime(2026, 1, 1, tzinfo=UTC)


def make_document(number: int) -> dict[str, Any]:
    doc_id = hashlib.sha256(str(number).encode()).hexdigest()
    return {"source": f"in/{number:08}.pdf", "size_bytes": 1, "version": "1", "doc_id": doc_id, "page_count": 1}


def make_request(stage: SettleStage, document: dict[str, Any], attempt: int = 1) -> dict[str, Any]:
    """Return a document's only request, answered."""
    chance = random.Random(document["doc_id"])
    lines = [{"text": f"{chance.getrandbits(80):x}", "amount": chance.randrange(1000) / 100} for _ in range(5)]
    answer = json.dumps({"seller": f"{chance.getrandbits(64):x}", "number": str(chance.getrandbits(32)), "total": 12.5, "lines": lines})
    tokens = [{"text": answer[at : at + 3], "logprob": -chance.random()} for at in range(0, len(answer), 3)]
    (key,) = compute_document_keys(document, stage.per_request, stage.fingerprint)  # type: ignore[arg-type]
    about = {"key": key, "attempt": attempt, "first_page": 1, "last_page": 1, "status": "extracted", "asks": 1, "model": "synthetic"}
    return {**document, **about, "answer": answer, "tokens": tokens, "started_at": STARTED_AT, "elapsed_s": 1.0}


class OpenCounter:
    """Counts the shards of the ledger that are opened."""

    def __init__(self, output: Output) -> None:
        self.folder, self.count = str(output.requests), 0
        self.open_file = FolderStore.open_file

    def __enter__(self) -> OpenCounter:
        def open_counted(store: FolderStore, name: str, size_bytes: int) -> Any:
            self.count += str(store) == self.folder
            return self.open_file(store, name, size_bytes)

        FolderStore.open_file = open_counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        FolderStore.open_file = self.open_file  # type: ignore[method-assign]


def measure_cpu(work: Callable[[], object]) -> float:
    started_s = time.process_time()
    work()
    return time.process_time() - started_s


def measure_ledger(folder: Path, count: int) -> dict[str, float]:
    """Return what one ledger of so many documents costs."""
    (folder / "job.yaml").write_text(JOB)
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    job = Job.load(folder / "job.yaml")
    (output := Output(job.output)).create()
    stage = SettleStage(RecordPlan(job), job.pages_per_request, job.fingerprint)
    for start in range(0, count, ROWS_PER_SHARD):
        rows = [make_request(stage, make_document(number)) for number in range(start, min(start + ROWS_PER_SHARD, count))]
        write_shard(output.requests, pa.Table.from_pylist(rows, LEDGER_SCHEMA), [row["key"] for row in rows])
    documents = pa.Table.from_pylist([make_document(number) for number in range(count)], SOURCE_SCHEMA)
    tasks = -(-count // settle_pass.DOCUMENTS_PER_SHARD)
    report = Report("synthetic", "", "", False)

    def settle() -> None:
        settle_pass.settle_output(documents, stage, output, ProgressTracker(report, lambda _: None), job)

    found: dict[str, float] = {"documents": count, "compact": measure_cpu(lambda: compact_shards(output)) / count * 1e3}
    found["shards"] = len(output.requests.list_names(SHARD_SUFFIX))
    with OpenCounter(output) as opened:
        found["settle"] = measure_cpu(settle) / count * 1e3
    found["opened"] = opened.count / tasks
    found["unchanged"] = measure_cpu(settle) / count * 1e3
    before = {name: (output.records.path / name).stat().st_mtime_ns for name in output.records.list_names("")}  # type: ignore[attr-defined]
    retried = make_request(stage, make_document(0), attempt=2)
    write_shard(output.requests, pa.Table.from_pylist([retried], LEDGER_SCHEMA), [f"{retried['key']}/2"])
    settle()
    after = {name: (output.records.path / name).stat().st_mtime_ns for name in output.records.list_names("")}  # type: ignore[attr-defined]
    found["rewritten"] = sum(1 for name in after if after[name] != before.get(name))
    assert report.records == count, report
    return found


def main() -> None:
    settle_pass.MAX_RANGES_HERE = sys.maxsize  # Ray's processes would have to be counted, too
    counts = [int(text) for text in sys.argv[1:]] or [20_000, 200_000]
    print("documents  shards  opened a task  compact  settle  unchanged (CPU ms a document)  shards rewritten after one retry")
    results = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            results.append(found := measure_ledger(Path(folder), count))
        print(
            f"{count:9}  {found['shards']:6.0f}  {found['opened']:13.2f}  {found['compact']:7.3f}  {found['settle']:6.3f}  "
            f"{found['unchanged']:9.3f}  {found['rewritten']:.0f}",
            flush=True,
        )
    first = results[0]
    if any(found["settle"] > first["settle"] * (1 + ALLOWED_GROWTH) for found in results):
        sys.exit("settling costs more for each document of a larger ledger")


if __name__ == "__main__":
    main()
