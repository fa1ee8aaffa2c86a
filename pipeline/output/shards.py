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
from collections.abc import Iterable, Sequence
from contextlib import suppress

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DamagedShard, RunError
from pipeline.output import SHARD_SUFFIX, Output
from pipeline.storage import store
from pipeline.storage.location import split_location
from pipeline.storage.object_store import StoreUnreachable
from pipeline.storage.store import Store

MAX_LISTINGS = 5
"""So often a folder is listed anew when shards vanish while they are read: somebody gathers them into larger ones."""


def write_shard(folder: Store, table: pa.Table, keys: Iterable[str], group_rows: int | None = None) -> str:
    """Write a table as one Parquet file named from its rows' keys; return its name."""
    name = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:24] + SHARD_SUFFIX
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=group_rows, compression="zstd", write_page_checksum=True)
    folder.put(name, buffer.getvalue().to_pybytes())
    return name


def read_shards(folder: Store, columns: Sequence[str] | None, schema: pa.Schema, wanted: pc.Expression | None = None) -> pa.Table:
    """Return all rows of a folder's shards, in the order of their names.

    Raises DamagedShard, also where a checksum says that what is read is not what was written.
    """
    found = read_each_shard(folder, columns, schema, wanted)
    for damage in found:
        if isinstance(damage, DamagedShard):
            raise damage
    if not found:
        return schema.empty_table().select(columns or schema.names)
    return pa.concat_tables(found, promote_options="permissive")


def read_each_shard(
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

    for _ in range(MAX_LISTINGS):
        with suppress(FileNotFoundError):
            return store.map_concurrently(read, folder.list_names(SHARD_SUFFIX).items())
    raise RunError(f"the shards in {folder} come and go while they are read: let no other run write there, and try again")


def read_shard(
    folder: Store, name: str, size_bytes: int, columns: Sequence[str] | None, schema: pa.Schema, wanted: pc.Expression | None = None
) -> pa.Table:
    """Return the rows of one shard. Raises DamagedShard, FileNotFoundError, or RunError where nothing can be said of it."""
    file = f"{folder / name}"
    try:
        content = folder.open_file(name, size_bytes)
        table = pq.read_table(content, columns=columns, filters=wanted, partitioning=None, page_checksum_verification=True)
    except FileNotFoundError:
        raise
    except StoreUnreachable as error:
        raise store.make_run_error(f"read {file}", error) from None
    except (OSError, pa.ArrowException) as error:
        raise DamagedShard(file, " ".join(str(error).split())[:120]) from None
    if missing := {*(columns or schema.names)} - {*table.column_names}:
        raise DamagedShard(file, f"it lacks the columns {', '.join(sorted(missing))}")
    return table


def set_aside_shard(output: Output, damage: DamagedShard) -> str:
    """Put a damaged shard out of sight, beside the others, for someone who wants to look at it; return its place."""
    folder, name = split_location(type(output.path)(damage.file))
    store.open_store(folder).rename(name, f".{name}.damaged")
    return damage.file
