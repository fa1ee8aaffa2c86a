"""Truth readers: every form of a truth is read as the same values, and whatever is wrong is named."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import JobError
from pipeline.score.truth import SourceIndex, Truth, load_truth
from tests.support.scored import make_plan, write_output

TEA = {"name": "Tea, green", "day": "2024-02-29", "total": 19.99, "items": [{"what": "007", "price": 2}]}
TYPED = {
    "name": "Tea, green",
    "day": date(2024, 2, 29),
    "total": Decimal("19.99"),
    "items": [{"what": "007", "price": Decimal("2.00")}],
}
EMPTY = {"name": None, "day": None, "total": None, "items": None}


def read(place: Path, per_page: bool = False) -> Truth:
    return load_truth(place, make_plan(), per_page)


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def write_json(folder: Path) -> Path:
    write(folder / "in/a.json", json.dumps(TEA))
    write(folder / "in/b.pdf.json", "{}")
    return folder / "in"


def write_lines(folder: Path) -> Path:
    return write(folder / "truth.jsonl", "\n".join(json.dumps(row) for row in ({"source": "a", **TEA}, {"source": "b.pdf"})) + "\n\n")


def write_csv(folder: Path) -> Path:
    items = json.dumps(TEA["items"]).replace('"', '""')
    return write(folder / "truth.csv", f'\ufeffsource,name,day,total,items\na,"Tea, green",2024-02-29,19.99,"{items}"\nb.pdf,,,,\n')


def write_parquet(folder: Path) -> Path:
    rows = [{"source": "a", **TYPED}, {"source": "b.pdf"}]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([("source", pa.string()), *make_plan().schema])), folder / "truth.parquet")
    return folder / "truth.parquet"


def write_pandas(folder: Path) -> Path:
    """Floats and NaN for amounts and timestamps for days, as a DataFrame has them."""
    rows = {"source": ["a", "b.pdf"], "name": ["Tea, green", None], "day": pd.to_datetime(["2024-02-29", None]), "total": [19.99, None]}
    pd.DataFrame({**rows, "items": [[{"what": "007", "price": 2.0}], None]}).to_parquet(folder / "truth.parquet")
    return folder / "truth.parquet"


@pytest.mark.parametrize("form", [write_json, write_lines, write_csv, write_parquet, write_pandas], ids=lambda form: form.__name__)
def test_every_form_has_the_same_values(tmp_path: Path, form: Any) -> None:
    found = read(form(tmp_path))
    assert [row.name for row in found.rows] == ["a", "b.pdf"]
    assert found.typed == [TYPED, EMPTY]
    assert found.labelled == {"name", "day", "total", "items[].what", "items[].price"}
    assert found.unknown == []


def test_corrected_records_are_a_truth(tmp_path: Path) -> None:
    write_output(tmp_path / "out", {"in/a.pdf": TEA})
    found = read(tmp_path / "out/records")
    assert ([row.name for row in found.rows], found.typed) == (["in/a.pdf"], [TYPED])
    assert found.unknown == ["tier"]


def test_keys_that_the_schema_lacks_are_listed(tmp_path: Path) -> None:
    found = read(write(tmp_path / "truth.jsonl", '{"source": "a", "totl": 1, "total": 2}'))
    assert (found.unknown, found.labelled) == (["totl"], {"total"})


def test_a_page_has_its_number(tmp_path: Path) -> None:
    [row] = read(write(tmp_path / "truth.csv", "source,page,total\na.pdf,3,2\n"), per_page=True).rows
    assert (row.page, row.values) == (3, {"total": 2})


WRONG = {
    "gone.csv": (None, r"gone\.csv does not exist: allowed are a folder of JSON files"),
    "truth.xml": ("<a/>", r"truth\.xml ends in \.xml: allowed are"),
    "empty.jsonl": ("\n", r"empty\.jsonl has no true values"),
    "a.jsonl": ('{"source": "a"}\n[1]', r"a\.jsonl, line 2, is not a JSON object"),
    "b.jsonl": ('{"source": "a"', r"b\.jsonl, line 1, is not JSON"),
    "c.jsonl": ('{"total": 1}', r"c\.jsonl, line 1, has no `source`: name the document"),
    "d.jsonl": ('{"source": 7, "total": 1}', r"d\.jsonl, line 1, has the source 7: it must be"),
    "e.jsonl": ('{"source": "a", "day": "29.2.2024"}', r"e\.jsonl, line 1, does not fit the schema: \$\.day is \"29\.2\.2024\""),
    "f.jsonl": ('{"source": "a", "sum": 1}', r"has none of the schema's properties: it has sum; allowed are name, day, total, items"),
    "g.csv": ("source,total\na,1 234", r"g\.csv, line 2, column total is '1 234': write it as JSON does"),
    "h.csv": ("source,total\na,1,2", r"h\.csv, line 2, has not as many cells as the first line"),
    "i.csv": ("source,total\na", r"i\.csv, line 2, has not as many cells as the first line"),
    "j.parquet": ("PAR", r"cannot read .*j\.parquet"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_truth_is_named(tmp_path: Path, name: str) -> None:
    text, sentence = WRONG[name]
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(JobError, match=sentence) as raised:
        read(tmp_path / name)
    assert raised.value.key == "--truth"


def test_pages_need_a_number(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"line 1, has the page None: the records are one for each page"):
        read(write(tmp_path / "truth.jsonl", '{"source": "a", "total": 1}'), per_page=True)


SOURCES = ["docs/x/a.pdf", "docs/y/a.pdf", "docs/y/b.tar.gz", "docs/y/b.json", "s3://bucket/c.pdf"]


@pytest.mark.parametrize(
    ("name", "is_stem", "found"),
    [
        ("docs/x/a.pdf", False, ["docs/x/a.pdf"]),
        ("a.pdf", False, ["docs/x/a.pdf", "docs/y/a.pdf"]),
        ("x/a.pdf", False, ["docs/x/a.pdf"]),
        ("elsewhere/x/a.pdf", False, ["docs/x/a.pdf"]),
        ("c.pdf", False, ["s3://bucket/c.pdf"]),
        ("c", False, []),
        ("c", True, ["s3://bucket/c.pdf"]),
        ("y/a", True, ["docs/y/a.pdf"]),
        ("b", True, []),
        ("b.tar", True, ["docs/y/b.tar.gz"]),
        ("docs", False, []),
    ],
)
def test_a_name_finds_the_sources_with_its_end(name: str, is_stem: bool, found: list[str]) -> None:
    assert SourceIndex(SOURCES).find_sources(name, is_stem) == found
