"""Rows -> Parquet shards that are whole or absent, and back: the sources, the ledger of requests, the records.

    out/invoices/
      sources/*.parquet     one row per source listed; while a run goes on, later rows of one source complete earlier ones
      requests/*.parquet    one row per request: the ledger
      records/*.parquet     one row per document or page, typed
      job.yaml  report.json

The folder is one here or a prefix in an object store (`store.py`), where a shard is there when it is whole. Its name is made
from its rows' keys, so that writing it twice leaves one file. Knows neither Ray nor what a row means.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import suppress
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from pipeline import store
from pipeline.errors import DamagedShard, JobError, RunError
from pipeline.events import event
from pipeline.objects import Unreachable, said
from pipeline.place import Place, parted
from pipeline.store import Store

FAILURE = pa.struct([("stage", pa.string()), ("kind", pa.string()), ("message", pa.string())])
PAGE = pa.struct(
    [
        ("page_no", pa.int32()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("dpi", pa.float64()),
        ("visual_tokens", pa.int32()),
        ("warnings", pa.list_(pa.string())),
    ]
)
TOKEN = pa.struct([("text", pa.string()), ("logprob", pa.float32())])
LEDGER = pa.schema(
    [
        ("key", pa.string()),
        ("attempt", pa.int32()),
        ("source", pa.string()),
        ("doc_id", pa.string()),
        ("page_count", pa.int32()),
        ("first_page", pa.int32()),
        ("last_page", pa.int32()),
        ("status", pa.string()),
        ("failure", FAILURE),
        ("answer", pa.string()),
        ("finish_reason", pa.string()),
        ("errors", pa.list_(pa.string())),
        ("asks", pa.int32()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("tokens", pa.list_(TOKEN)),
        ("pages", pa.list_(PAGE)),
        ("model", pa.string()),
        ("engine", pa.string()),
        ("fingerprint", pa.string()),
        ("started_at", pa.timestamp("us", "UTC")),
        ("elapsed_s", pa.float64()),
    ]
)
"""One row per request. `answer` is the model's last text as it came; `errors` is why it was not valid."""
OUTCOME = ["key", "attempt", "status", "failure"]

IDENTITY = pa.schema(
    [("source", pa.string()), ("size_bytes", pa.int64()), ("version", pa.string()), ("doc_id", pa.string()), ("page_count", pa.int32())]
)
"""The columns of `sources/` that every listing has; the manifest's own follow."""


SUFFIX = ".parquet"
LISTINGS = 5
"""So often a folder is listed anew when shards vanish while they are read: somebody gathers them into larger ones."""


