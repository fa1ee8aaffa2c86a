"""Manifest reader: a `.txt`, `.csv`, `.jsonl` or `.parquet` file in, its paths and its other columns out.

A `.txt` file has one path per line. The others have a column `path`; their remaining columns are copied into the records: those
of a CSV as text (a customer number 0042 stays 0042), those of JSON lines and Parquet in their own types. Whether the paths exist
is not checked here.
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

PATH_COLUMN = "path"
RESERVED_COLUMNS = ("source", "size_bytes", "version", "full_url")
"""The columns of a listing, which a manifest cannot have."""

Columns = dict[str, list[Any]]
Manifest = tuple[list[str], dict[str, pa.Array]]
"""The paths, and the other columns as Arrow arrays of the same length."""


def read_manifest(path: str) -> Manifest:
    """Return the paths and columns of a manifest. Raises SourceError that names the file and the line, row or column."""
    try:
        names, columns = READERS[find_suffix(path)](path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}", path) from None
    for row, name in enumerate(names, 1):
        if not isinstance(name, str) or not name:
            raise SourceError(f"{path}, row {row}: `{PATH_COLUMN}` is {name!r}; it must be a path", path)
    for name in columns:
        if not name or name.startswith("_") or name in RESERVED_COLUMNS:
            reserved = f"names that begin with `_` and {', '.join(RESERVED_COLUMNS)} are reserved"
            raise SourceError(f"{path}: a column may not be called {name!r}: {reserved}", path)
    return names, {name: make_arrow_column(values, f"{path}: column {name!r}") for name, values in columns.items()}


def find_suffix(path: str) -> str:
    """Return a path's suffix in lower case, as in `READERS`."""
    return os.path.splitext(path)[1].lower()


def read_txt(path: str) -> tuple[list[str], Columns]:
    """Read one path per line, without empty lines. Bytes that are not UTF-8 become surrogate escapes, as in file names."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        return [name for line in file if (name := line.rstrip("\r\n"))], {}


def read_csv(path: str) -> tuple[list[str], Columns]:
    """Read a comma-separated table with a header row; an empty cell is null."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if PATH_COLUMN not in header or len(set(header)) < len(header):
                raise SourceError(f"{path}: the first line must name a column `{PATH_COLUMN}`, and each column once; found {header}", path)
            rows = []
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise SourceError(f"{path}, line {reader.line_num}: {len(cells)} cells, but {len(header)} columns", path)
                if cells:
                    rows.append([cell or None for cell in cells])
        except csv.Error as error:
            raise SourceError(f"{path}, line {reader.line_num}: {error}", path) from None
    return split_columns(dict(zip(header, map(list, zip(*rows, strict=True)), strict=False)))


def read_jsonl(path: str) -> tuple[list[str], Columns]:
    """Read one JSON object per line; a key that is missing in a line is null."""
    columns: Columns = {PATH_COLUMN: []}
    with open(path, encoding="utf-8-sig") as file:
        for row, (number, item) in enumerate(iterate_json_objects(path, file)):
            if PATH_COLUMN not in item:
                raise SourceError(f"{path}, line {number}: no key `{PATH_COLUMN}`; found {sorted(item)}", path)
            for name in item:
                columns.setdefault(name, [None] * row)
            for name, values in columns.items():
                values.append(item.get(name))
    return split_columns(columns)


def iterate_json_objects(path: str, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON lines file with their line numbers, from 1. Raises SourceError."""
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                item = json.loads(line)
                if not isinstance(item, dict):
                    raise SourceError(f"{path}, line {number}: found {line.strip()[:40]!r}; each line must be a JSON object", path)
                yield number, item
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}, line {number}: not JSON in UTF-8: {error}", path) from None


def read_parquet(path: str) -> tuple[list[str], Columns]:
    """Read a Parquet file; its columns keep their types."""
    try:
        table = pq.ParquetFile(path).read()
    except pa.ArrowException as error:
        raise SourceError(f"{path} is not a readable Parquet file: {error}", path) from None
    if PATH_COLUMN not in table.column_names:
        raise SourceError(f"{path}: no column `{PATH_COLUMN}`; found {table.column_names}", path)
    return table[PATH_COLUMN].to_pylist(), {name: table[name] for name in table.column_names if name != PATH_COLUMN}


def split_columns(columns: Columns) -> tuple[list[str], Columns]:
    """Return the column of paths, and the other columns."""
    return columns.pop(PATH_COLUMN, []), columns


def make_arrow_column(values: Any, label: str) -> Any:
    """Return a column as an Arrow array. A column of nulls is text, so that another manifest's text column has the same type.

    Raises SourceError, which begins with `label`, when the values have different types.
    """
    if isinstance(values, pa.ChunkedArray):
        return values
    try:
        array = pa.array(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise SourceError(f"{label} has values of different types: {error}") from None
    return array.cast(pa.string()) if pa.types.is_null(array.type) else array


READERS: dict[str, Callable[[str], tuple[list[str], Columns]]] = {
    ".txt": read_txt,
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
