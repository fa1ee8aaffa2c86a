"""Compaction: many shards of a ledger, each with rows of any document, in; one shard for each range of doc_ids with the same rows out.

A shard is written every few seconds, so that a killed run loses little. A run of six days therefore leaves 100,000 shards, each of
which a resumed run and a settle pass open. A ledger of more than one large shard is sorted into partitions (`partitions.py`), so that
reading a range of doc_ids opens one or two shards, however many there are:

    small ones with any rows  ->  large ones with any rows, whose sizes say how many partitions there shall be
    any rows  ->  16 partitions of 4 bits  ->  256 of 8 bits  ->  …     every pass reads and writes each row once
    shards of one partition  ->  one

What is to be replaced is removed when what replaces it is written: a crash in between leaves rows in two shards, which every reader
counts once and the next compaction removes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from itertools import pairwise

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.output import SHARD_SUFFIX, Output
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.partitions import Partition, parse_partition
from pipeline.output.shards import mark_first, read_shard, write_shard
from pipeline.output.sources import SOURCE_SCHEMA, complete_sources
from pipeline.output.words import WORD_KEYS, WORDS_SCHEMA
from pipeline.storage.store import Store, map_concurrently

MAX_SMALL_SHARDS = 8
"""Up to this number, shards with rows of any document are not compacted: everyone who wants a range of doc_ids opens them all."""
TARGET_BYTES = 16 * 2**20
"""Most that shards with rows of any document have together, and about what a partition has; one takes about 100 MB of memory."""
MAX_MERGED_BYTES = 4 * TARGET_BYTES
"""Shards of one partition are merged up to this size: rows that are in two of them are among those read together."""
BITS_PER_PASS = 4
ROW_GROUP_SIZE = 1024
"""Rows per row group of a compacted shard, which is sorted by doc_id: settling a thousand documents reads one to three row groups."""
KEY_COLUMNS = ["key", "attempt"]


def compact_shards(output: Output) -> int:
    """Compact the ledger and the list of sources where they have many small shards; return by how many shards they shrank.

    Does nothing more when a shard has vanished, because then another process compacts. Raises DamagedShard and RunError.
    """
    try:
        compacted = compact_ledger(output.requests, LEDGER_SCHEMA, KEY_COLUMNS) + compact_ledger(output.words, WORDS_SCHEMA, WORD_KEYS)
        return compacted + compact_sources(output)
    except FileNotFoundError:
        return 0


def compact_ledger(folder: Store, schema: pa.Schema, keys: Sequence[str]) -> int:
    """Compact a ledger, of requests or of OCR, where it is due, and finish what a killed process began. Rows with the same `keys` are one.

    Returns by how many shards it shrank.
    """
    replace = partial(replace_shards, folder, schema, keys)
    before = folder.list_names(SHARD_SUFFIX)
    unsorted = {name: size for name, size in before.items() if parse_partition(name) == Partition()}
    bits = max((parse_partition(name).bits for name in before), default=0)
    for group in group_shards(unsorted, TARGET_BYTES):
        if len(group) > MAX_SMALL_SHARDS:
            replace(group, Partition(), 0)
    sizes = folder.list_names(SHARD_SUFFIX)
    if sum(size for name, size in sizes.items() if parse_partition(name) == Partition()) > TARGET_BYTES:
        bits = max(bits, math.ceil(math.log2(sum(sizes.values()) / TARGET_BYTES)))
        sort_shards(folder, replace, bits, from_bits=0)
    sort_shards(folder, replace, bits, from_bits=1)
    for partition, sizes in list_partitions(folder).items():
        for group in group_shards(sizes, MAX_MERGED_BYTES):
            if partition != Partition() and len(group) > 1:
                replace(group, partition, partition.bits)
    return len(before) - len(folder.list_names(SHARD_SUFFIX))


def sort_shards(folder: Store, replace: Callable[[dict[str, int], Partition, int], None], bits: int, from_bits: int) -> None:
    """Sort the shards of partitions of `from_bits` bits or more into those of `bits` bits, a few bits in each pass."""
    while True:
        coarse = {one: sizes for one, sizes in list_partitions(folder).items() if from_bits <= one.bits < bits and not one.is_null}
        if not coarse:
            return
        for partition, sizes in coarse.items():
            for group in group_shards(sizes, TARGET_BYTES):
                replace(group, partition, min(partition.bits + BITS_PER_PASS, bits))


def list_partitions(folder: Store) -> dict[Partition, dict[str, int]]:
    """Return the names and sizes of each partition's shards, in order."""
    found: dict[Partition, dict[str, int]] = {}
    for name, size in folder.list_names(SHARD_SUFFIX).items():
        found.setdefault(parse_partition(name), {})[name] = size
    return found


def group_shards(sizes: Mapping[str, int], most_bytes: int) -> Iterator[dict[str, int]]:
    """Yield groups of shards of at most so many bytes each, or of one shard, in the order of their names."""
    group: dict[str, int] = {}
    for name, size in sizes.items():
        if group and sum(group.values()) + size > most_bytes:
            yield group
            group = {}
        group[name] = size
    if group:
        yield group


def replace_shards(folder: Store, schema: pa.Schema, keys: Sequence[str], group: dict[str, int], partition: Partition, bits: int) -> None:
    """Replace shards of a partition by one for each of its parts of so many bits, without duplicate rows and sorted by doc_id."""
    table = pa.concat_tables(read_group(folder, group, schema), promote_options="permissive").select(schema.names)
    order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in dict.fromkeys(["doc_id", *keys])])
    is_new = reduce(pc.or_, (mark_first(table[name].take(order)) for name in keys))
    table = table.take(order.filter(is_new))
    parts = cut_table(table, partition, bits) if bits > partition.bits else [(partition, table)]
    kept = {
        write_shard(folder, rows, None, ROW_GROUP_SIZE, part.prefix)
        for part, rows in parts  # one after another: each is encoded in memory
        if rows.num_rows
    }
    folder.remove(group.keys() - kept)


def cut_table(table: pa.Table, partition: Partition, bits: int) -> Iterator[tuple[Partition, pa.Table]]:
    """Yield the rows of each part of so many bits, given rows sorted by doc_id, and those without a doc_id, which come last."""
    doc_ids = table["doc_id"].slice(0, table.num_rows - table["doc_id"].null_count).to_pylist()
    parts = list(partition.list_parts(bits))
    starts = [0, *(bisect_left(doc_ids, part.first) for part in parts[1:]), len(doc_ids)]
    for part, (start, end) in zip(parts, pairwise(starts), strict=True):
        yield part, table.slice(start, end - start)
    yield Partition(is_null=True), table.slice(len(doc_ids))


def read_group(folder: Store, group: dict[str, int], schema: pa.Schema = LEDGER_SCHEMA) -> list[pa.Table]:
    """Return all columns of the shards of a group. Raises DamagedShard, and FileNotFoundError for a shard that has vanished."""
    return map_concurrently(lambda name: read_shard(folder, name, group[name], None, schema), group)


def compact_sources(output: Output) -> int:
    """Rewrite the list of sources as one shard; return by how many shards it shrank."""
    sizes = output.sources.list_names(SHARD_SUFFIX)
    if len(sizes) <= MAX_SMALL_SHARDS:
        return 0
    table = complete_sources(pa.concat_tables(read_group(output.sources, sizes, SOURCE_SCHEMA), promote_options="permissive"))
    kept = write_shard(output.sources, table)
    output.sources.remove(sizes.keys() - {kept})
    return len(sizes) - 1
