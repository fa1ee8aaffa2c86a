"""An output folder -> where its run stands: counts by status and kind, and the documents that went worst. Changes nothing.

Knows neither the job's schema nor its model; reads beside a run that is still going on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from pipeline.attempts import newest
from pipeline.errors import DamagedShard, JobError
from pipeline.records import Status
from pipeline.sink import FAILURE, IDENTITY, LEDGER, OUTCOME, Output, completed, each_shard
from pipeline.store import Store

RECORDED = pa.schema([("_source", pa.string()), ("_status", pa.string()), ("_failure", FAILURE)])
WORST = 20
"""So many documents are named."""
Row = dict[str, Any]


class Reading:
    """Reads shards and remembers which were damaged."""

    def __init__(self) -> None:
        self.damaged: list[str] = []

    def shards(self, folder: Store, columns: list[str], schema: pa.Schema) -> list[pa.Table]:
        """Return a folder's sound shards."""
        found = each_shard(folder, columns, schema)
        self.damaged += [shard.file for shard in found if isinstance(shard, DamagedShard)]
        return [shard for shard in found if not isinstance(shard, DamagedShard)]

    def rows(self, folder: Store, columns: list[str], schema: pa.Schema) -> list[Row]:
        return [row for table in self.shards(folder, columns, schema) for row in table.to_pylist()]


def count(output: Output) -> dict[str, Any]:
    """Return where a run stands: documents listed and identified, requests and records by status and by kind of failure,
    the documents with most failed requests, damaged shards.

    Raises JobError when the folder is no output folder.
    """
    job = output.read_job()
    if job is None:
        raise JobError(f"{output.path} is not an output folder: it has no job.yaml")
    reading = Reading()
    listed = reading.shards(output.sources, IDENTITY.names, IDENTITY)
    sources = completed(pa.concat_tables([IDENTITY.empty_table(), *listed]))
    requests = latest(reading.rows(output.requests, [*OUTCOME, "source"], LEDGER))
    records = reading.rows(output.records, RECORDED.names, RECORDED)
    return {
        "job": job["job"]["name"],
        "documents": {"listed": sources.num_rows, "identified": sources.num_rows - sources["doc_id"].null_count},
        "requests": tally(row["status"] for row in requests),
        "request_failures": tally(kind(row["failure"]) for row in requests if row["failure"]),
        "records": tally(row["_status"] for row in records),
        "record_failures": tally(kind(row["_failure"]) for row in records if row["_failure"]),
        "worst": worst(requests)[:WORST],
        "damaged": reading.damaged,
    }


def latest(rows: list[Row]) -> list[Row]:
    """Return the attempt of each request that counts."""
    requests: dict[str, list[Row]] = {}
    for row in rows:
        requests.setdefault(row["key"], []).append(row)
    return [dict(newest(attempts)) for attempts in requests.values()]


def worst(requests: list[Row]) -> list[Row]:
    """Return the documents with a request that has no valid answer, those with most failed requests first."""
    documents: dict[str, list[Row]] = {}
    for row in requests:
        documents.setdefault(row["source"], []).append(row)
    found = [described(source, rows) for source, rows in documents.items() if any(row["failure"] for row in rows)]
    return sorted(found, key=lambda row: (-row["failed"], -row["invalid"], row["source"]))


def described(source: str, requests: list[Row]) -> Row:
    """Return a document's counts, and what its first failure says, a failed request before an invalid one."""
    statuses = Counter(row["status"] for row in requests)
    failures = [row["failure"] for row in sorted(requests, key=lambda row: row["status"] != Status.FAILED) if row["failure"]]
    return {
        "source": source,
        "failed": statuses[Status.FAILED],
        "invalid": statuses[Status.INVALID],
        "requests": len(requests),
        "kind": kind(failures[0]),
        "message": failures[0]["message"],
    }


def kind(failure: Row) -> str:
    return f"{failure['stage']}/{failure['kind']}"


def tally(names: Iterable[str]) -> dict[str, int]:
    """Return how often each name comes, the most frequent first."""
    return dict(Counter(names).most_common())
