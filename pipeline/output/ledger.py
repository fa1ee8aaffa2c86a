"""Ledger: one row per request in `requests/`, written in shards while a run goes on, and what these rows say is done.

The names of `LedgerRow` and of `LEDGER_SCHEMA` are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DamagedShard, JobError
from pipeline.output import Output
from pipeline.output.key_set import Keys, KeySet, find_packed, pack_column
from pipeline.output.partitions import parse_partition
from pipeline.output.shards import Selection, encode_shard, name_shard, read_each_shard, read_shards
from pipeline.output.sources import SOURCE_SCHEMA, write_sources
from pipeline.records import LedgerRow, Stage, Status

FAILURE_TYPE = pa.struct([("stage", pa.string()), ("kind", pa.string()), ("message", pa.string())])
DISAGREEMENT_TYPE = pa.struct(
    [("path", pa.string()), ("kept", pa.string()), ("kept_page", pa.int32()), ("other", pa.string()), ("other_page", pa.int32())]
)
"""Where two requests of one document read different values, in the records."""
PLACED_VALUE_TYPE = pa.struct(
    [
        ("path", pa.string()),
        ("value", pa.string()),
        ("page", pa.int32()),
        *((corner, pa.float32()) for corner in ("x0", "y0", "x1", "y1")),
    ]
)
EVIDENCE_TYPE = pa.struct(
    [
        *PLACED_VALUE_TYPE,
        ("witness", pa.string()),
        ("match", pa.string()),
        ("places", pa.int32()),
        ("words", pa.string()),
        ("distance", pa.int32()),
    ]
)
"""How a value is witnessed, in the records."""
CONFIDENCE_TYPE = pa.struct([("path", pa.string()), ("confidence", pa.float32())])
"""How sure a value is, in the records."""
ALERT_TYPE = pa.struct([("kind", pa.string()), ("page", pa.int32()), *((name, pa.string()) for name in ("reason", "text", "path"))])
"""What a reader of a document cannot know of, in the records."""
TEXT_LAYER_TYPE = pa.struct([("text", pa.string()), ("boxes", pa.binary()), ("unit_pt", pa.float32()), ("marks", pa.binary())])
PAGE_TYPE = pa.struct(
    [
        ("page_no", pa.int32()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("dpi", pa.float64()),
        ("visual_tokens", pa.int32()),
        ("warnings", pa.list_(pa.string())),
        ("renderer", pa.string()),
        ("quality", pa.struct([(name, pa.float32()) for name in ("contrast", "sharpness", "noise", "unevenness")])),
        ("text_layer", TEXT_LAYER_TYPE),
    ]
)
PAGE_FAILURES_TYPE = pa.list_(pa.struct([("page", pa.int32()), ("kind", pa.string()), ("message", pa.string())]))
"""Pages that could not be drawn, in the ledger and in the records."""
TOKEN_TYPE = pa.struct([("text", pa.string()), ("logprob", pa.float32()), ("margin", pa.float32())])
LEDGER_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("rule", pa.string()),
        ("asked_values", pa.list_(PLACED_VALUE_TYPE)),
        ("attempt", pa.int32()),
        ("source", pa.string()),
        ("doc_id", pa.string()),
        ("page_count", pa.int32()),
        ("first_page", pa.int32()),
        ("last_page", pa.int32()),
        ("status", pa.string()),
        ("failure", FAILURE_TYPE),
        ("answer", pa.string()),
        ("finish_reason", pa.string()),
        ("errors", pa.list_(pa.string())),
        ("asks", pa.int32()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("tokens", pa.list_(TOKEN_TYPE)),
        ("pages", pa.list_(PAGE_TYPE)),
        ("page_failures", PAGE_FAILURES_TYPE),
        ("model", pa.string()),
        ("engine", pa.string()),
        ("fingerprint", pa.string()),
        ("started_at", pa.timestamp("us", "UTC")),
        ("elapsed_s", pa.float64()),
    ]
)
"""One row per request. `answer` is the model's last text as it came; `errors` is why it was not valid."""
OUTCOME_COLUMNS = ["key", "attempt", "status", "failure", "page_failures"]
IDENTITY_COLUMNS = [*OUTCOME_COLUMNS, "started_at"]
"""No two rows have the same: an attempt that was lost and made again began at another time."""
ROWS_AT_ONCE = 32
RETRY_PATTERN = re.compile(r"failed(?::(?:(?P<stage>\w+)/)?(?P<kind>\w+))?")


@dataclass(frozen=True)
class LedgerState:
    """What the ledger says: the requests that are done, and how often those were asked that are retried."""

    done: KeySet
    attempts: Mapping[str, int]


@dataclass(frozen=True)
class RetryFilter:
    """Which failed requests are asked once more: those of a stage, of a kind, or all."""

    stage: str | None = None
    kind: str | None = None

    @classmethod
    def parse(cls, text: str) -> RetryFilter:
        """Return the filter written as `failed`, `failed:KIND` or `failed:STAGE/KIND`. Raises JobError."""
        found = RETRY_PATTERN.fullmatch(text)
        if not found:
            raise JobError(f"retry is {text!r}; allowed are failed, failed:KIND and failed:STAGE/KIND, as in failed:timeout", key="--retry")
        return cls(**found.groupdict())

    def covers_stage(self, stage: Stage) -> bool:
        """Say whether failures of a stage are meant, of whatever kind."""
        return self.stage in (None, str(stage)) and self.kind is None

    def matches(self, row: LedgerRow) -> bool:
        """Say whether a request failed so, or one of its pages."""
        failure = row["failure"] if row["status"] == Status.FAILED else None
        found = [(str(Stage.RENDER), page["kind"]) for page in row.get("page_failures") or []]
        found += [(failure["stage"], failure["kind"])] if failure else []
        return any(self.stage in (None, stage) and self.kind in (None, kind) for stage, kind in found)


