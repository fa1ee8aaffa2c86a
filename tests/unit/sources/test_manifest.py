"""Manifests of every format: paths, columns and their types, and errors that name the line."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SourceError
from pipeline.sources import manifest


def read_text_manifest(tmp_path: Path, name: str, content: str | bytes) -> tuple[list[str], dict[str, list[object]]]:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    names, columns = manifest.read_manifest(str(file))
    return names, {name: values.to_pylist() for name, values in columns.items()}


def test_a_text_file_has_one_path_per_line(tmp_path: Path) -> None:
    assert read_text_manifest(tmp_path, "m.txt", "\ufeffa.pdf\r\n\n b c.pdf\nü\u2028.pdf") == (["a.pdf", " b c.pdf", "ü\u2028.pdf"], {})


def test_paths_that_are_not_utf8_keep_their_bytes(tmp_path: Path) -> None:
    assert read_text_manifest(tmp_path, "m.txt", b"caf\xe9.pdf\n")[0] == ["caf\udce9.pdf"]


def test_a_csv_keeps_its_columns_as_text(tmp_path: Path) -> None:
    names, columns = read_text_manifest(tmp_path, "m.CSV", 'customer,path,note\n0042,a.pdf,\n"7, or 8",b.pdf,"two\nlines"\n\n')
    assert names == ["a.pdf", "b.pdf"]
    assert columns == {"customer": ["0042", "7, or 8"], "note": [None, "two\nlines"]}


def test_json_lines_keep_their_types(tmp_path: Path) -> None:
    lines = '{"path": "a.pdf", "n": 1}\n\n{"path": "b.pdf", "tags": ["x"], "n": null}\n{"path": "c.pdf"}'
    assert read_text_manifest(tmp_path, "m.jsonl", lines) == (
        ["a.pdf", "b.pdf", "c.pdf"],
        {"n": [1, None, None], "tags": [None, ["x"], None]},
    )


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    amounts = pa.array([Decimal("1.50"), None], pa.decimal128(9, 2))
    (tmp_path / "year=2024").mkdir()
    pq.write_table(pa.table({"path": ["a.pdf", "b.pdf"], "amount": amounts}), tmp_path / "year=2024/m.parquet")
    names, columns = manifest.read_manifest(str(tmp_path / "year=2024/m.parquet"))
    assert names == ["a.pdf", "b.pdf"]
    assert {name: column.type for name, column in columns.items()} == {"amount": amounts.type}


def test_a_column_of_nulls_is_text(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,note\na.pdf,\n")
    assert manifest.read_manifest(str(tmp_path / "m.csv"))[1]["note"].type == pa.string()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "file,customer\na.pdf,1\n", r"must name a column `path`.*\['file', 'customer'\]"),
        ("m.csv", "", "must name a column `path`"),
        ("m.csv", "path,path\na,b\n", "each column once"),
        ("m.csv", "path,n\na.pdf,1,2\n", "line 2: 3 cells, but 2 columns"),
        ("m.csv", 'path\n"a.pdf\n', "line 2: unexpected end of data"),
        ("m.csv", "path,_status\na.pdf,1\n", "may not be called '_status'"),
        ("m.csv", "path,source\na.pdf,1\n", "may not be called 'source'"),
        ("m.csv", "path,\na.pdf,1\n", "may not be called ''"),
        ("m.csv", b"path,n\na.pdf,caf\xe9\n", "column 'n'"),
        ("m.csv", "path,n\n,1\n", "row 1: `path` is None"),
        ("m.jsonl", '{"path": "a"}\n{"file": "b"}', r"line 2: no key `path`; found \['file'\]"),
        ("m.jsonl", '{"path": "a"}\n["b"]', "line 2.*must be a JSON object"),
        ("m.jsonl", '{"path": "a"}\n{', "line 2: not JSON"),
        ("m.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("m.jsonl", b'{"path": "\xff"}', "not JSON in UTF-8"),
        ("m.jsonl", '{"path": 7}', "row 1: `path` is 7"),
        ("m.jsonl", '{"path": "a", "n": 1}\n{"path": "b", "n": "x"}', "column 'n' has values of different types"),
        ("m.jsonl", '{"path": "a", "n": %s}' % ("9" * 30), "column 'n'"),
        ("m.parquet", "no parquet", "not a readable Parquet file"),
    ],
)
def test_an_error_names_the_manifest_and_the_line_or_column(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        read_text_manifest(tmp_path, name, content)
    assert str(tmp_path / name) in str(caught.value)


def test_a_parquet_file_without_paths_is_refused_with_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"file": ["a.pdf"]}), tmp_path / "m.parquet")
    with pytest.raises(SourceError, match=r"no column `path`; found \['file'\]"):
        manifest.read_manifest(str(tmp_path / "m.parquet"))
