"""Fields of the review form: kinds, titles and choices, also behind references."""

from __future__ import annotations

from pathlib import Path

from pipeline.review.fields import build_form
from pipeline.schema import load_schema
from pipeline.schema.arrow import ArrowPlan

SCHEMAS = Path(__file__).parents[3] / "schemas"


def test_each_column_is_a_field_of_its_kind() -> None:
    schema = load_schema(SCHEMAS / "purchase_order.json")
    form = {field["name"]: field for field in build_form(ArrowPlan(schema).root, schema)}
    kinds = {name: form[name]["kind"] for name in ("order_number", "order_date", "revision", "currency", "total", "buyer", "line_items")}
    assert list(kinds.values()) == ["text", "date", "integer", "choice", "number", "object", "list"]
    assert (form["total"]["decimals"], form["total"]["title"], form["total"]["help"]) == (2, "Total", "Sum of the order.")
    assert form["document_type"]["choices"] == ["order", "change", "confirmation", "cancellation", "other"]
    assert [field["title"] for field in form["buyer"]["fields"]][:2] == ["Name", "Street"]
    (item,) = form["line_items"]["fields"]
    assert {field["name"]: field["title"] for field in item["fields"]}["unit_price"] == "Unit price"


def test_lists_in_lists_are_fields_in_fields() -> None:
    schema = load_schema(SCHEMAS / "table.json")
    (tables,) = build_form(ArrowPlan(schema).root, schema)
    rows = {field["name"]: field for field in tables["fields"][0]["fields"]}["rows"]
    assert (rows["kind"], rows["fields"][0]["kind"], rows["fields"][0]["fields"][0]["kind"]) == ("list", "list", "text")
