"""Ledger and listing -> shards of records: the settle pass as a Ray Dataset.

    ranges of doc_ids -> settle tasks, each of which reads its part of the ledger and writes a shard -> what is in it

Knows neither engine nor model: it can be repeated at will.
"""

from __future__ import annotations

from typing import Any, cast

import pyarrow as pa
import ray.data
from ray.exceptions import RayError

from pipeline import cluster
from pipeline.errors import DamagedShard
from pipeline.flow.ask_pass import iterate_rows
from pipeline.flow.pending import select_extra_columns
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.ledger import read_requests
from pipeline.output.shards import write_shard
from pipeline.output.sources import read_sources
from pipeline.report import Report
from pipeline.stages.settle import SettleStage

DOCUMENTS_PER_SHARD = 1000
SETTLED_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("file", "damaged", "why")),
        *((name, pa.list_(pa.string())) for name in ("sources", "statuses", "failures")),
    ]
)


def settle_output(job: Job, output: Output, report: Report, fingerprint: str | None = None) -> None:
    """Write the records of every source listed, shard by shard, and count them in the report.

    A shard holds the documents of one range of doc_ids, so that its task reads a range of a sorted ledger. Raises
    DamagedShard where the ledger cannot be read.
    """
    documents = read_sources(output).sort_by([("doc_id", "ascending"), ("source", "ascending")])
    stage = SettleStage(job, select_extra_columns(documents), fingerprint)
    shards = [documents.slice(start, DOCUMENTS_PER_SHARD).combine_chunks() for start in range(0, documents.num_rows, DOCUMENTS_PER_SHARD)]
    settled = ray.data.from_arrow(shards).map_batches(
        cast(Any, settle_shard), batch_size=None, batch_format="pyarrow", fn_args=(stage, output)
    )
    try:
        rows = list(iterate_rows(settled))
    except RayError as error:
        raise cluster.convert_worker_error(error, "settling stopped: {}; nothing asked is lost: run pipeline settle") from None
    for row in rows:
        if row["damaged"]:
            raise DamagedShard(row["damaged"], row["why"])
    output.remove_other_records({row["file"] for row in rows})
    report.count_records([s for row in rows for s in row["statuses"]], [f for row in rows for f in row["failures"]])
    seen = {name for row in rows for name in row["sources"]}
    report.documents = documents.num_rows
    report.missing = sorted(set(documents["source"].to_pylist()) - seen)


def settle_shard(documents: pa.Table, stage: SettleStage, output: Output) -> pa.Table:
    """The settle task: the documents of one range -> one shard of records."""
    try:
        requests = read_requests(output, documents["doc_id"])
    except DamagedShard as damage:
        return pa.Table.from_pylist([{"damaged": damage.file, "why": damage.why}], SETTLED_SCHEMA)
    records = stage.table(documents.to_pylist(), requests.to_pylist())
    sources = records["_source"].to_pylist()
    file = write_shard(output.records, records, [f"{name}/{row}" for row, name in enumerate(sources)])
    failures = [f"{f['stage']}/{f['kind']}" for f in records["_failure"].to_pylist() if f]
    row = {"file": file, "sources": sources, "statuses": records["_status"].to_pylist(), "failures": failures}
    return pa.Table.from_pylist([row], SETTLED_SCHEMA)
