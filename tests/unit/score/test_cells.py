"""Comparison of a record with its truth, value by value."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline import schema
from pipeline.score.cells import RecordComparer, list_labelled, make_tolerance
from tests.support.scored import SCHEMA, make_plan

TEXT = {"type": ["string", "null"]}
NESTED = {
    "type": "object",
    "properties": {
        "seller": {"type": ["object", "null"], "properties": {"name": TEXT, "tax id": TEXT}, "additionalProperties": False},
        "tags": {"type": "array", "items": {"type": "string"}},
        "more": {"type": "object"},
        "at": {"type": ["string", "null"], "format": "x-local-date-time"},
        "paid": {"type": ["boolean", "null"]},
        "rate": {"type": ["number", "null"]},
    },
    "additionalProperties": False,
}


def compare(truth: dict[str, Any], found: dict[str, Any], of: dict[str, Any] = SCHEMA, number: float = 0, days: int = 0) -> dict[str, str]:
    """Return the outcomes by path, those of nulls on both sides left out."""
    plan = make_plan(of)
    rows = [plan.build_row(schema.parse_json(json.dumps(values)))[0] for values in (truth, found)]
    cells = RecordComparer(plan.root, make_tolerance(number, days)).compare_rows(*rows)
    return {cell.path: str(cell.outcome) for cell in cells if cell.outcome != "both_null"}


@pytest.mark.parametrize(
    ("truth", "found", "outcome"),
    [("Tea", "Tea", "right"), ("Tea", "tea", "wrong"), ("Tea", None, "missing"), (None, "Tea", "invented")],
)
def test_a_value_has_one_of_four_outcomes(truth: str | None, found: str | None, outcome: str) -> None:
    assert compare({"name": truth}, {"name": found}) == {"$.name": outcome}


def test_nulls_on_both_sides_are_a_cell_each() -> None:
    cells = RecordComparer(make_plan().root, make_tolerance(0, 0)).compare_rows({}, {})
    assert [(cell.field, str(cell.outcome), cell.is_exact) for cell in cells] == [
        ("name", "both_null", True),
        ("day", "both_null", True),
        ("total", "both_null", True),
    ]


@pytest.mark.parametrize(("found", "tolerance", "outcome"), [(19.98, 0.01, "right"), (19.97, 0.01, "wrong"), (19.98, 0, "wrong")])
def test_numbers_are_right_within_the_tolerance(found: float, tolerance: float, outcome: str) -> None:
    assert compare({"total": 19.99}, {"total": found}, number=tolerance) == {"$.total": outcome}


@pytest.mark.parametrize(("found", "days", "outcome"), [("2024-03-01", 1, "right"), ("2024-03-02", 1, "wrong"), ("2024-03-01", 0, "wrong")])
def test_dates_are_right_within_the_tolerance(found: str, days: int, outcome: str) -> None:
    assert compare({"day": "2024-02-29"}, {"day": found}, days=days) == {"$.day": outcome}


def test_a_missing_item_does_not_shift_the_others() -> None:
    truth = [{"what": "Tea", "price": 1}, {"what": "Milk", "price": 2}, {"what": "Salt", "price": 3}]
    found = [{"what": "Milk", "price": 2}, {"what": "Salz", "price": 3}]
    assert compare({"items": truth}, {"items": found}) == {
        "$.items[-].what": "missing",
        "$.items[-].price": "missing",
        "$.items[0].what": "right",
        "$.items[0].price": "right",
        "$.items[1].what": "wrong",
        "$.items[1].price": "right",
    }


def test_an_additional_item_is_invented() -> None:
    found = [{"what": "Sum", "price": 3}, {"what": "Tea", "price": None}]
    assert compare({"items": [{"what": "Tea"}]}, {"items": found}) == {
        "$.items[1].what": "right",
        "$.items[0].what": "invented",
        "$.items[0].price": "invented",
    }


def test_nulls_of_an_item_without_a_partner_are_no_cells() -> None:
    cells = RecordComparer(make_plan().root, make_tolerance(0, 0)).compare_rows(
        {"items": [{"what": "Tea", "price": None}]}, {"items": None}
    )
    assert [cell.field for cell in cells if cell.field.startswith("items")] == ["items[].what"]


def test_structs_lists_of_scalars_and_free_form_values_are_compared() -> None:
    truth = {"seller": {"name": "A", "tax id": "7"}, "tags": ["x", "y"], "more": {"a": 1, "b": 2}, "paid": True, "rate": 0.5}
    found = {"seller": {"name": "A", "tax id": None}, "tags": ["y"], "more": {"b": 2, "a": 1.0}, "paid": False, "rate": 0.25}
    assert compare(truth, found, NESTED, number=0.3) == {
        "$.seller.name": "right",
        '$.seller["tax id"]': "missing",
        "$.tags[-]": "missing",
        "$.tags[0]": "right",
        "$.more": "right",
        "$.paid": "wrong",
        "$.rate": "right",
    }


def test_a_null_struct_has_its_fields_missing() -> None:
    assert compare({"seller": {"name": "A"}}, {"seller": None}, NESTED) == {"$.seller.name": "missing"}


def test_times_are_right_within_a_day() -> None:
    truth, found = {"at": "2024-05-31T14:05:00"}, {"at": "2024-06-01T14:05:00"}
    assert compare(truth, found, NESTED, days=1) == {"$.at": "right"}
    assert compare(truth, {"at": "2024-06-01T14:05:01"}, NESTED, days=1) == {"$.at": "wrong"}


def test_what_was_not_read_is_not_right_even_where_the_truth_is_null() -> None:
    cells = RecordComparer(make_plan().root, make_tolerance(0, 0)).mark_unread({"name": "A", "items": [{"what": "Tea", "price": None}]})
    assert [(cell.field, str(cell.outcome), cell.is_exact) for cell in cells] == [
        *((field, "unread", False) for field in ("name", "day", "total", "items[].what"))
    ]


def test_only_labelled_fields_are_compared() -> None:
    comparer = RecordComparer(make_plan().root, make_tolerance(0, 0), {"total", "items[].price"})
    cells = comparer.compare_rows({"items": [{"price": 1}], "name": None}, {"items": [{"what": "Tea", "price": 1}], "name": "A"})
    assert comparer.fields == ["total", "items[].price"]
    assert [(cell.path, str(cell.outcome)) for cell in cells] == [("$.total", "both_null"), ("$.items[0].price", "right")]


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ([{"total": 1}, {"name": None}], {"total", "name"}),
        ([{"items": []}, {"items": [{"price": 1}]}], {"items[].price"}),
        ([{"items": []}], {"items[].price", "items[].what"}),
        ([{}], set()),
    ],
)
def test_a_field_is_labelled_where_one_document_has_it(values: list[dict[str, Any]], fields: set[str]) -> None:
    assert list_labelled(make_plan().root, values) == fields