class Output:
    """A run's folder."""

    def __init__(self, place: Place) -> None:
        self.path, self.root = place, store.at(place)
        self.sources, self.requests, self.records = (self.root / name for name in ("sources", "requests", "records"))

    @property
    def folders(self) -> tuple[Store, ...]:
        return self.root, self.sources, self.requests, self.records

    def make(self) -> None:
        """Create the folders, and prove that they can be written to. Raises JobError, before anything else has happened."""
        try:
            for folder in self.folders:
                folder.make()
            self.root.probe()
        except OSError as error:
            raise JobError(f"cannot write to the output folder {self.path}: {said(error)}") from None

    def clear(self) -> None:
        """Remove what a killed run left half-written; not while another one writes. Raises RunError."""
        for folder in self.folders:
            folder.clear()

    def write_job(self, content: dict[str, Any]) -> None:
        self.root.put("job.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120).encode())

    def read_job(self) -> dict[str, Any] | None:
        """Return what `job.yaml` says, or None in a fresh folder. Raises JobError when someone else wrote that file."""
        file = f"{self.root / 'job.yaml'}"
        try:
            found = yaml.safe_load(self.root.read("job.yaml").decode("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise JobError(f"cannot read {file}: {error}") from None
        if found is not None and not (isinstance(found, dict) and found.keys() >= {"job", "fingerprint", "asked"}):
            raise JobError(f"{file} was not written by a run: choose another output folder")
        return found

    def keep_records(self, names: Set[str]) -> None:
        """Remove the shards of an earlier settling."""
        self.records.remove(self.records.names(SUFFIX).keys() - names)

    def write_report(self, content: dict[str, Any]) -> None:
        self.root.put("report.json", (json.dumps(content, indent=2) + "\n").encode())


def write_shard(folder: Store, table: pa.Table, keys: Iterable[str], group_rows: int | None = None) -> str:
    """Write a table as one Parquet file named from its rows' keys; return its name."""
    name = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:24] + SUFFIX
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=group_rows, compression="zstd", write_page_checksum=True)
    folder.put(name, buffer.getvalue().to_pybytes())
    return name


def read_shards(folder: Store, columns: Sequence[str] | None, schema: pa.Schema, wanted: pc.Expression | None = None) -> pa.Table:
    """Return all rows of a folder's shards, in the order of their names.

    Raises DamagedShard, also where a checksum says that what is read is not what was written.
    """
    found = each_shard(folder, columns, schema, wanted)
    for damage in found:
        if isinstance(damage, DamagedShard):
            raise damage
    if not found:
        return schema.empty_table().select(columns or schema.names)
    return pa.concat_tables(found, promote_options="permissive")


def each_shard(
    folder: Store, columns: Sequence[str] | None, schema: pa.Schema, wanted: pc.Expression | None = None
) -> list[pa.Table | DamagedShard]:
    """Return the rows, or the damage, of each of a folder's shards, in the order of their names.

    Raises RunError when the folder cannot be read.
    """

    def read(shard: tuple[str, int]) -> pa.Table | DamagedShard:
        try:
            return read_shard(folder, *shard, columns, schema, wanted)
        except DamagedShard as damage:
            return damage

    for _ in range(LISTINGS):
        with suppress(FileNotFoundError):
            return store.each(read, folder.names(SUFFIX).items())
    raise RunError(f"the shards in {folder} come and go while they are read: let no other run write there, and try again")


def read_shard(
    folder: Store, name: str, size_bytes: int, columns: Sequence[str] | None, schema: pa.Schema, wanted: pc.Expression | None = None
) -> pa.Table:
    """Return the rows of one shard. Raises DamagedShard, FileNotFoundError, or RunError where nothing can be said of it."""
    file = f"{folder / name}"
    try:
        content = folder.opened(name, size_bytes)
        table = pq.read_table(content, columns=columns, filters=wanted, partitioning=None, page_checksum_verification=True)
    except FileNotFoundError:
        raise
    except Unreachable as error:
        raise store.stop(f"read {file}", error) from None
    except (OSError, pa.ArrowException) as error:
        raise DamagedShard(file, " ".join(str(error).split())[:120]) from None
    if missing := {*(columns or schema.names)} - {*table.column_names}:
        raise DamagedShard(file, f"it lacks the columns {', '.join(sorted(missing))}")
    return table


def set_aside(output: Output, damage: DamagedShard) -> str:
    """Put a damaged shard out of sight, beside the others, for someone who wants to look at it; return its place."""
    folder, name = parted(type(output.path)(damage.file))
    store.at(folder).rename(name, f".{name}.damaged")
    return damage.file


def set_aside_damaged(output: Output) -> list[str]:
    """Set aside the shards of listing and ledger that do not say which requests they hold; return their places."""
    found = [*each_shard(output.sources, None, IDENTITY), *each_shard(output.requests, OUTCOME, LEDGER)]
    return [set_aside(output, damage) for damage in found if isinstance(damage, DamagedShard)]


def read_outcomes(output: Output) -> Iterator[dict[str, Any]]:
    """Yield what became of every request in the ledger: its key, attempt, status and failure."""
    for batch in read_shards(output.requests, OUTCOME, LEDGER).to_batches(max_chunksize=65_536):
        yield from batch.to_pylist()


def write_sources(output: Output, table: pa.Table) -> None:
    """Add rows to the listing."""
    if table.num_rows:
        write_shard(output.sources, table, [str(row) for row in table.to_pylist()])


def read_sources(output: Output) -> pa.Table:
    """Return one row per source: as it was listed, completed by what a later row found out about it."""
    return completed(read_shards(output.sources, None, IDENTITY))


def completed(table: pa.Table) -> pa.Table:
    """Return one row of each source; a manifest's columns and a page count need not stand in the same row before."""
    known = one_per_source(table, pc.is_valid(table["page_count"]))
    extras = [name for name in table.column_names if name not in IDENTITY.names]
    if not extras:
        return known
    listed = one_per_source(table, reduce(pc.or_, (pc.is_valid(table[name]) for name in extras)))
    return pa.table([*known.select(IDENTITY.names), *listed.select(extras)], names=[*IDENTITY.names, *extras])


def one_per_source(table: pa.Table, better: pa.ChunkedArray) -> pa.Table:
    """Return a row of each source, by name; one that is marked as better, if there is one."""
    order = pc.sort_indices(table.append_column("_better", better), sort_keys=[("source", "ascending"), ("_better", "descending")])
    table = table.take(order)
    names = table["source"].to_pylist()
    return table.take(pa.array([row for row, name in enumerate(names) if not row or names[row - 1] != name], pa.int64()))


def replace_sources(output: Output, table: pa.Table) -> None:
    """Make the listing one shard of these rows."""
    before = output.sources.names(SUFFIX).keys()
    kept = write_shard(output.sources, table, [str(row) for row in table.to_pylist()])
    output.sources.remove(before - {kept})


def read_requests(output: Output, doc_ids: pa.ChunkedArray) -> pa.Table:
    """Return the ledger's rows of these documents, and of those that have no doc_id if one of these has none.

    Reads the row groups whose range of doc_ids overlaps; the tokens stay on the disk.
    """
    low, high = (pc.min_max(doc_ids)[end].as_py() for end in ("min", "max"))
    place = pc.field("doc_id")
    wanted = (place >= (low or "")) & (place <= (high or ""))
    if doc_ids.null_count:
        wanted |= place.is_null()
    columns = [name for name in LEDGER.names if name != "tokens"]
    return read_shards(output.requests, columns, LEDGER, wanted)


class Ledger:
    """Gathers the rows that come back and writes them in shards, some every few seconds so that a kill costs little."""

    ROWS, SECONDS = 512, 5.0

    def __init__(self, output: Output) -> None:
        self.output, self.rows, self.written_at = output, list[dict[str, Any]](), time.monotonic()
        self.seen: set[str] = set()

    def add(self, row: dict[str, Any]) -> bool:
        """Take a row; say whether it is new: work that was done again because a machine was lost brings some twice."""
        if row["key"] in self.seen:
            return False
        if row["key"]:
            self.seen.add(row["key"])
        self.rows.append(row)
        if len(self.rows) >= self.ROWS or time.monotonic() - self.written_at > self.SECONDS:
            self.flush()
        return True

    def flush(self) -> None:
        asked = [row for row in self.rows if row["key"]]
        if asked:
            keys = [f"{row['key']}/{row['attempt']}" for row in asked]
            shard = write_shard(self.output.requests, pa.Table.from_pylist(asked, LEDGER), keys)
            event("shard_written", shard=shard, requests=len(asked))
        write_sources(self.output, pa.Table.from_pylist(self.rows, IDENTITY))
        self.rows, self.written_at = [], time.monotonic()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
