"""An output folder -> where its run stands: counts by status and kind, and the documents that went worst. Changes nothing.

Knows neither the job's schema nor its model; reads beside a run that is still going on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from pipeline.errors import DamagedShard, JobError
from pipeline.output import Output
from pipeline.output.ledger import FAILURE_TYPE, LEDGER_SCHEMA, OUTCOME_COLUMNS, select_newest_attempt
from pipeline.output.shards import read_each_shard
from pipeline.output.sources import SOURCE_SCHEMA, complete_sources
from pipeline.records import Status
from pipeline.storage.store import Store

RECORDED = pa.schema([("_source", pa.string()), ("_status", pa.string()), ("_failure", FAILURE_TYPE)])
WORST = 20
"""So many documents are named."""
Row = dict[str, Any]


class ShardReader:
    """Reads shards and remembers which were damaged."""

    def __init__(self) -> None:
        self.damaged: list[str] = []

    def shards(self, folder: Store, columns: list[str], schema: pa.Schema) -> list[pa.Table]:
        """Return a folder's sound shards."""
        found = read_each_shard(folder, columns, schema)
        self.damaged += [shard.file for shard in found if isinstance(shard, DamagedShard)]
        return [shard for shard in found if not isinstance(shard, DamagedShard)]

    def rows(self, folder: Store, columns: list[str], schema: pa.Schema) -> list[Row]:
        return [row for table in self.shards(folder, columns, schema) for row in table.to_pylist()]


def read_status(output: Output) -> dict[str, Any]:
    """Return where a run stands: documents listed and identified, requests and records by status and by kind of failure,
    the documents with most failed requests, damaged shards.

    Raises JobError when the folder is no output folder.
    """
    job = output.read_job()
    if job is None:
        raise JobError(f"{output.path} is not an output folder: it has no job.yaml")
    reading = ShardReader()
    listed = reading.shards(output.sources, SOURCE_SCHEMA.names, SOURCE_SCHEMA)
    sources = complete_sources(pa.concat_tables([SOURCE_SCHEMA.empty_table(), *listed]))
    requests = select_latest(reading.rows(output.requests, [*OUTCOME_COLUMNS, "source"], LEDGER_SCHEMA))
    records = reading.rows(output.records, RECORDED.names, RECORDED)
    return {
        "job": job["job"]["name"],
        "documents": {"listed": sources.num_rows, "identified": sources.num_rows - sources["doc_id"].null_count},
        "requests": count_names(row["status"] for row in requests),
        "request_failures": count_names(format_failure_kind(row["failure"]) for row in requests if row["failure"]),
        "records": count_names(row["_status"] for row in records),
        "record_failures": count_names(format_failure_kind(row["_failure"]) for row in records if row["_failure"]),
        "worst": find_worst_documents(requests)[:WORST],
        "damaged": reading.damaged,
    }


def select_latest(rows: list[Row]) -> list[Row]:
    """Return the attempt of each request that counts."""
    requests: dict[str, list[Row]] = {}
    for row in rows:
        requests.setdefault(row["key"], []).append(row)
    return [dict(select_newest_attempt(attempts)) for attempts in requests.values()]


def find_worst_documents(requests: list[Row]) -> list[Row]:
    """Return the documents with a request that has no valid answer, those with most failed requests first."""
    documents: dict[str, list[Row]] = {}
    for row in requests:
        documents.setdefault(row["source"], []).append(row)
    found = [describe_document(source, rows) for source, rows in documents.items() if any(row["failure"] for row in rows)]
    return sorted(found, key=lambda row: (-row["failed"], -row["invalid"], row["source"]))


def describe_document(source: str, requests: list[Row]) -> Row:
    """Return a document's counts, and what its first failure says, a failed request before an invalid one."""
    statuses = Counter(row["status"] for row in requests)
    failures = [row["failure"] for row in sorted(requests, key=lambda row: row["status"] != Status.FAILED) if row["failure"]]
    return {
        "source": source,
        "failed": statuses[Status.FAILED],
        "invalid": statuses[Status.INVALID],
        "requests": len(requests),
        "kind": format_failure_kind(failures[0]),
        "message": failures[0]["message"],
    }


def format_failure_kind(failure: Row) -> str:
    return f"{failure['stage']}/{failure['kind']}"


def count_names(names: Iterable[str]) -> dict[str, int]:
    """Return how often each name comes, the most frequent first."""
    return dict(Counter(names).most_common())
