"""Shapes of the records: a table with lists and structs in, flat tables out.

    _source  total  line_items                        explode_table(…, "line_items")
    a.pdf    19.99  [{what: tea, price: 4.99}, …]     _source  total  _item  line_items.what  line_items.price
    b.pdf    null   []                                a.pdf    19.99  1      tea              4.99
                                                      a.pdf    19.99  2      milk             15.00
                                                      b.pdf    null   null   null             null

    split_tables(…)   records: _source  total         line_items: _source  _item  what  price

`_item` is an item's number in its list, from 1. Inside another array `_item_of_NAME` are the numbers of the items that contain it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import JobError

ITEM = "_item"
CHUNK_ROWS = 10_000
KEYS = ("_source", "_page")
"""The columns by which the rows of two tables belong together."""


def list_arrays(table: pa.Table | pa.Schema) -> list[str]:
    """Return the dotted names of a schema's arrays, each after those that contain it; those of provenance columns are left out."""
    schema = table if isinstance(table, pa.Schema) else table.schema
    return [name for field in schema if not field.name.startswith("_") for name in walk_arrays(field.name, field.type)]


def walk_arrays(name: str, kind: pa.DataType) -> Iterator[str]:
    """Yield the dotted names of the arrays in a column."""
    if pa.types.is_list(kind):
        yield name
        kind = kind.value_type
    if pa.types.is_struct(kind):
        for index in range(kind.num_fields):
            inner = kind.field(index)
            yield from walk_arrays(f"{name}.{inner.name}", inner.type)


def flatten_structs(table: pa.Table) -> pa.Table:
    """Return a table whose structs are columns with dotted names."""
    while any(pa.types.is_struct(kind) for kind in table.schema.types):
        table = table.flatten()
    return table


def explode_table(table: pa.Table, array: str) -> pa.Table:
    """Return a flat table with a row for each item of an array; a list without items keeps its row. Raises JobError for no array."""
    arrays = list_arrays(table)
    if array not in arrays:
        allowed = f"allowed are {', '.join(arrays)}" if arrays else "its schema has none"
        raise JobError(f"there is no array {array!r} in these records: {allowed}", key="explode")
    for name in [outer for outer in arrays if array == outer or array.startswith(f"{outer}.")]:
        number = ITEM if name == array else f"{ITEM}_of_{name}"
        batches = flatten_structs(table).to_batches(max_chunksize=CHUNK_ROWS)
        table = pa.concat_tables([explode_batch(pa.Table.from_batches([batch]), name, number) for batch in batches])
    return flatten_structs(table)


def explode_batch(table: pa.Table, name: str, number: str) -> pa.Table:
    """Return a row for each item of the list column `name`, its number in a column before it."""
    lists = table[name].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    counts = np.maximum(lengths, 1)
    rows = np.repeat(np.arange(len(lengths)), counts)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_empty = np.repeat(lengths == 0, counts)
    item = np.repeat(np.cumsum(lengths) - lengths, counts) + place
    taken = table.take(pa.array(rows))
    at = taken.column_names.index(name)
    taken = taken.set_column(at, name, pc.list_flatten(lists).take(pa.array(item, mask=is_empty)))
    return taken.add_column(at, pa.field(number, pa.int32()), pa.array(place + 1, pa.int32(), mask=is_empty))


def split_tables(table: pa.Table) -> dict[str, pa.Table]:
    """Return the records without their arrays, and a table for each array by its dotted name; all are flat."""
    arrays = list_arrays(table)
    flat = flatten_structs(table)
    keys = [name for name in KEYS if name in flat.column_names]
    found = {"records": flat.select([name for name in flat.column_names if name not in arrays])}
    for array in arrays:
        outer = [name for name in arrays if array.startswith(f"{name}.")]
        first = (outer or [array])[0]
        base = table.select([*keys, first.partition(".")[0]]) if first.partition(".")[0] in table.column_names else table
        items = explode_table(base, array)
        items = items.filter(pc.is_valid(items[ITEM]))
        columns = {name: name for name in (*keys, *(f"{ITEM}_of_{name}" for name in outer), ITEM)}
        own = {name: name.removeprefix(f"{array}.") for name in items.column_names if name.startswith(f"{array}.")}
        columns |= {name: short for name, short in own.items() if name not in arrays} or {array: "value"}
        found[array] = items.select(list(columns)).rename_columns(list(columns.values()))
    return found
