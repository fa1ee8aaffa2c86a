"""DataFrames: no value is changed by pandas, and items become rows on request."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

import pipeline
from pipeline.errors import JobError
from pipeline.report import Report
from tests.support.scored import SCHEMA, write_output

PROPERTIES: dict[str, Any] = {
    **SCHEMA["properties"],  # type: ignore[dict-item]
    "currency": {"enum": ["EUR", "USD", None]},
    "count": {"type": ["integer", "null"]},
    "paid": {"type": ["boolean", "null"]},
}
DOCUMENTS = {
    "b.pdf": {"day": "2024-05-31", "total": 0.1, "currency": "EUR", "count": 9007199254740993, "paid": True, "items": []},
    "a.pdf": {"day": None, "total": 19.99, "items": [{"what": "tea", "price": 4.99}, {"what": "milk", "price": 15}]},
}


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(write_output(tmp_path / "out", DOCUMENTS, schema={**SCHEMA, "properties": PROPERTIES}))


def test_types_are_kept(out: str) -> None:
    frame = pipeline.read(out)
    assert frame["_source"].to_list() == ["a.pdf", "b.pdf"]
    types = {"day": pd.ArrowDtype(pa.date32()), "total": pd.ArrowDtype(pa.decimal128(18, 2)), "count": "Int64", "paid": "boolean"}
    assert {name: frame[name].dtype for name in types} == types
    assert isinstance(frame["currency"].dtype, pd.CategoricalDtype)
    last = frame.iloc[1]
    assert (last["day"], last["count"], last["currency"]) == (date(2024, 5, 31), 9007199254740993, "EUR")
    assert frame["total"].sum() == Decimal("20.09")
    assert frame["items"].list.len().to_list() == [2, 0]


def test_items_become_rows(out: str) -> None:
    frame = pipeline.read(out, explode="items")
    assert frame[["_source", "items.what"]].fillna("-").to_numpy().tolist() == [["a.pdf", "tea"], ["a.pdf", "milk"], ["b.pdf", "-"]]
    assert frame["items.price"].sum() == Decimal("19.99")
    assert frame["_item"].to_list() == [1, 2, pd.NA]


def test_a_report_gives_its_records(out: str) -> None:
    report = Report("scored", out, "demo", True)
    assert report.to_pandas().equals(pipeline.read(out))
    assert len(report.to_pandas(explode="items")) == 3


def test_what_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="is not an output folder"):
        pipeline.read(tmp_path)
