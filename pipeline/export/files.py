"""Files with an output's records: CSV, JSON lines, an Excel workbook or a DuckDB database.

Texts come from documents that anybody may have written. Where a spreadsheet would run one as a formula it is made harmless: in CSV by an
apostrophe before it, in a workbook by the cell's type.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa

from pipeline.errors import JobError
from pipeline.export.tables import explode_table, flatten_structs, split_tables
from pipeline.output.records import read_record_table
from pipeline.schema import dump_json
from pipeline.schema.arrow import ArrowPlan
from pipeline.schema.arrow_values import make_json_value

FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
"""How a text begins that a spreadsheet runs, also in full width. (OWASP, CSV Injection)"""
CHUNK_ROWS = 1000
MAX_SHEET_ROWS, MAX_CELL_LENGTH, MAX_TITLE_LENGTH = 1_048_576, 32_767, 31
"""Excel's own limits."""
NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
NOT_IN_TITLE = re.compile(r"[\[\]:*?/\\]")
FIRST_EXCEL_DAY = date(1900, 3, 1)
"""Excel takes 1900 for a leap year: earlier days would be one off."""


class ExportResult(TypedDict):
    """What was written."""

    files: list[str]
    rows: dict[str, int]
    """Rows of each table."""
    formulas: int
    """Texts that were made harmless."""
    cut: int
    """Texts that were cut to the length of an Excel cell."""


@dataclass
class ExportCounts:
    """What was changed in texts."""

    formulas: int = 0
    cut: int = 0


@dataclass(frozen=True)
class Export:
    """How tables are written to files."""

    plan: ArrowPlan
    keeps_formulas: bool = False
    counts: ExportCounts = field(default_factory=ExportCounts)

    def protect_text(self, text: str) -> tuple[str, bool]:
        """Return a text and whether a spreadsheet would run it."""
        is_formula = not self.keeps_formulas and bool(FORMULA.match(text))
        self.counts.formulas += is_formula
        return text, is_formula


def export_output(
    place: str, to: str, file: Path | None = None, split: bool = False, explode: str | None = None, overwrite: bool = False,
    keeps_formulas: bool = False,
) -> ExportResult:  # fmt: skip
    """Write the records of an output folder to a file, or with `split` in CSV or JSON lines to a folder of files, and say what was written.

    `to` is one of `FORMATS`; `file` is by default named from the job, in the working directory. Raises JobError and RunError.
    """
    records = read_record_table(place)
    tables = {"records": records.table}
    if split:
        tables = split_tables(records.table)
    elif explode:
        tables = {"records": explode_table(records.table, explode)}
    is_folder = split and to in ("csv", "jsonl")
    target = file or Path(str(records.job["job"]["name"]) + ("" if is_folder else f".{to}"))
    files = {target / f"{name}.{to}": {name: table} for name, table in tables.items()} if is_folder else {target: tables}
    export = Export(records.plan, keeps_formulas)
    for path in files:
        if path.exists() and not overwrite:
            raise JobError(f"{path} exists already and is not overwritten: name another one by --file, or give --overwrite", path, "--file")
    for path, held in files.items():
        replace_file(path, lambda new, held=held: FORMATS[to](export, new, held))  # type: ignore[misc]
    rows = {name: table.num_rows for name, table in tables.items()}
    return {"files": [str(path) for path in files], "rows": rows, "formulas": export.counts.formulas, "cut": export.counts.cut}


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place and then put it there, so that it is whole or not there. Raises JobError."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(new)
        new.replace(path)
    except OSError as error:
        raise JobError(f"cannot write {path}: {error.strerror or error}", path, "--file") from None
    finally:
        with suppress(OSError):
            new.unlink()


