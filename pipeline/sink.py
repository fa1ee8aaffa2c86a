"""Rows -> Parquet shards that are whole or absent, and back: the sources, the ledger of requests, the records.

    out/invoices/
      sources/*.parquet     one row per source listed; while a run goes on, later rows of one source complete earlier ones
      requests/*.parquet    one row per request: the ledger
      records/*.parquet     one row per document or page, typed
      job.yaml  report.json

A shard is written under a temporary name in the same folder, flushed to the disk and renamed; its name is made from its
rows' keys, so that writing it twice leaves one file. Knows neither Ray nor what a row means.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from pipeline.errors import DamagedShard, JobError, RunError

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


class Output:
    """A run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sources, self.requests, self.records = path / "sources", path / "requests", path / "records"

    def prepare(self) -> None:
        """Create the folders, remove what a killed run left half-written, and prove that they can be written to.

        Raises JobError, before anything else has happened.
        """
        try:
            for folder in (self.path, self.sources, self.requests, self.records):
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in folder.glob(".*.tmp"):
                    leftover.unlink()
            probe = self.path / f".probe-{os.getpid()}.tmp"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise JobError(f"cannot write to the output folder {self.path}: {error.strerror}") from None

    def write_job(self, content: dict[str, Any]) -> None:
        write_whole(self.path / "job.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120).encode())

    def read_job(self) -> dict[str, Any] | None:
        """Return what `job.yaml` says, or None in a fresh folder. Raises JobError when someone else wrote that file."""
        file = self.path / "job.yaml"
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise JobError(f"cannot read {file}: {error}") from None
        if found is not None and not (isinstance(found, dict) and found.keys() >= {"job", "fingerprint", "asked"}):
            raise JobError(f"{file} was not written by a run: choose another output folder")
        return found

    def keep_records(self, names: Set[str]) -> None:
        """Remove the shards of an earlier settling."""
        for file in self.records.glob("*.parquet"):
            if file.name not in names:
                file.unlink()

    def write_report(self, content: dict[str, Any]) -> None:
        write_whole(self.path / "report.json", (json.dumps(content, indent=2) + "\n").encode())


def write_whole(file: Path, content: bytes) -> None:
    """Write a file so that a reader, and a power cut, find the old content or the new.

    Raises RunError when the disk is full or the folder is gone.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        draft.replace(file)
    except OSError as error:
        draft.unlink(missing_ok=True)
        cure = "free the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "put that right"
        raise RunError(f"cannot write {file}: {error.strerror}; {cure} and run the same command again") from None


def write_shard(folder: Path, table: pa.Table, keys: Iterable[str]) -> Path:
    """Write a table as one Parquet file named from its rows' keys; return its path."""
    name = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:24]
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    file = folder / f"{name}.parquet"
    write_whole(file, buffer.getvalue().to_pybytes())
    return file


def read_shards(folder: Path, columns: Sequence[str] | None, schema: pa.Schema, wanted: pc.Expression | None = None) -> pa.Table:
    """Return all rows of a folder's shards, in the order of their names.

    Raises DamagedShard, also where a checksum says that what is read is not what was written.
    """
    tables = [read_shard(file, columns, schema, wanted) for file in sorted(folder.glob("*.parquet"))]
    if not tables:
        return schema.empty_table().select(columns or schema.names)
    return pa.concat_tables(tables, promote_options="permissive")


def read_shard(file: Path, columns: Sequence[str] | None, schema: pa.Schema, wanted: pc.Expression | None = None) -> pa.Table:
    """Return the rows of one shard."""
    try:
        table = pq.read_table(file, columns=columns, filters=wanted, partitioning=None, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise DamagedShard(str(file), " ".join(str(error).split())[:120]) from None
    if missing := {*(columns or schema.names)} - {*table.column_names}:
        raise DamagedShard(str(file), f"it lacks the columns {', '.join(sorted(missing))}")
    return table


def set_aside(damage: DamagedShard) -> str:
    """Put a damaged shard out of sight, beside the others, for someone who wants to look at it; return its path."""
    file = Path(damage.file)
    with suppress(FileNotFoundError):
        file.rename(file.with_name(f".{file.name}.damaged"))
    return damage.file


def set_aside_damaged(output: Output) -> list[str]:
    """Set aside the shards of listing and ledger that do not say which requests they hold; return their paths."""
    found = []
    for folder, columns, schema in ((output.sources, None, IDENTITY), (output.requests, OUTCOME, LEDGER)):
        for file in sorted(folder.glob("*.parquet")):
            try:
                read_shard(file, columns, schema)
            except DamagedShard as damage:
                found.append(set_aside(damage))
    return found


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
    before = set(output.sources.glob("*.parquet"))
    kept = write_shard(output.sources, table, [str(row) for row in table.to_pylist()])
    for file in before - {kept}:
        file.unlink()


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
            write_shard(self.output.requests, pa.Table.from_pylist(asked, LEDGER), [f"{row['key']}/{row['attempt']}" for row in asked])
        write_sources(self.output, pa.Table.from_pylist(self.rows, IDENTITY))
        self.rows, self.written_at = [], time.monotonic()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
