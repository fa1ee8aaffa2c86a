"""Parquet shards: tables in, files that are whole or absent out, and back.

A shard is named from its rows' keys or from its bytes, so that writing the same rows twice leaves one file. Damage, also a changed
byte, is found when a shard is read, by Parquet's checksums. What the rows mean is not looked at here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DamagedShard, RunError
from pipeline.output import SHARD_SUFFIX, Output
from pipeline.storage import store
from pipeline.storage.object_store import MAX_STREAMS, StoreUnreachable
from pipeline.storage.store import Store

LATER_COLUMNS = frozenset({"full_url", "page_failures", "_partial", "_rules", "_corrected", "_evidence", "_unwitnessed", "_alerts"})
LATER_COLUMNS |= {"_confidence", "_least_confidence", "rule", "_asked_again", "_page_kind", "asked_values", "_reread"}
"""Columns that 0.1.0 did not have: null in what is read of its shards."""
MAX_LISTINGS = 5
"""How often a folder is listed when shards vanish while they are read, because another run compacts them."""

Converted = TypeVar("Converted")


@dataclass(frozen=True)
class Selection:
    """Which shards and rows of a folder are read: those that may hold a wanted row, and of these the wanted rows."""

    rows: pc.Expression
    holds: Callable[[str], bool]
    """Says of a shard's name whether the shard may hold such a row."""
    listed: Mapping[str, int] | None = None
    """The folder's shards and their sizes, if they were listed before."""


def write_shard(
    folder: Store, table: pa.Table, keys: Iterable[str] | None = None, row_group_size: int | None = None, prefix: str = ""
) -> str:
    """Write a table as one Parquet file named from its rows' keys, or without them from its bytes; return its name. Raises RunError."""
    content = encode_shard(table, row_group_size)
    name = prefix + (name_shard(keys) if keys is not None else hashlib.sha256(content).hexdigest()[:24] + SHARD_SUFFIX)
    folder.put(name, content)
    return name


def mark_first(column: pa.ChunkedArray) -> pa.Array:
    """Return for each value of a sorted column whether it differs from the one before it."""
    values = column.combine_chunks()
    if not len(values):
        return pa.array([], pa.bool_())
    differs = pc.fill_null(pc.not_equal(values.slice(1), values.slice(0, len(values) - 1)), True)
    return pa.concat_arrays([pa.array([True]), differs])


def name_shard(keys: Iterable[str]) -> str:
    """Return the name of the shard of these rows, in any order."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:24] + SHARD_SUFFIX


def encode_shard(table: pa.Table, row_group_size: int | None = None) -> bytes:
    """Return a table as the bytes of a Parquet file; the same for the same rows."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=row_group_size, compression="zstd", write_page_checksum=True)
    content: bytes = buffer.getvalue().to_pybytes()
    return content


def read_shards(folder: Store, columns: Sequence[str] | None, schema: pa.Schema, selection: Selection | None = None) -> pa.Table:
    """Return the rows of a folder's shards, in the order of the shards' names; an empty table where there is none.

    Raises DamagedShard, also for a wrong checksum, and RunError.
    """
    found = read_each_shard(folder, columns, schema, selection)
    for damage in found:
        if isinstance(damage, DamagedShard):
            raise damage
    if not found:
        return schema.empty_table().select(columns or schema.names)
    return pa.concat_tables(found, promote_options="permissive")


def read_each_shard(
    folder: Store,
    columns: Sequence[str] | None,
    schema: pa.Schema,
    selection: Selection | None = None,
    convert: Callable[[pa.Table], Converted] = lambda table: table,
) -> list[Converted | DamagedShard]:
    """Return, for each selected shard of a folder in the order of their names, what its rows are converted to, or its DamagedShard.

    Raises RunError when the folder cannot be read.
    """

    def read(shard: tuple[str, int]) -> Converted | DamagedShard:
        try:
            return convert(read_shard(folder, *shard, columns, schema, selection.rows if selection else None))
        except DamagedShard as damage:
            return damage

    known = selection.listed if selection else None
    for _ in range(MAX_LISTINGS):
        sizes = folder.list_names(SHARD_SUFFIX) if known is None else known
        known = None
        with suppress(FileNotFoundError):
            shards = [shard for shard in sizes.items() if not selection or selection.holds(shard[0])]
            return store.map_concurrently(read, shards, store.MAX_FILES if isinstance(folder, store.FolderStore) else MAX_STREAMS)
    raise RunError(f"the shards in {folder} keep changing while they are read: make sure that no other run writes there, and try again")


def read_shard(
    folder: Store, name: str, size_bytes: int, columns: Sequence[str] | None, schema: pa.Schema, row_filter: pc.Expression | None = None
) -> pa.Table:
    """Return the rows of one shard. Raises DamagedShard, FileNotFoundError, or RunError when its store is unreachable."""
    file = f"{folder / name}"
    try:
        try:
            table = read_shard_file(folder.open_file(name, size_bytes), columns, row_filter)
        except pa.ArrowInvalid:  # damaged, or of an older version without one of the columns
            if not columns or LATER_COLUMNS.isdisjoint(columns):
                raise
            table = read_shard_file(folder.open_file(name, size_bytes), None, row_filter)
            table = table.select([name for name in columns if name in table.column_names])
    except FileNotFoundError:
        raise
    except StoreUnreachable as error:
        raise store.make_run_error(f"read {file}", error) from None
    except (OSError, pa.ArrowException) as error:
        raise DamagedShard(file, " ".join(str(error).split())[:120]) from None
    missing = {*(columns or schema.names)} - {*table.column_names}
    if missing - LATER_COLUMNS:
        raise DamagedShard(file, f"it lacks the columns {', '.join(sorted(missing - LATER_COLUMNS))}")
    for name in missing:
        table = table.append_column(schema.field(name), pa.nulls(table.num_rows, schema.field(name).type))
    return table


def read_shard_file(content: Any, columns: Sequence[str] | None, row_filter: pc.Expression | None) -> pa.Table:
    """Return the rows of an opened Parquet file. Raises ArrowException, also for a column that it does not have, and OSError."""
    return pq.read_table(content, columns=columns, filters=row_filter, partitioning=None, page_checksum_verification=True)


def read_intact(output: Output, damaged: list[str], read: Callable[[], Converted]) -> Converted:
    """Return what a function reads of an output; for a damaged shard, set that aside, add its old path to `damaged`, and read again."""
    while True:
        try:
            return read()
        except DamagedShard as damage:
            damaged.append(set_aside_shard(output, damage))


def set_aside_shard(output: Output, damage: DamagedShard) -> str:
    """Rename a damaged shard to `.NAME.damaged` in its folder, where no reader takes it for a shard; return its old path."""
    folder, _, name = damage.file.removeprefix(f"{output.root}/").partition("/")
    (output.root / folder).rename(name, f".{name}.damaged")
    return damage.file
