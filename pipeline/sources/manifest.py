"""A manifest file -> the paths it lists and its other columns. Knows not whether the paths exist.

A `.txt` has one path a line. A `.csv`, `.jsonl` or `.parquet` has a column `path`; its other columns travel with the
documents into the records, a CSV's as text (a customer number 0042 stays 0042), the others' in their own types.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SourceError

PATH = "path"
OURS = ("source", "size_bytes", "version")

Columns = dict[str, list[Any]]
Manifest = tuple[list[str], dict[str, pa.Array]]
"""Paths, and the other columns as Arrow arrays of the same length."""


def read_manifest(path: str) -> Manifest:
    """Return what a manifest lists. Raises SourceError that names the file and the line, row or column."""
    try:
        names, columns = READERS[find_suffix(path)](path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from None
    for row, name in enumerate(names, 1):
        if not isinstance(name, str) or not name:
            raise SourceError(f"{path}, row {row}: `{PATH}` is {name!r}; it must be a path")
    for name in columns:
        if not name or name.startswith("_") or name in OURS:
            raise SourceError(f"{path}: a column may not be called {name!r}: names with `_` and {', '.join(OURS)} are taken")
    return names, {name: make_arrow_column(values, f"{path}: column {name!r}") for name, values in columns.items()}


def find_suffix(path: str) -> str:
    """Return a path's ending as the readers know it."""
    return os.path.splitext(path)[1].lower()


def read_txt(path: str) -> tuple[list[str], Columns]:
    """Read one path a line; empty lines are left out. Bytes that are not UTF-8 stay what they are."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        return [name for line in file if (name := line.rstrip("\r\n"))], {}


def read_csv(path: str) -> tuple[list[str], Columns]:
    """Read a comma-separated table with a header; an empty cell is null."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if PATH not in header or len(set(header)) < len(header):
                raise SourceError(f"{path}: the first line must name a column `{PATH}`, and each column once; found {header}")
            rows = []
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise SourceError(f"{path}, line {reader.line_num}: {len(cells)} cells under {len(header)} columns")
                if cells:
                    rows.append([cell or None for cell in cells])
        except csv.Error as error:
            raise SourceError(f"{path}, line {reader.line_num}: {error}") from None
    return split_columns(dict(zip(header, map(list, zip(*rows, strict=True)), strict=False)))


def read_jsonl(path: str) -> tuple[list[str], Columns]:
    """Read one JSON object a line; a key that a line lacks is null."""
    columns: Columns = {PATH: []}
    with open(path, encoding="utf-8-sig") as file:
        for row, (number, item) in enumerate(iterate_json_objects(path, file)):
            if PATH not in item:
                raise SourceError(f"{path}, line {number}: no key `{PATH}`; found {sorted(item)}")
            for name in item:
                columns.setdefault(name, [None] * row)
            for name, values in columns.items():
                values.append(item.get(name))
    return split_columns(columns)


def iterate_json_objects(path: str, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON lines file with their line numbers."""
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                item = json.loads(line)
                if not isinstance(item, dict):
                    raise SourceError(f"{path}, line {number}: found {line.strip()[:40]!r}; each line must be a JSON object")
                yield number, item
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}, line {number}: no JSON in UTF-8: {error}") from None


def read_parquet(path: str) -> tuple[list[str], Columns]:
    """Read a Parquet file."""
    try:
        table = pq.ParquetFile(path).read()
    except pa.ArrowException as error:
        raise SourceError(f"{path} is no Parquet file that can be read: {error}") from None
    if PATH not in table.column_names:
        raise SourceError(f"{path}: no column `{PATH}`; found {table.column_names}")
    return table[PATH].to_pylist(), {name: table[name] for name in table.column_names if name != PATH}


def split_columns(columns: Columns) -> tuple[list[str], Columns]:
    """Return the column of paths, and the others."""
    return columns.pop(PATH, []), columns


def make_arrow_column(values: Any, what: str) -> Any:
    """Return a column in Arrow; one of nulls alone is text, so that the next manifest may fill it."""
    if isinstance(values, pa.ChunkedArray):
        return values
    try:
        array = pa.array(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise SourceError(f"{what} has no single type: {error}") from None
    return array.cast(pa.string()) if pa.types.is_null(array.type) else array


READERS: dict[str, Callable[[str], tuple[list[str], Columns]]] = {
    ".txt": read_txt,
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
