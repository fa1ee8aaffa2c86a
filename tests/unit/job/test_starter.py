"""Jobs of one's own: what is written can be checked and run, whatever it was made from."""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.errors import JobError
from pipeline.job import Job
from pipeline.job.starter import format_schema, write_starter
from pipeline.schema import parse_json
from pipeline.stages.record_plan import list_record_columns

MODEL = """
from decimal import Decimal
from typing import Annotated
from pydantic import BaseModel, Field

class Item(BaseModel):
    what: str | None

class Order(BaseModel):
    number: str | None
    total: Annotated[Decimal, Field(decimal_places=2)] | None
    items: list[Item]
"""


def list_columns(folder: Path) -> dict[str, str]:
    """Return the schema's columns of the job in a folder."""
    columns = list_record_columns(Job.load(folder / "job.yaml"))["columns"]
    return {name: kind for name, kind in columns.items() if not name.startswith("_")}


def test_a_template_has_one_field_of_each_kind(tmp_path: Path) -> None:
    write_starter(tmp_path / "my orders")
    assert (tmp_path / "my orders/documents").is_dir()
    assert Job.load(tmp_path / "my orders/job.yaml").sections.name == "my-orders"
    assert list(list_columns(tmp_path / "my orders").values()) == [
        *("string", "date32[day]", "dictionary<values=string, indices=int32, ordered=0>", "bool", "decimal128(18, 2)"),
        "list<item: struct<description: string, amount: decimal128(18, 2)>>",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_header_becomes_columns(tmp_path: Path, encoding: str, delimiter: str) -> None:
    lines = [["Größe", "Datum", "Betrag"], ["klein", "31.05.2024", '"3,50"'], ["", "1.6.2024", "4"]]
    (tmp_path / "a.csv").write_text("\n".join(delimiter.join(line) for line in lines), encoding=encoding)
    write_starter(tmp_path / "job", tmp_path / "a.csv")
    assert list_columns(tmp_path / "job") == {"grosse": "string", "datum": "date32[day]", "betrag": "decimal128(18, 2)"}


def test_a_workbooks_header_becomes_columns(tmp_path: Path) -> None:
    from openpyxl import Workbook

    book = Workbook()
    for row in (["No", "Day", "Sum", "Count"], ["A", date(2024, 5, 31), 3.25, 2], ["B", date(2024, 6, 1), None, 3]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    write_starter(tmp_path / "job", tmp_path / "a.xlsx")
    assert list_columns(tmp_path / "job") == {"no": "string", "day": "date32[day]", "sum": "decimal128(18, 2)", "count": "int64"}


def test_a_pydantic_model_becomes_a_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_orders.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_orders", raising=False)
    write_starter(tmp_path / "job", model="my_orders:Order")
    assert list_columns(tmp_path / "job") == {
        "number": "string",
        "total": "decimal128(18, 2)",
        "items": "list<item: struct<what: string>>",
    }


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text("mine")
    with pytest.raises(JobError, match=r"schema\.json exists already and is not overwritten"):
        write_starter(tmp_path)
    assert not (tmp_path / "job.yaml").exists()


WRONG = {
    "gone.csv": (None, "cannot read .*gone.csv: No such file"),
    "a.pdf": (b"x", r"a.pdf ends in .pdf; allowed are \.csv"),
    "empty.csv": (b"", "empty.csv is empty"),
    "blank.csv": (b",,\n1,2,3", "blank.csv has no header"),
    "a.xlsx": (b"x", "a.xlsx is not a workbook"),
    "quote.csv": (b'a,b\n"x,1\n', "quote.csv is not CSV"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_table_is_refused(tmp_path: Path, name: str) -> None:
    data, message = WRONG[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(JobError, match=message):
        write_starter(tmp_path / "job", tmp_path / name)
    assert not (tmp_path / "job").exists()


def test_a_schema_is_laid_out_for_people() -> None:
    written = {"title": "t", "properties": {"a": {"title": "A", "multipleOf": 0.01}, "b": {"type": ["string", "null"]}}}
    lines = format_schema(written).splitlines()
    assert '    "a": {"title": "A", "multipleOf": 0.01},' in lines
    assert parse_json("\n".join(lines)) == parse_json(json.dumps(written))


def test_the_command_says_what_comes_next(tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["init", str(tmp_path / "x"), "--json"])
    assert json.loads(found.stdout)["next"] == f"pipeline check {tmp_path / 'x/job.yaml'}"
    assert CliRunner().invoke(main, ["check", str(tmp_path / "x/job.yaml")]).exit_code == 0


@pytest.mark.parametrize("line", ["", "a --sample b", "a --from b.csv --model m:M", "--sample a --model m:M", "--from b.csv"])
def test_it_writes_one_kind_of_thing(line: str) -> None:
    assert CliRunner().invoke(main, ["init", *line.split()]).exit_code == 2
