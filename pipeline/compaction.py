"""Many small shards of an output folder -> few large ones, with the same rows. Knows nothing of what the rows are for.

A shard is written every few seconds, so that a kill costs little: a run of six days leaves 100,000 of them, and who resumes
or settles it opens each. The new shard is written first and the old ones are removed then: whatever ends this in between
leaves rows that stand in two shards, which every reader takes for one, and the next compaction removes them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.sink import IDENTITY, LEDGER, SUFFIX, Output, completed, read_shard, write_shard
from pipeline.store import Store, each

MOST_SHARDS = 64
"""So many small shards are left alone."""
FULL_BYTES = 16 * 2**20
"""Size that a large shard is given: about 100 MB in memory while it is made. One of half that size is left alone."""
ROWS_PER_GROUP = 4096
"""A large shard is sorted by doc_id and parted into groups: who settles a thousand documents reads one or two of them."""
KEY = ["key", "attempt"]


def compact(output: Output) -> int:
    """Gather the small shards of the ledger and of the listing, where there are many; return how many are gone.

    Raises DamagedShard, RunError. When shards are gone that were there a moment ago, somebody else does the same: nothing is done then.
    """
    try:
        return compact_ledger(output) + compact_sources(output)
    except FileNotFoundError:
        return 0


def compact_ledger(output: Output) -> int:
    """Gather the ledger's small shards, group by group."""
    sizes = output.requests.names(SUFFIX)
    small = {name: size for name, size in sizes.items() if size < FULL_BYTES // 2}
    if len(small) <= MOST_SHARDS:
        return 0
    large = [read_shard(output.requests, name, size, KEY, LEDGER) for name, size in sizes.items() if name not in small]
    known = pa.array([key for table in large for key in keys_of(table)], pa.string())
    return sum(gather(output.requests, group, known) for group in groups(small))


def groups(sizes: dict[str, int]) -> Iterator[dict[str, int]]:
    """Yield shards in groups that make a large one each."""
    group: dict[str, int] = {}
    for name, size in sizes.items():
        if sum(group.values()) + size > FULL_BYTES:
            yield group
            group = {}
        group[name] = size
    yield group


def gather(folder: Store, group: dict[str, int], known: pa.Array) -> int:
    """Write the rows of these shards, but those that are known, as one shard in their place; return how many fewer shards there are."""
    if len(group) < 2:
        return 0
    table = pa.concat_tables(rows_of(folder, group), promote_options="permissive").select(LEDGER.names)
    keys = keys_of(table)
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    new = pc.invert(pc.is_in(pa.array(list(first), pa.string()), value_set=known))
    rows = pa.array(list(first.values()), pa.int64()).filter(new)
    table = table.take(rows).sort_by([("doc_id", "ascending"), ("key", "ascending"), ("attempt", "ascending")])
    kept = {write_shard(folder, table, keys_of(table), ROWS_PER_GROUP)} if table.num_rows else set()
    folder.remove(group.keys() - kept)
    return len(group) - len(kept)


def rows_of(folder: Store, group: dict[str, int], schema: pa.Schema = LEDGER) -> list[pa.Table]:
    """Return all columns of some shards. Raises DamagedShard, and FileNotFoundError where one is gone."""
    return each(lambda name: read_shard(folder, name, group[name], None, schema), group)


def keys_of(table: pa.Table) -> list[str]:
    """Return what a ledger's shard is named from."""
    return [f"{key}/{attempt}" for key, attempt in zip(*(table[name].to_pylist() for name in KEY), strict=True)]


def compact_sources(output: Output) -> int:
    """Make the listing one shard."""
    sizes = output.sources.names(SUFFIX)
    if len(sizes) <= MOST_SHARDS:
        return 0
    table = completed(pa.concat_tables(rows_of(output.sources, sizes, IDENTITY), promote_options="permissive"))
    kept = write_shard(output.sources, table, [str(row) for row in table.to_pylist()])
    output.sources.remove(sizes.keys() - {kept})
    return len(sizes) - 1
