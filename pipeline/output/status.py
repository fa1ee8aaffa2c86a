"""Status of a run: an output folder in, counts by status and failure kind and the worst documents out.

Reads only, also while a run is writing to the folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypedDict

import pyarrow as pa

from pipeline.errors import DamagedShard, JobError
from pipeline.output import Output
from pipeline.output.ledger import FAILURE_TYPE, LEDGER_SCHEMA, OUTCOME_COLUMNS, select_newest_attempt
from pipeline.output.shards import read_each_shard
from pipeline.output.sources import SOURCE_SCHEMA, complete_sources
from pipeline.records import FailureRow, LedgerRow, Status
from pipeline.storage.store import Store

RECORD_STATUS_SCHEMA = pa.schema([("_source", pa.string()), ("_status", pa.string()), ("_failure", FAILURE_TYPE)])
MAX_WORST_DOCUMENTS = 20


class ShardReader:
    """Reads intact shards and collects the paths of damaged ones."""

    def __init__(self) -> None:
        self.damaged: list[str] = []

    def read_intact_shards(self, folder: Store, columns: list[str], schema: pa.Schema) -> list[pa.Table]:
        """Return the rows of each intact shard of a folder."""
        found = read_each_shard(folder, columns, schema)
        self.damaged += [shard.file for shard in found if isinstance(shard, DamagedShard)]
        return [shard for shard in found if not isinstance(shard, DamagedShard)]

    def read_rows(self, folder: Store, columns: list[str], schema: pa.Schema) -> list[Any]:
        return [row for table in self.read_intact_shards(folder, columns, schema) for row in table.to_pylist()]


class WorstRow(TypedDict):
    """A document with requests that have no valid answer."""

    source: str
    failed: int
    invalid: int
    requests: int
    kind: str
    """Of its first failure: `stage/kind`."""
    message: str


def read_status(output: Output) -> dict[str, Any]:
    """Return counts of documents, requests and records, by status and by kind of failure, the worst documents and damaged shards.

    A document is identified once its doc_id is known. Raises JobError when the folder is not an output folder.
    """
    job = output.read_job()
    if job is None:
        raise JobError(f"{output.root} is not an output folder: it has no job.yaml")
    reader = ShardReader()
    listed = reader.read_intact_shards(output.sources, SOURCE_SCHEMA.names, SOURCE_SCHEMA)
    sources = complete_sources(pa.concat_tables([SOURCE_SCHEMA.empty_table(), *listed]))
    requests = select_final_attempts(reader.read_rows(output.requests, [*OUTCOME_COLUMNS, "source"], LEDGER_SCHEMA))
    records = reader.read_rows(output.records, RECORD_STATUS_SCHEMA.names, RECORD_STATUS_SCHEMA)
    return {
        "job": job["job"]["name"],
        "documents": {"listed": sources.num_rows, "identified": sources.num_rows - sources["doc_id"].null_count},
        "requests": count_names(row["status"] for row in requests),
        "request_failures": count_names(format_failure_kind(row["failure"]) for row in requests if row["failure"]),
        "records": count_names(row["_status"] for row in records),
        "record_failures": count_names(format_failure_kind(row["_failure"]) for row in records if row["_failure"]),
        "worst": find_worst_documents(requests)[:MAX_WORST_DOCUMENTS],
        "damaged": reader.damaged,
    }


def select_final_attempts(rows: Iterable[LedgerRow]) -> list[LedgerRow]:
    """Return one row per request: the attempt that `select_newest_attempt` chooses."""
    requests: dict[str, list[LedgerRow]] = {}
    for row in rows:
        requests.setdefault(str(row["key"]), []).append(row)
    return [select_newest_attempt(attempts) for attempts in requests.values()]


def find_worst_documents(requests: list[LedgerRow]) -> list[WorstRow]:
    """Return the documents that have a failure, those with most failed requests first, then those with most invalid ones."""
    documents: dict[str, list[LedgerRow]] = {}
    for row in requests:
        documents.setdefault(row["source"], []).append(row)
    found = [describe_document(source, rows) for source, rows in documents.items() if any(row["failure"] for row in rows)]
    return sorted(found, key=lambda row: (-row["failed"], -row["invalid"], row["source"]))


def describe_document(source: str, requests: list[LedgerRow]) -> WorstRow:
    """Return a document's counts and its first failure, that of a failed request before that of an invalid one."""
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


def format_failure_kind(failure: FailureRow) -> str:
    return f"{failure['stage']}/{failure['kind']}"


def count_names(names: Iterable[str]) -> dict[str, int]:
    """Return the number of occurrences of each name, the most frequent first."""
    return dict(Counter(names).most_common())
