"""Parquet shards: tables in, files that are whole or absent out, and back.

A shard is named from its rows' keys, so that writing the same rows twice leaves one file. Damage, also a changed byte, is found
when a shard is read, by Parquet's checksums. What the rows mean is not looked at here.
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
from pipeline.storage.object_store import StoreUnreachable
from pipeline.storage.store import Store

LATER_COLUMNS = frozenset({"full_url", "page_failures", "_partial"})
"""Columns that 0.1.0 did not have: null where all columns of its shards are read."""
MAX_LISTINGS = 5
"""How often a folder is listed when shards vanish while they are read, because another run compacts them."""


def write_shard(folder: Store, table: pa.Table, keys: Iterable[str], row_group_size: int | None = None) -> str:
    """Write a table as one Parquet file named from its rows' keys; return its name. Raises RunError."""
    name = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:24] + SHARD_SUFFIX
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=row_group_size, compression="zstd", write_page_checksum=True)
    folder.put(name, buffer.getvalue().to_pybytes())
    return name


def read_shards(folder: Store, columns: Sequence[str] | None, schema: pa.Schema, row_filter: pc.Expression | None = None) -> pa.Table:
    """Return the rows of all shards of a folder, in the order of the shards' names; an empty table where there is none.

    Raises DamagedShard, also for a wrong checksum, and RunError.
    """
    found = read_each_shard(folder, columns, schema, row_filter)
    for damage in found:
        if isinstance(damage, DamagedShard):
            raise damage
    if not found:
        return schema.empty_table().select(columns or schema.names)
    return pa.concat_tables(found, promote_options="permissive")


def read_each_shard(
    folder: Store, columns: Sequence[str] | None, schema: pa.Schema, row_filter: pc.Expression | None = None
) -> list[pa.Table | DamagedShard]:
    """Return, for each shard of a folder in the order of their names, its rows or its DamagedShard.

    Raises RunError when the folder cannot be read.
    """

    def read(shard: tuple[str, int]) -> pa.Table | DamagedShard:
        try:
            return read_shard(folder, *shard, columns, schema, row_filter)
        except DamagedShard as damage:
            return damage

    for _ in range(MAX_LISTINGS):
        with suppress(FileNotFoundError):
            return store.map_concurrently(read, folder.list_names(SHARD_SUFFIX).items())
    raise RunError(f"the shards in {folder} keep changing while they are read: make sure that no other run writes there, and try again")


def read_shard(
    folder: Store, name: str, size_bytes: int, columns: Sequence[str] | None, schema: pa.Schema, row_filter: pc.Expression | None = None
) -> pa.Table:
    """Return the rows of one shard. Raises DamagedShard, FileNotFoundError, or RunError when its store is unreachable."""
    file = f"{folder / name}"
    try:
        content = folder.open_file(name, size_bytes)
        table = pq.read_table(content, columns=columns, filters=row_filter, partitioning=None, page_checksum_verification=True)
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


def set_aside_shard(output: Output, damage: DamagedShard) -> str:
    """Rename a damaged shard to `.NAME.damaged` in its folder, where no reader takes it for a shard; return its old path."""
    folder, _, name = damage.file.removeprefix(f"{output.root}/").partition("/")
    (output.root / folder).rename(name, f".{name}.damaged")
    return damage.file
