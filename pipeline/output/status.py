"""Status of a run: an output folder in, counts by status and failure kind and the worst documents out.

Reads only, also while a run is writing to the folder.
"""

from __future__ import annotations

from typing import TypedDict, cast

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DamagedShard, JobError
from pipeline.output import Output
from pipeline.output.ledger import ALERT_TYPE, DISAGREEMENT_TYPE, FAILURE_TYPE, LEDGER_SCHEMA, OUTCOME_COLUMNS
from pipeline.output.shards import read_each_shard
from pipeline.output.sources import SOURCE_SCHEMA, complete_sources
from pipeline.records import Status
from pipeline.storage.store import Store

RECORD_STATUS_SCHEMA = pa.schema(
    [
        ("_source", pa.string()),
        ("_status", pa.string()),
        ("_failure", FAILURE_TYPE),
        ("_partial", pa.bool_()),
        ("_disagreements", pa.list_(DISAGREEMENT_TYPE)),
        ("_unwitnessed", pa.int32()),
        ("_alerts", pa.list_(ALERT_TYPE)),
    ]
)
MAX_WORST_DOCUMENTS = 20


class WorstRow(TypedDict):
    """A document with requests that have no valid answer."""

    source: str
    failed: int
    invalid: int
    requests: int
    kind: str
    """Of its first failure: `stage/kind`."""
    message: str


class RunStatus(TypedDict):
    """What `status` shows; counts are by status or by `stage/kind`, the most frequent first."""

    job: str
    documents: dict[str, int]
    """Documents listed, and those of them whose doc_id is known."""
    requests: dict[str, int]
    request_failures: dict[str, int]
    records: dict[str, int]
    record_failures: dict[str, int]
    partial: int
    """Records that lack pages which could not be drawn."""
    disagreements: int
    """Records whose requests read different values."""
    unwitnessed: int
    """Records with values that no witness shows."""
    alerts: int
    """Records with alerts."""
    worst: list[WorstRow]
    damaged: list[str]
    """Paths of damaged shards."""


class ShardReader:
    """Reads intact shards and collects the paths of damaged ones."""

    def __init__(self) -> None:
        self.damaged: list[str] = []

    def read_intact_shards(self, folder: Store, columns: list[str], schema: pa.Schema) -> pa.Table:
        """Return the rows of a folder's intact shards."""
        found = read_each_shard(folder, columns, schema)
        self.damaged += [shard.file for shard in found if isinstance(shard, DamagedShard)]
        empty = schema.empty_table().select(columns)
        return pa.concat_tables([empty, *(shard for shard in found if not isinstance(shard, DamagedShard))], promote_options="permissive")


def read_status(output: Output) -> RunStatus:
    """Return counts of documents, requests and records, by status and by kind of failure, the worst documents and damaged shards.

    Raises JobError when the folder is not an output folder.
    """
    job = output.read_job()
    if job is None:
        raise JobError(f"{output.root} is not an output folder: it has no job.yaml", str(output.root))
    reader = ShardReader()
    sources = complete_sources(reader.read_intact_shards(output.sources, ["source", "doc_id", "page_count"], SOURCE_SCHEMA))
    ledger = reader.read_intact_shards(output.requests, [*OUTCOME_COLUMNS, "rule", "source"], LEDGER_SCHEMA)
    requests = select_final_attempts(add_failure_kind(ledger.filter(pc.is_null(ledger["rule"])).to_pandas(), "failure"))
    records = add_failure_kind(
        reader.read_intact_shards(output.records, RECORD_STATUS_SCHEMA.names, RECORD_STATUS_SCHEMA).to_pandas(), "_failure"
    )
    return {
        "job": job["job"]["name"],
        "documents": {"listed": sources.num_rows, "identified": sources.num_rows - sources["doc_id"].null_count},
        "requests": count_values(requests["status"]),
        "request_failures": count_values(requests["kind"]),
        "records": count_values(records["_status"]),
        "record_failures": count_values(records["kind"]),
        "partial": int(records["_partial"].fillna(False).sum()),
        "disagreements": sum(1 for found in records["_disagreements"] if found is not None and len(found)),
        "unwitnessed": int((records["_unwitnessed"].fillna(0) > 0).sum()),
        "alerts": sum(1 for found in records["_alerts"] if found is not None and len(found)),
        "worst": find_worst_documents(requests)[:MAX_WORST_DOCUMENTS],
        "damaged": reader.damaged,
    }


def add_failure_kind(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the rows with the columns `kind` (`stage/kind`) and `message` of the failures in this column, null where there is none."""
    failures = [failure or {} for failure in rows[column]]
    kinds = [f"{failure['stage']}/{failure['kind']}" if failure else None for failure in failures]
    messages = [failure.get("message") for failure in failures]
    return rows.assign(kind=pd.Series(kinds, rows.index, dtype="str"), message=pd.Series(messages, rows.index, dtype="str"))


def select_final_attempts(ledger: pd.DataFrame) -> pd.DataFrame:
    """Return one row per request: its newest attempt that did not fail, or else its newest (as `select_newest_attempt` does)."""
    order = ledger.assign(succeeded=ledger["status"] != str(Status.FAILED)).sort_values(["succeeded", "attempt"], kind="stable")
    return order.drop_duplicates("key", keep="last").sort_index()


def find_worst_documents(requests: pd.DataFrame) -> list[WorstRow]:
    """Return the documents that have a failure, those with most failed requests first, then those with most invalid ones."""
    failed, invalid = (requests["status"] == str(status) for status in (Status.FAILED, Status.INVALID))
    counts = (
        requests.assign(failed=failed, invalid=invalid)
        .groupby("source")
        .agg(failed=("failed", "sum"), invalid=("invalid", "sum"), requests=("key", "size"))
    )
    failures = requests[requests["kind"].notna()].sort_values("status", key=lambda status: status != str(Status.FAILED), kind="stable")
    first = failures.drop_duplicates("source").set_index("source")[["kind", "message"]]
    worst = counts.join(first, how="inner").reset_index()
    worst = worst.sort_values(["failed", "invalid", "source"], ascending=[False, False, True])
    return cast(list[WorstRow], worst.to_dict("records"))


def count_values(values: pd.Series) -> dict[str, int]:
    """Return the number of occurrences of each value, the most frequent first."""
    return {str(value): int(count) for value, count in values.value_counts().items()}
