"""Many small shards of an output folder -> few large ones, with the same rows. Knows nothing of what the rows are for.

A shard is written every few seconds, so that a kill costs little: a run of six days leaves 100,000 of them, and who resumes
or settles it opens each. The new shard is written first and the old ones are removed then: whatever ends this in between
leaves rows that stand in two shards, which every reader takes for one, and the next compaction removes them.
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

MOST_SHARDS = 64
"""So many small shards are left alone."""
FULL_BYTES = 16 * 2**20
"""Size that a large shard is given: about 100 MB in memory while it is made. One of half that size is left alone."""
ROWS_PER_GROUP = 4096
"""A large shard is sorted by doc_id and parted into groups: who settles a thousand documents reads one or two of them."""
KEY = ["key", "attempt"]


def compact_shards(output: Output) -> int:
    """Gather the small shards of the ledger and of the listing, where there are many; return how many are gone.

    Raises DamagedShard, RunError. When shards are gone that were there a moment ago, somebody else does the same: nothing is done then.
    """
    try:
        return compact_ledger(output) + compact_sources(output)
    except FileNotFoundError:
        return 0


def compact_ledger(output: Output) -> int:
    """Gather the ledger's small shards, group by group."""
    sizes = output.requests.list_names(SHARD_SUFFIX)
    small = {name: size for name, size in sizes.items() if size < FULL_BYTES // 2}
    if len(small) <= MOST_SHARDS:
        return 0
    large = [read_shard(output.requests, name, size, KEY, LEDGER_SCHEMA) for name, size in sizes.items() if name not in small]
    known = pa.array([key for table in large for key in list_shard_keys(table)], pa.string())
    return sum(merge_shards(output.requests, group, known) for group in group_shards(small))


def group_shards(sizes: dict[str, int]) -> Iterator[dict[str, int]]:
    """Yield shards in groups that make a large one each."""
    group: dict[str, int] = {}
    for name, size in sizes.items():
        if sum(group.values()) + size > FULL_BYTES:
            yield group
            group = {}
        group[name] = size
    yield group


def merge_shards(folder: Store, group: dict[str, int], known: pa.Array) -> int:
    """Write the rows of these shards, but those that are known, as one shard in their place; return how many fewer shards there are."""
    if len(group) < 2:
        return 0
    table = pa.concat_tables(read_group(folder, group), promote_options="permissive").select(LEDGER_SCHEMA.names)
    keys = list_shard_keys(table)
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    new = pc.invert(pc.is_in(pa.array(list(first), pa.string()), value_set=known))
    rows = pa.array(list(first.values()), pa.int64()).filter(new)
    table = table.take(rows).sort_by([("doc_id", "ascending"), ("key", "ascending"), ("attempt", "ascending")])
    kept = {write_shard(folder, table, list_shard_keys(table), ROWS_PER_GROUP)} if table.num_rows else set()
    folder.remove(group.keys() - kept)
    return len(group) - len(kept)


def read_group(folder: Store, group: dict[str, int], schema: pa.Schema = LEDGER_SCHEMA) -> list[pa.Table]:
    """Return all columns of some shards. Raises DamagedShard, and FileNotFoundError where one is gone."""
    return map_concurrently(lambda name: read_shard(folder, name, group[name], None, schema), group)


def list_shard_keys(table: pa.Table) -> list[str]:
    """Return what a ledger's shard is named from."""
    return [f"{key}/{attempt}" for key, attempt in zip(*(table[name].to_pylist() for name in KEY), strict=True)]


def compact_sources(output: Output) -> int:
    """Make the listing one shard."""
    sizes = output.sources.list_names(SHARD_SUFFIX)
    if len(sizes) <= MOST_SHARDS:
        return 0
    table = complete_sources(pa.concat_tables(read_group(output.sources, sizes, SOURCE_SCHEMA), promote_options="permissive"))
    kept = write_shard(output.sources, table, [str(row) for row in table.to_pylist()])
    output.sources.remove(sizes.keys() - {kept})
    return len(sizes) - 1
