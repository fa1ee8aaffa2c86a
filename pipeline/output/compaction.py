"""Compaction: many small shards of the ledger and of the list of sources in, few large ones with the same rows out.

A shard is written every few seconds, so that a killed run loses little. A run of six days therefore leaves 100,000 shards, each of
which a resumed run and a settle pass open. The large shard is written before the small ones are removed: a crash in between leaves
rows in two shards, which every reader counts once and the next compaction removes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.output import SHARD_SUFFIX, Output
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.shards import read_shard, write_shard
from pipeline.output.sources import SOURCE_SCHEMA, complete_sources
from pipeline.storage.store import Store, map_concurrently

MAX_SMALL_SHARDS = 64
"""Up to this number, small shards are not compacted."""
TARGET_BYTES = 16 * 2**20
"""Size of a large shard; writing one takes about 100 MB of memory. A shard of half that size counts as large."""
ROW_GROUP_SIZE = 4096
"""Rows per row group of a large shard, which is sorted by doc_id: settling a thousand documents reads one or two row groups."""
KEY_COLUMNS = ["key", "attempt"]


def compact_shards(output: Output) -> int:
    """Compact the ledger and the list of sources where they have many small shards; return by how many shards they shrank.

    Does nothing more when a shard has vanished, because then another process compacts. Raises DamagedShard and RunError.
    """
    try:
        return compact_ledger(output) + compact_sources(output)
    except FileNotFoundError:
        return 0


def compact_ledger(output: Output) -> int:
    """Compact the ledger's small shards, group by group; return by how many shards it shrank."""
    sizes = output.requests.list_names(SHARD_SUFFIX)
    small = {name: size for name, size in sizes.items() if size < TARGET_BYTES // 2}
    if len(small) <= MAX_SMALL_SHARDS:
        return 0
    large = [read_shard(output.requests, name, size, KEY_COLUMNS, LEDGER_SCHEMA) for name, size in sizes.items() if name not in small]
    known = pa.array([key for table in large for key in list_shard_keys(table)], pa.string())
    return sum(merge_shards(output.requests, group, known) for group in group_shards(small))


def group_shards(sizes: dict[str, int]) -> Iterator[dict[str, int]]:
    """Yield groups of shards of at most `TARGET_BYTES` each, in the order of their names."""
    group: dict[str, int] = {}
    for name, size in sizes.items():
        if sum(group.values()) + size > TARGET_BYTES:
            yield group
            group = {}
        group[name] = size
    yield group


def merge_shards(folder: Store, group: dict[str, int], known: pa.Array) -> int:
    """Replace a group of shards by one without duplicate or known rows; return by how many shards the folder shrank.

    `known` are the keys of rows that large shards hold already.
    """
    if len(group) < 2:
        return 0
    table = pa.concat_tables(read_group(folder, group), promote_options="permissive").select(LEDGER_SCHEMA.names)
    keys = list_shard_keys(table)
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    is_new = pc.invert(pc.is_in(pa.array(list(first), pa.string()), value_set=known))
    rows = pa.array(list(first.values()), pa.int64()).filter(is_new)
    table = table.take(rows).sort_by([("doc_id", "ascending"), ("key", "ascending"), ("attempt", "ascending")])
    kept = {write_shard(folder, table, list_shard_keys(table), ROW_GROUP_SIZE)} if table.num_rows else set()
    folder.remove(group.keys() - kept)
    return len(group) - len(kept)


def read_group(folder: Store, group: dict[str, int], schema: pa.Schema = LEDGER_SCHEMA) -> list[pa.Table]:
    """Return all columns of the shards of a group. Raises DamagedShard, and FileNotFoundError for a shard that has vanished."""
    return map_concurrently(lambda name: read_shard(folder, name, group[name], None, schema), group)


def list_shard_keys(table: pa.Table) -> list[str]:
    """Return the keys from which a ledger's shard is named, `KEY/ATTEMPT` for each row."""
    return [f"{key}/{attempt}" for key, attempt in zip(*(table[name].to_pylist() for name in KEY_COLUMNS), strict=True)]


def compact_sources(output: Output) -> int:
    """Rewrite the list of sources as one shard; return by how many shards it shrank."""
    sizes = output.sources.list_names(SHARD_SUFFIX)
    if len(sizes) <= MAX_SMALL_SHARDS:
        return 0
    table = complete_sources(pa.concat_tables(read_group(output.sources, sizes, SOURCE_SCHEMA), promote_options="permissive"))
    kept = write_shard(output.sources, table, [str(row) for row in table.to_pylist()])
    output.sources.remove(sizes.keys() - {kept})
    return len(sizes) - 1
