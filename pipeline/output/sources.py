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

from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.output import SHARD_SUFFIX, Output
from pipeline.output.shards import read_shards, write_shard

SOURCE_SCHEMA = pa.schema(
    [("source", pa.string()), ("size_bytes", pa.int64()), ("version", pa.string()), ("doc_id", pa.string()), ("page_count", pa.int32())]
)
"""The columns of `sources/` that every listing has; the manifest's own follow."""


def write_sources(output: Output, table: pa.Table) -> None:
    """Add rows to the listing."""
    if table.num_rows:
        write_shard(output.sources, table, [str(row) for row in table.to_pylist()])


def read_sources(output: Output) -> pa.Table:
    """Return one row per source: as it was listed, completed by what a later row found out about it."""
    return complete_sources(read_shards(output.sources, None, SOURCE_SCHEMA))


def complete_sources(table: pa.Table) -> pa.Table:
    """Return one row of each source; a manifest's columns and a page count need not stand in the same row before."""
    known = select_one_per_source(table, pc.is_valid(table["page_count"]))
    extras = [name for name in table.column_names if name not in SOURCE_SCHEMA.names]
    if not extras:
        return known
    listed = select_one_per_source(table, reduce(pc.or_, (pc.is_valid(table[name]) for name in extras)))
    return pa.table([*known.select(SOURCE_SCHEMA.names), *listed.select(extras)], names=[*SOURCE_SCHEMA.names, *extras])


def select_one_per_source(table: pa.Table, better: pa.ChunkedArray) -> pa.Table:
    """Return a row of each source, by name; one that is marked as better, if there is one."""
    order = pc.sort_indices(table.append_column("_better", better), sort_keys=[("source", "ascending"), ("_better", "descending")])
    table = table.take(order)
    names = table["source"].to_pylist()
    return table.take(pa.array([row for row, name in enumerate(names) if not row or names[row - 1] != name], pa.int64()))


def replace_sources(output: Output, table: pa.Table) -> None:
    """Make the listing one shard of these rows."""
    before = output.sources.list_names(SHARD_SUFFIX).keys()
    kept = write_shard(output.sources, table, [str(row) for row in table.to_pylist()])
    output.sources.remove(before - {kept})
