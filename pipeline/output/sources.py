"""List of sources (`sources/` of the output folder): every listed source, completed by the doc_id and
page count that were found when it was opened.

In: rows with some of the columns known. Out: one complete row per source. Two shards may hold rows of the same source, one with a
manifest's columns and one with the page count, until `replace_sources` writes them as one.
"""

from __future__ import annotations

from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.output import SHARD_SUFFIX, Output
from pipeline.output.shards import mark_first, read_shards, write_shard

SOURCE_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("size_bytes", pa.int64()),
        ("version", pa.string()),
        ("doc_id", pa.string()),
        ("page_count", pa.int32()),
        ("full_url", pa.string()),
    ]
)
"""The columns that every list of sources has; a manifest's extra columns follow them."""
ROW_GROUP_SIZE = 65_536
"""Rows that are encoded at a time: a long list takes less memory."""


def write_sources(output: Output, table: pa.Table) -> None:
    """Add a shard with these rows, if there are any."""
    if table.num_rows:
        write_shard(output.sources, table)


def read_sources(output: Output) -> pa.Table:
    """Return one row per source. Raises DamagedShard and RunError."""
    return complete_sources(read_shards(output.sources, None, SOURCE_SCHEMA))


def complete_sources(table: pa.Table) -> pa.Table:
    """Return one row per source, with the values of a row that has a page count and the extra columns of a row that has those."""
    if is_one_per_source(table):
        return table
    opened = select_one_per_source(table, pc.is_valid(table["page_count"]))
    extras = [name for name in table.column_names if name not in SOURCE_SCHEMA.names]
    if not extras:
        return opened
    listed = select_one_per_source(table, reduce(pc.or_, (pc.is_valid(table[name]) for name in extras)))
    return pa.table([*opened.select(SOURCE_SCHEMA.names), *listed.select(extras)], names=[*SOURCE_SCHEMA.names, *extras])


def is_one_per_source(table: pa.Table) -> bool:
    """Say whether a table is sorted by source and has each source once, as `replace_sources` writes it."""
    names = table["source"]
    return pc.all(pc.less(names.slice(0, max(0, len(names) - 1)), names.slice(1))).as_py() is not False


def select_one_per_source(table: pa.Table, is_preferred: pa.ChunkedArray) -> pa.Table:
    """Return one row per source, sorted by source; a preferred row, if the source has one."""
    marked = pa.table({"source": table["source"], "preferred": is_preferred})
    order = pc.sort_indices(marked, sort_keys=[("source", "ascending"), ("preferred", "descending")])
    return table.take(order.filter(mark_first(table["source"].take(order))))


def replace_sources(output: Output, table: pa.Table) -> None:
    """Replace all shards by one with these rows."""
    before = output.sources.list_names(SHARD_SUFFIX).keys()
    kept = write_shard(output.sources, table if is_one_per_source(table) else table.sort_by("source"), None, ROW_GROUP_SIZE)
    output.sources.remove(before - {kept})


def select_extra_columns(table: pa.Table) -> pa.Schema:
    """Return the manifest's own columns of a listing."""
    return pa.schema([field for field in table.schema if field.name not in SOURCE_SCHEMA.names])