def list_rows(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """Yield a table's rows as Python values."""
    for batch in table.to_batches(max_chunksize=CHUNK_ROWS):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def write_csv(export: Export, file: Path, tables: Mapping[str, pa.Table]) -> None:
    """Write one table as CSV: UTF-8, arrays as JSON, null and the empty text both as nothing."""
    flat = flatten_structs(next(iter(tables.values())))
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(format_csv_cell(export, name) for name in flat.column_names)
        writer.writerows([format_csv_cell(export, value) for value in row] for row in list_rows(flat))


def format_csv_cell(export: Export, value: Any) -> str:
    """Return a value as the text of a cell."""
    match value:
        case None:
            return ""
        case str():
            text, is_formula = export.protect_text(value)
            return f"'{text}" if is_formula else text
        case bool():
            return str(value).lower()
        case Decimal():
            return f"{value:f}"
        case dict() | list():
            return dump_json(make_json_value(None, value))
        case date():
            return value.isoformat()
    return str(value)


def write_jsonl(export: Export, file: Path, tables: Mapping[str, pa.Table]) -> None:
    """Write one table as JSON lines: structs and arrays nested, decimals with their digits, dates as texts."""
    (table,) = tables.values()
    columns = [(name, export.plan.root.fields.get(name)) for name in table.column_names]
    with file.open("w", encoding="utf-8", newline="") as stream:
        for row in list_rows(table):
            values = zip(columns, row, strict=True)
            stream.write(dump_json({name: make_json_value(part, value) for (name, part), value in values}) + "\n")


def write_xlsx(export: Export, file: Path, tables: Mapping[str, pa.Table]) -> None:
    """Write tables as the sheets of a workbook. Numbers, dates and truth values are cells of their own type, arrays are JSON."""
    from openpyxl import Workbook

    book = Workbook(write_only=True)
    titles: set[str] = set()
    for name, table in tables.items():
        if table.num_rows >= MAX_SHEET_ROWS:
            raise JobError(
                f"{name} has {table.num_rows:,} rows, an Excel sheet holds {MAX_SHEET_ROWS - 1:,}: use csv or duckdb", key="--to"
            )
        flat = flatten_structs(table)
        titles.add(title := make_sheet_title(name, titles))
        sheet = book.create_sheet(title)
        sheet.freeze_panes = "A2"
        sheet.append([make_sheet_cell(export, sheet, name) for name in flat.column_names])
        for row in list_rows(flat):
            sheet.append([make_sheet_cell(export, sheet, value) for value in row])
    book.save(file)


def make_sheet_title(name: str, taken: set[str]) -> str:
    """Return a sheet's title that Excel takes and no other sheet has."""
    title = NOT_IN_TITLE.sub("_", name)[:MAX_TITLE_LENGTH]
    number = 2
    while title.lower() in {other.lower() for other in taken}:
        title = f"{title[: MAX_TITLE_LENGTH - 4]}~{number}"
        number += 1
    return title


def make_sheet_cell(export: Export, sheet: Any, value: Any) -> Any:
    """Return a value as a cell. What a 64-bit float or a day of Excel cannot hold is written as text, so that it is not changed."""
    from openpyxl.cell import WriteOnlyCell

    match value:
        case None | bool():
            return value
        case int() | Decimal() | float() if Decimal(repr(float(value))) == value:
            cell = WriteOnlyCell(sheet, value)
            if isinstance(value, Decimal):
                cell.number_format = "0." + "0" * max(1, -int(value.as_tuple().exponent))
            return cell
        case datetime() if value.date() >= FIRST_EXCEL_DAY:
            cell = WriteOnlyCell(sheet, value.astimezone(UTC).replace(tzinfo=None) if value.tzinfo else value)
            cell.number_format = "yyyy-mm-dd hh:mm:ss"
            return cell
        case date() if not isinstance(value, datetime) and value >= FIRST_EXCEL_DAY:
            cell = WriteOnlyCell(sheet, value)
            cell.number_format = "yyyy-mm-dd"
            return cell
    return make_text_cell(export, sheet, value if isinstance(value, str) else format_csv_cell(export, value))


def make_text_cell(export: Export, sheet: Any, text: str) -> Any:
    """Return a cell of text, also for what Excel would take for a formula; characters that no workbook may hold are written as `\\x07`."""
    from openpyxl.cell import WriteOnlyCell

    text, is_formula = export.protect_text(NOT_IN_XML.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text))
    if len(text) > MAX_CELL_LENGTH:
        export.counts.cut += 1
        text = text[: MAX_CELL_LENGTH - 1] + "…"
    cell = WriteOnlyCell(sheet, "")
    cell._value, cell.data_type, cell.quotePrefix = text, "s", is_formula  # the setter of `value` takes `=` for a formula
    return cell


def write_duckdb(_: Export, file: Path, tables: Mapping[str, pa.Table]) -> None:
    """Write tables as those of a DuckDB database, with their types, lists and structs."""
    import duckdb

    with duckdb.connect(str(file)) as database:
        for name, table in tables.items():
            database.register("arrow_table", table.unify_dictionaries())
            try:
                database.execute(f"CREATE TABLE {quote_identifier(name)} AS SELECT * FROM arrow_table")
            except duckdb.Error as error:
                raise JobError(f"DuckDB does not take the table {name}: {' '.join(str(error).split())[:200]}", key="--to") from None
            database.unregister("arrow_table")


def quote_identifier(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'


FORMATS: dict[str, Callable[[Export, Path, Mapping[str, pa.Table]], None]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "xlsx": write_xlsx,
    "duckdb": write_duckdb,
}
