"""Truth: files of true values in, one `TruthRow` per document out, with the names by which records are found.

    truth/invoice-01.json                     {"total": 19.99}                                name invoice-01, or invoice-01.pdf
    truth.jsonl                               {"source": "invoice-01.pdf", "total": 19.99}
    truth.csv                                 source,total↵invoice-01.pdf,19.99
    truth.parquet, or a folder of such files  for example the records of a run, corrected

A key that no document has is a field without truth: it is not scored. A key that only some have is null in the others.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import JobError
from pipeline.schema import parse_json
from pipeline.schema.arrow import ArrowPlan
from pipeline.schema.arrow_values import Column, convert_to_json, make_json_value
from pipeline.score.cells import list_labelled

OPTION = "--truth"
ALLOWED = "allowed are a folder of JSON files, one for each document, and a .jsonl, .csv or .parquet file with `source`"
MAX_MISFITS = 3


@dataclass(frozen=True)
class TruthRow:
    """The true values of one document or page, as JSON values."""

    name: str
    """The document's path, or the end of it."""
    page: int | None
    values: dict[str, Any]
    place: str
    """Where it was read, for messages."""
    is_stem: bool = False
    """The name may lack the document's ending."""


@dataclass(frozen=True)
class Truth:
    """All true values of a place, typed as the records are."""

    rows: list[TruthRow]
    typed: list[dict[str, Any]]
    """The rows of `ArrowPlan.schema`, in the same order."""
    labelled: frozenset[str]
    """Fields that at least one row has."""
    unknown: list[str]
    """Keys that the schema does not have."""


def load_truth(place: Path, plan: ArrowPlan, per_page: bool) -> Truth:
    """Return the truth at a place. Raises JobError that names the file, the line or key, and what is allowed."""
    rows = list(read_truth_rows(place, plan.root, per_page))
    if not rows:
        raise JobError(f"{place} has no true values: {ALLOWED}", place, OPTION)
    unknown = {key for row in rows for key in row.values} - plan.root.fields.keys()
    known = [{key: value for key, value in row.values.items() if key not in unknown} for row in rows]
    if all(not values for values in known):
        names = ", ".join(plan.schema.names)
        raise JobError(
            f"{place} has none of the schema's properties: it has {', '.join(sorted(unknown))}; allowed are {names}", place, OPTION
        )
    typed = []
    for row, values in zip(rows, known, strict=True):
        columns, misfits = plan.build_row(values)
        if misfits:
            more = f"; {len(misfits) - MAX_MISFITS} more" if len(misfits) > MAX_MISFITS else ""
            raise JobError(f"{row.place} does not fit the schema: {'; '.join(misfits[:MAX_MISFITS])}{more}", place, OPTION)
        typed.append(columns)
    exact = pa.Table.from_pylist(typed, plan.schema).to_pylist()  # the types that records are read with
    return Truth(rows, exact, frozenset(list_labelled(plan.root, known)), sorted(key for key in unknown if not key.startswith("_")))


def read_truth_rows(place: Path, root: Column, per_page: bool) -> Iterator[TruthRow]:
    """Yield the rows of a file or folder."""
    if place.is_dir():
        shards = sorted(place.glob("*.parquet"))
        if shards:
            for shard in shards:
                yield from read_parquet_rows(shard, root, per_page)
        else:
            for file in sorted(place.rglob("*.json")):
                yield from read_json_document(file, place, root, per_page)
        return
    readers = {".jsonl": read_json_lines, ".ndjson": read_json_lines, ".csv": read_csv_rows, ".parquet": read_parquet_rows}
    if not place.is_file():
        raise JobError(f"{place} does not exist: {ALLOWED}", place, OPTION)
    if place.suffix.lower() not in readers:
        raise JobError(f"{place} ends in {place.suffix or 'nothing'}: {ALLOWED}", place, OPTION)
    yield from readers[place.suffix.lower()](place, root, per_page)


def read_json_document(file: Path, folder: Path, root: Column, per_page: bool) -> Iterator[TruthRow]:
    """Yield the row of the one document that a JSON file is named like, or that its `source` names."""
    values = parse_object(read_file_text(file), str(file), file)
    if has_source(values, root):
        yield make_truth_row(values, root, per_page, str(file), file)
    else:
        name = file.relative_to(folder).with_suffix("").as_posix()
        yield make_truth_row({"_source": name, **values}, root, per_page, str(file), file, is_stem=True)


def read_json_lines(file: Path, root: Column, per_page: bool) -> Iterator[TruthRow]:
    for number, line in enumerate(read_file_text(file).split("\n"), 1):
        if line.strip():
            place = f"{file}, line {number},"
            yield make_truth_row(parse_object(line, place, file), root, per_page, place, file)


