"""Exported files, read back by the programs that they are for."""

from __future__ import annotations

import csv
import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.errors import JobError
from pipeline.export import files
from pipeline.export.files import export_output
from tests.support.scored import write_output

EVIL = '=HYPERLINK("http://evil","x")'
DOCUMENTS = {
    "a.pdf": {"name": EVIL, "day": "2024-05-31", "total": -19.5, "items": [{"what": "tea", "price": 4.99}, {"what": "-1", "price": None}]},
    "b.pdf": {"name": "Müller\n& Co", "day": "1899-12-31", "total": None, "items": []},
    "c.pdf": None,
}


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(write_output(tmp_path / "out", DOCUMENTS))


def export(out: str, to: str, **given: Any) -> Path:
    """Return the one file that was written."""
    (file,) = export_output(out, to, Path(out).parent / f"new.{to}", **given)["files"]
    return Path(file)


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_csv_has_a_row_for_each_record(out: str) -> None:
    rows = read_csv(export(out, "csv"))
    assert [(row["_source"], row["day"], row["total"], row["_status"]) for row in rows] == [
        ("a.pdf", "2024-05-31", "-19.50", "extracted"),
        ("b.pdf", "1899-12-31", "", "extracted"),
        ("c.pdf", "", "", "failed"),
    ]
    assert json.loads(rows[0]["items"]) == [{"what": "tea", "price": 4.99}, {"what": "-1", "price": None}]
    assert rows[1]["name"] == "Müller\n& Co"


@pytest.mark.parametrize("text", ["=1+1", "+49 30", "-cmd", "@SUM(A1)", "\t=1", " =1", "\r=1", "＝1", "\nx"])
def test_a_text_that_a_spreadsheet_runs_begins_with_an_apostrophe(tmp_path: Path, text: str) -> None:
    out = str(write_output(tmp_path / "out", {"a.pdf": {"name": text}, "b.pdf": {"name": "a=1"}}))
    assert [row["name"] for row in read_csv(export(out, "csv"))] == [f"'{text}", "a=1"]
    assert [row["name"] for row in read_csv(export(out, "csv", overwrite=True, keeps_formulas=True))] == [text, "a=1"]


def test_json_lines_are_what_the_documents_said(out: str) -> None:
    found = [json.loads(line, parse_float=Decimal) for line in export(out, "jsonl").read_text().splitlines()]
    assert [found[0][name] for name in ("name", "day", "total")] == [EVIL, "2024-05-31", Decimal("-19.50")]
    assert found[0]["items"][0] == {"what": "tea", "price": Decimal("4.99")}


def test_a_workbook_has_typed_cells_and_no_formula(out: str) -> None:
    import openpyxl

    sheet = openpyxl.load_workbook(export(out, "xlsx"))["records"]
    cells = {cell.value: number for number, cell in enumerate(sheet[1])}
    name, day, total, items = (sheet[2][cells[key]] for key in ("name", "day", "total", "items"))
    assert (name.value, name.data_type, name.quotePrefix) == (EVIL, "s", True)
    assert (day.value, day.number_format) == (datetime(2024, 5, 31), "yyyy-mm-dd")
    assert (total.value, total.data_type, total.number_format) == (-19.5, "n", "0.00")
    assert items.value.startswith('[{"what":"tea"')
    assert sheet[3][cells["day"]].value == "1899-12-31"


def test_what_a_cell_cannot_hold_is_counted_or_text(tmp_path: Path) -> None:
    import openpyxl

    documents = {"a.pdf": {"name": "x" * 40_000, "total": 1}, "b.pdf": {"name": "bell\x07", "total": 9_999_999_999_999_999}}
    out = str(write_output(tmp_path / "out", documents))
    assert export_output(out, "xlsx", tmp_path / "a.xlsx")["cut"] == 1
    sheet = openpyxl.load_workbook(tmp_path / "a.xlsx").active
    assert (len(sheet["A2"].value), sheet["A3"].value) == (32_767, r"bell\x07")
    assert [sheet["C2"].value, sheet["C3"].value] == [1, "9999999999999999.00"]


def test_too_many_rows_for_a_sheet_are_refused(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_SHEET_ROWS", 3)
    with pytest.raises(JobError, match="records has 3 rows, an Excel sheet holds 2: use csv or duckdb"):
        export(out, "xlsx")
    assert not [*Path(out).parent.glob("*new*")]


def test_duckdb_has_the_types(out: str) -> None:
    import duckdb

    with duckdb.connect(str(export(out, "duckdb")), read_only=True) as database:
        found = dict(database.execute("SELECT column_name, data_type FROM information_schema.columns").fetchall())
        assert (found["day"], found["total"]) == ("DATE", "DECIMAL(18,2)")
        assert found["items"] == "STRUCT(what VARCHAR, price DECIMAL(18,2))[]"
        assert database.execute("SELECT sum(total) FROM records").fetchall() == [(Decimal("-19.50"),)]


@pytest.mark.parametrize("to", ["csv", "jsonl"])
def test_arrays_are_files_of_their_own(out: str, to: str, tmp_path: Path) -> None:
    written = export_output(out, to, tmp_path / "all", split=True)
    assert written["rows"] == {"records": 3, "items": 2}
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [f"items.{to}", f"records.{to}"]
    read = pd.read_csv if to == "csv" else lambda file: pd.read_json(file, lines=True)
    assert read(tmp_path / f"all/items.{to}")["price"].sum() == pytest.approx(4.99)


@pytest.mark.parametrize("to", ["xlsx", "duckdb"])
def test_arrays_are_sheets_and_tables_of_their_own(out: str, to: str) -> None:
    file = export(out, to, split=True)
    if to == "xlsx":
        assert list(pd.read_excel(file, sheet_name=None)) == ["records", "items"]
        return
    import duckdb

    with duckdb.connect(str(file)) as database:
        assert database.execute("SELECT what, _item FROM items").fetchall() == [("tea", 1), ("-1", 2)]


def test_titles_of_sheets_are_short_and_different() -> None:
    titles: set[str] = set()
    for name in ("a" * 40, "a" * 35, "x/y"):
        titles.add(files.make_sheet_title(name, titles))
    assert titles == {"a" * 31, "a" * 27 + "~2", "x_y"}


def test_nothing_is_overwritten_unasked(out: str) -> None:
    file = export(out, "csv")
    with pytest.raises(JobError, match=r"new\.csv exists already and is not overwritten"):
        export(out, "csv")
    assert export(out, "csv", overwrite=True, explode="items") == file
    assert len(read_csv(file)) == 4


def test_the_command_says_what_it_wrote(out: str, tmp_path: Path) -> None:
    arguments = ["export", out, "--to", "csv", "--file", str(tmp_path / "a.csv")]
    found = CliRunner().invoke(main, arguments)
    assert found.stdout == ""
    assert found.stderr.splitlines() == [
        f"{tmp_path / 'a.csv'}: records 3 rows",
        "1 texts that a spreadsheet would run as formulas were made harmless",
    ]
    found = CliRunner().invoke(main, [*arguments, "--overwrite", "--json"])
    assert json.loads(found.stdout) == {"files": [str(tmp_path / "a.csv")], "rows": {"records": 3}, "formulas": 1, "cut": 0}
    assert CliRunner().invoke(main, [*arguments, "--split", "--explode", "items"]).exit_code == 2
