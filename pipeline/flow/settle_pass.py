"""Settle pass as a Ray Dataset: ledger and listing come in, shards of records go out. It needs no model and can be repeated.

ranges of doc_ids -> settle tasks, each of which reads its part of the ledger and writes one shard -> what is in it
"""

from __future__ import annotations

from typing import Any, TypedDict, cast

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.exceptions import RayError

from pipeline import cluster
from pipeline.errors import DamagedShard
from pipeline.flow.ask_pass import iterate_rows
from pipeline.output import Output
from pipeline.output.ledger import read_requests
from pipeline.output.shards import write_shard
from pipeline.report import Phase, ProgressTracker
from pipeline.stages.settle import SettleStage

DOCUMENTS_PER_SHARD = 1000
SETTLED_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("file", "damaged", "why")),
        *((name, pa.list_(pa.string())) for name in ("sources", "statuses", "failures")),
        ("partial", pa.int64()),
        ("disagreements", pa.int64()),
    ]
)


class SettledRow(TypedDict):
    """What a settle task returns: the shard that it wrote, or the shard of the ledger that it could not read."""

    file: str | None
    damaged: str | None
    why: str | None
    sources: list[str] | None
    statuses: list[str] | None
    failures: list[str] | None
    """`stage/kind` of each record without a valid result."""
    partial: int | None
    """Records that lack pages."""
    disagreements: int | None
    """Records whose requests read different values."""


def settle_output(documents: pa.Table, stage: SettleStage, output: Output, tracker: ProgressTracker) -> None:
    """Write the records of every document, shard by shard, and count them in the tracker's report.

    A shard holds the documents of one range of doc_ids, so that its task reads a range of a sorted ledger. Raises DamagedShard where the
    ledger cannot be read, RunError where settling fails.
    """
    tracker.enter_phase(Phase.SETTLING, documents.num_rows)
    documents = documents.sort_by([("doc_id", "ascending"), ("source", "ascending")])
    ranges = [documents.slice(start, DOCUMENTS_PER_SHARD).combine_chunks() for start in range(0, documents.num_rows, DOCUMENTS_PER_SHARD)]
    settled = ray.data.from_arrow(ranges).map_batches(
        cast(Any, settle_shard), batch_size=None, batch_format="pyarrow", fn_args=(stage, output)
    )
    rows: list[SettledRow] = []
    try:
        for row in iterate_rows(settled):
            rows.append(row)
            tracker.add_settled(len({*(row["sources"] or [])}))
    except RayError as error:
        raise cluster.convert_worker_error(error, "settling stopped: {}; nothing asked is lost: run pipeline settle") from None
    for row in rows:
        if row["damaged"]:
            raise DamagedShard(row["damaged"], row["why"] or "")
    output.remove_other_records({row["file"] for row in rows if row["file"]})
    report = tracker.report
    report.count_records([s for row in rows for s in row["statuses"] or []], [f for row in rows for f in row["failures"] or []])
    report.partial = sum(row["partial"] or 0 for row in rows)
    report.disagreements = sum(row["disagreements"] or 0 for row in rows)
    report.documents = documents.num_rows
    report.missing = sorted({*documents["source"].to_pylist()} - {name for row in rows for name in row["sources"] or []})


def settle_shard(documents: pa.Table, stage: SettleStage, output: Output) -> pa.Table:
    """Settle task: the documents of one range -> one shard of records."""
    try:
        longest = pc.max(documents["page_count"]).as_py() or 0
        requests = read_requests(output, documents["doc_id"], not stage.plan.per_page and longest > stage.per_request)
    except DamagedShard as damage:
        return pa.Table.from_pylist([{"damaged": damage.file, "why": damage.reason}], SETTLED_SCHEMA)
    records = stage.build_table(documents.to_pylist(), requests.to_pylist())
    sources = records["_source"].to_pylist()
    file = write_shard(output.records, records, [f"{name}/{row}" for row, name in enumerate(sources)])
    failures = [f"{f['stage']}/{f['kind']}" for f in records["_failure"].to_pylist() if f]
    row: SettledRow = {
        "file": file,
        "damaged": None,
        "why": None,
        "sources": sources,
        "statuses": records["_status"].to_pylist(),
        "failures": failures,
        "partial": sum(1 for is_partial in records["_partial"].to_pylist() if is_partial),
        "disagreements": sum(1 for disagreements in records["_disagreements"].to_pylist() if disagreements),
    }
    return pa.Table.from_pylist([row], SETTLED_SCHEMA)
