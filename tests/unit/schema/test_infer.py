"""Schemas from example rows: the type of each column, and names that can be typed."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pytest

from pipeline.schema import check_schema, dump_json, parse_json
from pipeline.schema.infer import infer_property, infer_schema, infer_type, make_property_name

TEXT, WHOLE = {"type": ["string", "null"]}, {"type": ["integer", "null"]}
CENTS = {"type": ["number", "null"], "multipleOf": Decimal("0.01")}
TYPES: list[tuple[list[Any], dict[str, Any]]] = [
    ([], TEXT),
    (["A-1", "7"], TEXT),
    (["31.05.2024", "1.6.2024"], TEXT | {"format": "date"}),
    (["2024-05-31"], TEXT | {"format": "date"}),
    (["5/31/2024", "12 Mar 2024"], TEXT | {"format": "date"}),
    ([datetime(2024, 5, 31), date(2024, 5, 31)], TEXT | {"format": "date"}),
    (["12", "-3"], WHOLE),
    ([12, 3], WHOLE),
    (["0012", "0013"], TEXT),
    (["1234567890123456789"], {"type": ["number", "null"]}),
    (["1.234,50", "3,00"], CENTS),
    (["1,234.50", "€ 3.00"], CENTS),
    (["19.9 EUR"], CENTS | {"multipleOf": Decimal("0.1")}),
    ([19.99, 5.0], CENTS),
    (["yes", "No"], {"type": ["boolean", "null"]}),
    ([True, False], {"type": ["boolean", "null"]}),
    (["open", "paid"] * 10, {"enum": ["open", "paid", None]}),
    (["open", "paid"] * 9, TEXT),
]


@pytest.mark.parametrize(("values", "keywords"), TYPES)
def test_a_column_has_the_type_of_its_values(values: list[Any], keywords: dict[str, Any]) -> None:
    assert infer_type(values) == keywords


NAMES = {"Invoice No.": "invoice_no", "Größe (m²)": "grosse_m2", "2024": "column_2024", "_id": "id", "金額": "金額", " ": "column"}


@pytest.mark.parametrize("title", NAMES)
def test_a_name_can_be_typed(title: str) -> None:
    assert make_property_name(title, {}) == NAMES[title]


def test_names_differ() -> None:
    assert list(infer_schema("t", ["a", "A", "a!", ""], [])["properties"]) == ["a", "a_2", "a_3"]


def test_examples_are_for_people() -> None:
    found = infer_property("Number", ["A-1", "A-2", "A-1", "A-3", "A-4"])
    assert found == {"title": "Number", "type": ["string", "null"], "x-examples": ["A-1", "A-2", "A-3"]}


def test_the_schema_can_be_used() -> None:
    found = infer_schema("Orders", ["No", "Total"], [["A", "1.50"], ["B"]])
    assert check_schema(parse_json(dump_json(found)))["required"] == ["no", "total"]
