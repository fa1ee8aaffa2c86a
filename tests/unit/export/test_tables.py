"""Flat tables of nested records: one row for each item, or one table for each array."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import JobError
from pipeline.export.tables import explode_table, list_arrays, split_tables

RECORDS = pa.Table.from_pylist(
    [
        {"_source": "a", "who": {"name": "Ann"}, "tables": [{"title": "T", "rows": [["x", "y"], []]}, {"title": "U", "rows": None}]},
        {"_source": "b", "who": None, "tables": []},
        {"_source": "c", "who": {"name": None}, "tables": None},
    ],
    pa.schema(
        [
            ("who", pa.struct([("name", pa.string())])),
            ("tables", pa.list_(pa.struct([("title", pa.string()), ("rows", pa.list_(pa.list_(pa.string())))]))),
            ("_source", pa.string()),
            ("_errors", pa.list_(pa.string())),
        ]
    ),
)


def explode(array: str, *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in explode_table(RECORDS, array).select(list(columns)).to_pylist()]


def test_arrays_are_found_in_arrays() -> None:
    assert list_arrays(RECORDS) == ["tables", "tables.rows"]


def test_a_row_for_each_item_and_for_each_record_without_one() -> None:
    found = explode("tables", "_source", "who.name", "_item", "tables.title")
    assert found == [("a", "Ann", 1, "T"), ("a", "Ann", 2, "U"), ("b", None, None, None), ("c", None, None, None)]


def test_items_inside_items_have_both_numbers() -> None:
    found = explode("tables.rows", "_item_of_tables", "_item", "tables.rows")
    assert found == [(1, 1, ["x", "y"]), (1, 2, []), (2, None, None), (None, None, None), (None, None, None)]


def test_chunks_are_exploded_each_on_its_own() -> None:
    chunked = pa.concat_tables([RECORDS.slice(1, 1), RECORDS.slice(0, 1)])
    assert explode_table(chunked, "tables")["tables.title"].to_pylist() == [None, "T", "U"]


@pytest.mark.parametrize("array", ["who", "gone", "_errors"])
def test_what_is_no_array_of_the_schema_is_refused(array: str) -> None:
    with pytest.raises(JobError, match=rf"there is no array '{array}' in these records: allowed are tables, tables\.rows"):
        explode_table(RECORDS, array)


def test_each_array_is_a_table_of_its_own() -> None:
    found = split_tables(RECORDS)
    assert {name: table.column_names for name, table in found.items()} == {
        "records": ["who.name", "_source", "_errors"],
        "tables": ["_source", "_item", "title"],
        "tables.rows": ["_source", "_item_of_tables", "_item", "value"],
    }
    assert found["records"].num_rows == 3
    assert found["tables"].to_pylist() == [{"_source": "a", "_item": 1, "title": "T"}, {"_source": "a", "_item": 2, "title": "U"}]
    assert [row["value"] for row in found["tables.rows"].to_pylist()] == [["x", "y"], []]
