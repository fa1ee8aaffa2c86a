"""Pydantic models as schemas: what pydantic writes is read as it stands, and valid answers come back from their columns."""

from __future__ import annotations

import json
import unicodedata
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, NaiveDatetime

from pipeline import schema as schemas
from pipeline.job.pydantic_model import DecimalJsonSchema, is_model_name
from pipeline.schema.arrow import ArrowPlan
from pipeline.schema.grammar import check_grammar
from pipeline.schema.request_schema import build_request_schema
from pipeline.schema.validate import Validator
from tests.support.models import MODELS, Invoice, Limits, Line, Visit
from tests.unit.schema.test_arrow import is_same, restore_value, write_and_read

AMOUNTS = st.decimals(allow_nan=False, allow_infinity=False) | st.decimals(-(10**6), 10**6, places=2)
LINES = st.builds(Line, amount=AMOUNTS)
OVERRIDES: dict[type[BaseModel], dict[str, Any]] = {
    Invoice: {"total": st.decimals(-(10**9), 10**9, places=2), "paid": st.none() | AMOUNTS, "lines": st.lists(LINES, max_size=3)},
    Line: {"amount": AMOUNTS},
    Visit: {"start": st.datetimes(timezones=st.just(UTC))},
    Limits: {
        "code": st.from_regex(r"\A[A-Z]{3}\Z"),
        "price": st.decimals(0, 10**6, places=3),
        "net": st.decimals(Decimal("0.01"), 10**6, places=2),
        "anything": st.none() | st.integers() | st.text(),
        "file": st.text().map(str.encode),
    },
}
"""Fields for which hypothesis draws values that pydantic refuses."""


def read_schema(model: type[BaseModel]) -> schemas.Schema:
    return schemas.check_schema(schemas.parse_json(json.dumps(model.model_json_schema())))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: str(model.__name__))
def test_what_pydantic_writes_constrains_decoding_as_it_stands(model: type[BaseModel]) -> None:
    notes = check_grammar(build_request_schema(read_schema(model), absent=True))
    assert all("uniqueItems" in note or "oneOf" in note for note in notes)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: str(model.__name__))
def test_an_instance_is_in_its_columns_or_named_among_the_errors(model: type[BaseModel]) -> None:
    schema = read_schema(model)
    columns, validator = ArrowPlan(schema), Validator(schema)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
    @given(st.builds(model, **OVERRIDES.get(model, {})))
    def check(instance: BaseModel) -> None:
        value = schemas.parse_json(unicodedata.normalize("NFC", instance.model_dump_json()))
        row, misfits = columns.build_row(value)
        wrong = [*misfits, *map(str, validator.find_violations(value))]
        [cells] = write_and_read(columns, [row]).to_pylist()
        back = restore_value(columns.root, cells)
        for name, column in columns.root.fields.items():
            is_named = any(error.startswith(f"$.{name}") for error in wrong)
            assert is_named or is_same(column, value.get(name), back.get(name)), (name, value.get(name), back.get(name))

    check()


def test_a_model_with_decimal_places_and_naive_times_says_so() -> None:
    class Slip(BaseModel):
        total: Annotated[Decimal, Field(decimal_places=2, ge=0)]
        seen: NaiveDatetime
        sent: datetime

    found = Slip.model_json_schema(schema_generator=DecimalJsonSchema)["properties"]
    assert found["total"] == {"type": "number", "multipleOf": 0.01, "minimum": 0.0, "title": "Total"}
    assert (found["seen"]["format"], found["sent"]["format"]) == ("x-local-date-time", "date-time")


@pytest.mark.parametrize("name", ["a:B", "my_package.models:Invoice", "m:Outer.Inner"])
def test_a_module_and_a_class_are_a_models_name(name: str) -> None:
    assert is_model_name(name)


@pytest.mark.parametrize("name", ["invoice.json", "../schemas/invoice.json", "C:/schemas/invoice.json", "s3://a/b:C", "a:", ":B"])
def test_a_path_is_no_models_name(name: str) -> None:
    assert not is_model_name(name)