def read_csv_rows(file: Path, root: Column, per_page: bool) -> Iterator[TruthRow]:
    """Yield the rows of a CSV file. An empty cell is null; lists, objects, numbers and booleans are read as JSON."""
    rows = csv.DictReader(read_file_text(file).splitlines(keepends=True), strict=True)
    try:
        for row in rows:
            place = f"{file}, line {rows.line_num},"
            if None in row or None in row.values():
                raise JobError(f"{place} has not as many cells as the first line", file, OPTION)
            values = {name: parse_cell(root.fields.get(name), text, f"{place} column {name}", file) for name, text in row.items()}
            yield make_truth_row(values, root, per_page, place, file)
    except csv.Error as error:
        raise JobError(f"{file}, line {rows.line_num}, is not CSV: {error}", file, OPTION) from None


def read_parquet_rows(file: Path, root: Column, per_page: bool) -> Iterator[TruthRow]:
    try:
        table = pq.read_table(file, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise JobError(f"cannot read {file}: {' '.join(str(error).split())[:120]}", file, OPTION) from None
    for number, row in enumerate(table.to_pylist(), 1):
        place = f"{file}, row {number},"
        values = {name: make_json_value(root.fields.get(name), value) for name, value in row.items()}
        yield make_truth_row(values, root, per_page, place, file)


def make_truth_row(values: dict[str, Any], root: Column, per_page: bool, place: str, file: Path, is_stem: bool = False) -> TruthRow:
    """Return a row without the keys that say which document it is about.

    These are `_source` and `_page`, as in records, or `source` and `page` where the schema has no such properties.
    """
    if not has_source(values, root):
        raise JobError(f"{place} has no `source`: name the document that it is about", file, OPTION)
    rest = dict(values)
    found = {key: rest.pop(f"_{key}" if f"_{key}" in rest else key, None) for key in ("source", *["page"] * per_page)}
    name, page = found["source"], found.get("page")
    if not isinstance(name, str) or not name:
        raise JobError(f"{place} has the source {name!r}: it must be the document's path or file name", file, OPTION)
    if per_page:
        try:
            page = int(page)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise JobError(
                f"{place} has the page {page!r}: the records are one for each page, so that it must be a number", file, OPTION
            ) from None
    return TruthRow(name.removeprefix("./"), page, rest, place, is_stem)


def has_source(values: dict[str, Any], root: Column) -> bool:
    return "_source" in values or ("source" in values and "source" not in root.fields)


def read_file_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise JobError(f"cannot read {file}: {error}", file, OPTION) from None


def parse_object(text: str, place: str, file: Path) -> dict[str, Any]:
    try:
        values = parse_json(text)
    except ValueError as error:
        raise JobError(f"{place} is not JSON: {error}", file, OPTION) from None
    if not isinstance(values, dict):
        raise JobError(f"{place} is not a JSON object", file, OPTION)
    return values


def parse_cell(part: Column | None, text: str, place: str, file: Path) -> Any:
    """Return a cell of a CSV file as a JSON value."""
    if text == "":
        return None
    if part is None or is_text_column(part):
        return text
    try:
        return parse_json(text.lower() if pa.types.is_boolean(part.type) else text)
    except ValueError:
        raise JobError(f"{place} is {text[:80]!r}: write it as JSON does, as in 1234.5, true or [1, 2]", file, OPTION) from None


def is_text_column(part: Column) -> bool:
    """Say whether the JSON values of a column are strings."""
    if part.convert is None or part.convert is convert_to_json:
        return False
    return any(is_kind(part.type) for is_kind in (pa.types.is_string, pa.types.is_dictionary, pa.types.is_date, pa.types.is_timestamp))


class SourceIndex:
    """The sources of an output by the ends of their paths."""

    def __init__(self, sources: Iterable[str]) -> None:
        self.whole = set(sources)
        self.ends: dict[str, list[str]] = {}
        self.stems: dict[str, list[str]] = {}
        for source in sorted(self.whole):
            parts = source.split("/")
            for start in range(len(parts)):
                end = "/".join(parts[start:])
                self.ends.setdefault(end, []).append(source)
                if (ending := Path(parts[-1]).suffix).lower() != ".json":  # the truth itself, which a run over its folder lists as well
                    self.stems.setdefault(end.removesuffix(ending), []).append(source)

    def find_sources(self, name: str, is_stem: bool = False) -> list[str]:
        """Return the sources that a name can mean: itself, or else those with the longest common end, one path component at least."""
        if name in self.whole:
            return [name]
        parts = name.split("/")
        for start in range(len(parts)):
            end = "/".join(parts[start:])
            if found := self.ends.get(end) or (self.stems.get(end) if is_stem else None):
                return found
        return []