def select_newest_attempt(attempts: Iterable[LedgerRow]) -> LedgerRow:
    """Return the newest successful attempt of a request, or else the newest."""
    return max(attempts, key=lambda row: (row["status"] != Status.FAILED, row["attempt"]))


def build_ledger_state(outcomes: Iterable[pa.Table], retry: RetryFilter | None = None) -> LedgerState:
    """Return what is done, given rows of the ledger with `OUTCOME_COLUMNS`, and the failures that are retried.

    Without `retry` it keeps 16 bytes of each row.
    """
    keys, kept = list[Keys](), list[pa.Table]()
    for table in outcomes:
        keys += [pack_column(chunk) for chunk in table["key"].chunks]
        kept += [table] if retry else []
    again = count_retried_attempts(pa.concat_tables(kept), retry) if retry and kept else {}
    done = np.concatenate(keys) if keys else None
    if done is not None and again:
        done = done[~find_packed(done, KeySet.of(again).sorted)]
    return LedgerState(KeySet(done), again)


def count_retried_attempts(outcomes: pa.Table, retry: RetryFilter) -> dict[str, int]:
    """Return the requests that are retried, each with the number of its attempts so far."""
    page_failures = pc.fill_null(pc.list_value_length(outcomes["page_failures"]), 0)
    has_failed = pc.or_(pc.equal(outcomes["status"], str(Status.FAILED)), pc.greater(page_failures, 0))
    requests: dict[str, list[LedgerRow]] = {}
    for row in outcomes.filter(pc.is_in(outcomes["key"], outcomes["key"].filter(has_failed).combine_chunks())).to_pylist():
        requests.setdefault(row["key"], []).append(row)
    return {
        key: max(row["attempt"] for row in attempts) for key, attempts in requests.items() if retry.matches(select_newest_attempt(attempts))
    }


def read_ledger_state(output: Output, retry: RetryFilter | None = None) -> LedgerState:
    """Return what the ledger of an output says is done. Raises DamagedShard and RunError."""
    if retry:
        return build_ledger_state([read_shards(output.requests, OUTCOME_COLUMNS, LEDGER_SCHEMA)], retry)

    def reduce(table: pa.Table) -> Keys:
        return np.concatenate([pack_column(chunk) for chunk in table["key"].chunks] or [pack_column(pa.array([], pa.string()))])

    found = read_each_shard(output.requests, ["key"], LEDGER_SCHEMA, convert=reduce)
    for damage in found:
        if isinstance(damage, DamagedShard):
            raise damage
    keys = [key for key in found if not isinstance(key, DamagedShard)]
    return LedgerState(KeySet(np.concatenate(keys) if keys else None), {})


def read_requests(output: Output, doc_ids: pa.ChunkedArray, with_tokens: bool = False, listed: Mapping[str, int] | None = None) -> pa.Table:
    """Return the ledger's rows of these documents, and of those that have no doc_id if one of these has none.

    Opens the shards, of those `listed` if they were before, and reads the row groups whose range of doc_ids overlaps. The tokens, most of a
    ledger, stay on the disk unless they are wanted.
    """
    columns = [name for name in LEDGER_SCHEMA.names if with_tokens or name != "tokens"]
    return read_shards(output.requests, columns, LEDGER_SCHEMA, select_documents(doc_ids, listed))


def iterate_requests(requests: pa.Table) -> Iterator[LedgerRow]:
    """Yield the rows of a ledger, of which a few have their tokens in memory as Python values at a time."""
    for batch in requests.to_batches(max_chunksize=ROWS_AT_ONCE):
        yield from cast(list[LedgerRow], batch.to_pylist())


def read_identities(output: Output, doc_ids: pa.ChunkedArray, listed: Mapping[str, int]) -> pa.Table:
    """Return what tells the ledger's rows of these documents from all others, without their answers."""
    return read_shards(output.requests, IDENTITY_COLUMNS, LEDGER_SCHEMA, select_documents(doc_ids, listed))


def select_documents(doc_ids: pa.ChunkedArray, listed: Mapping[str, int] | None) -> Selection:
    """Return the selection of the ledger's rows of these documents, and of those without a doc_id if one of these has none."""
    low, high = (pc.min_max(doc_ids)[end].as_py() for end in ("min", "max"))
    with_null = bool(doc_ids.null_count)
    doc_id = pc.field("doc_id")
    wanted = (doc_id >= (low or "")) & (doc_id <= (high or ""))
    if with_null:
        wanted |= doc_id.is_null()
    return Selection(wanted, lambda name: parse_partition(name).overlaps(low, high, with_null), listed)


def write_rows(output: Output, rows: Sequence[LedgerRow], name: str | None = None) -> str | None:
    """Add a shard with these rows to the ledger, and one with what they say of their documents to the list of sources.

    A row without a key only identifies a document. Returns the name of the ledger's shard, which is `name` where that is given; None if no
    row has a key. Raises RunError.
    """
    asked = [row for row in rows if row["key"]]
    if asked:
        name = name or name_rows(asked)
        output.requests.put(name, encode_shard(pa.Table.from_pylist(asked, LEDGER_SCHEMA)))
    write_sources(output, pa.Table.from_pylist([{n: row.get(n) for n in SOURCE_SCHEMA.names} for row in rows], SOURCE_SCHEMA))
    return name if asked else None


def name_rows(rows: Iterable[LedgerRow]) -> str:
    """Return the name of the shard that has these rows of the ledger."""
    return name_shard(f"{row['key']}/{row['attempt']}" for row in rows)
