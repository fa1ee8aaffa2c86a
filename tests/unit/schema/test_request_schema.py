"""Request schemas: they offer null for every value, are closed, and allow every answer that the schema itself allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import schema as schemas
from pipeline.schema.arrow import ArrowPlan
from pipeline.schema.grammar import check_grammar
from pipeline.schema.request_schema import build_request_schema, list_required_leaves, list_unforced_keywords
from pipeline.schema.validate import Validator
from tests.support.least import list_scalars, write_least
from tests.support.models import MODELS

ROOT = Path(__file__).parents[3]
MASKBENCH = ROOT.parent / "shared/corpora/schemas/maskbench"
SHIPPED = sorted(ROOT.glob("schemas/*.json"))
NAME = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def rewrite(part: Any, absent: bool = True, **defs: Any) -> Any:
    """Return the request schema of a property."""
    schema = {"type": "object", "properties": {"x": part}, "required": ["x"], "$defs": defs}
    return json.loads(build_request_schema(schemas.check_schema(schema), absent))["properties"]["x"]


# --- null is offered


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "number"}, {"type": ["number", "null"]}),
        ({"type": ["string", "null"]}, {"type": ["string", "null"]}),
        ({"enum": ["a", "b"]}, {"enum": ["a", "b", None]}),
        ({"type": "string", "enum": ["a"]}, {"type": ["string", "null"], "enum": ["a", None]}),
        ({"const": 5}, {"anyOf": [{"const": 5}, {"type": "null"}]}),
        ({"title": "T", "$ref": "#/$defs/n"}, {"title": "T", "anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, {"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]}),
        ({"type": "string", "minLength": 3, "pattern": "^a"}, {"type": ["string", "null"], "minLength": 3, "pattern": "^a"}),
        ({"type": "array", "items": {"type": "string"}, "minItems": 2}, {"type": "array", "items": {"type": "string"}}),
        ({"type": "array", "minItems": 2, "maxItems": 2}, {"type": ["array", "null"], "minItems": 2, "maxItems": 2}),
        ({"type": "array", "prefixItems": [{}, {}], "minItems": 2}, {"type": ["array", "null"], "prefixItems": [{}, {}], "minItems": 2}),
        ({"type": "object", "minProperties": 1, "not": {}}, {"type": "object"}),
        (True, True),
    ],
)
def test_null_is_offered_for_every_value_and_no_array_must_have_items(part: Any, expected: Any) -> None:
    assert rewrite(part, n={"type": "integer"}) == expected


def test_without_absent_values_stay_required() -> None:
    part = {"type": "array", "items": {"type": "number"}, "minItems": 2}
    assert rewrite(part, absent=False) == part


def test_objects_keep_their_place_and_their_values_may_be_null() -> None:
    expected = {"type": "object", "properties": {"name": {"type": ["string", "null"]}}, "required": ["name"], "additionalProperties": False}
    assert rewrite(NAME) == expected


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_least_answer_to_a_shipped_schema_says_nothing(file: Path) -> None:
    request = json.loads(build_request_schema(schemas.load_schema(file), absent=True))
    assert list_scalars(write_least(request, request)) == []


@pytest.mark.parametrize("model", MODELS, ids=lambda model: str(model.__name__))
def test_the_least_answer_to_a_pydantic_model_says_nothing(model: Any) -> None:
    request = json.loads(build_request_schema(schemas.check_schema(model.model_json_schema()), absent=True))
    least = write_least(request, request)
    assert Validator(request).find_violations(least) == []
    assert list_scalars(least) == []


@pytest.mark.skipif(not MASKBENCH.exists(), reason="the shared corpus is absent")
def test_the_least_answer_to_real_schemas_says_nothing_and_their_valid_instances_are_allowed() -> None:
    checked = 0
    for path in sorted(MASKBENCH.glob("*.json"))[::4]:
        case = schemas.parse_json(path.read_text("utf-8"))
        try:
            schema = schemas.check_schema({**case["schema"], "$schema": "https://" + schemas.LATEST_DRAFT})
        except ValueError:
            continue
        validator, columns = Validator(schema), ArrowPlan(schema)
        request = schemas.parse_json(build_request_schema(schema, absent=True))
        allowed = Validator(request)
        least = write_least(request, request)
        if not allowed.find_violations(least):  # combinations that `write_least` does not follow
            checked += 1
            assert list_scalars(least) == [], path.name
        for test in case["tests"]:
            if not validator.find_violations(test["data"]) and not columns.build_row(test["data"])[1]:
                assert allowed.find_violations(test["data"]) == [], path.name
    assert checked > 350


# --- objects are closed


def is_closed(part: Any, **defs: Any) -> bool:
    return bool(rewrite(part, **defs).get("additionalProperties") is False)


def test_an_object_with_declared_properties_is_closed() -> None:
    assert is_closed(NAME)
    assert is_closed({**NAME, "anyOf": [{"required": ["name"]}]})


def test_an_object_that_says_what_else_it_may_have_stays_as_it_is() -> None:
    assert rewrite({**NAME, "additionalProperties": {"type": "string"}})["additionalProperties"] == {"type": "string"}
    assert not is_closed({"type": "object"})


def test_parts_of_one_object_are_not_closed_against_each_other() -> None:
    both = {"allOf": [{"$ref": "#/$defs/named"}, {"properties": {"age": {"type": "integer"}}}]}
    found = json.loads(
        build_request_schema(schemas.check_schema({"type": "object", "properties": {"x": both}, "$defs": {"named": NAME}}), True)
    )
    assert "additionalProperties" not in found["$defs"]["named"]
    assert Validator(found).find_violations({"x": {"name": "a", "age": 1}}) == []


def test_the_root_is_closed_even_if_it_says_that_it_is_open() -> None:
    request = json.loads(build_request_schema({**NAME, "additionalProperties": True, "patternProperties": {"^x": {}}}, absent=True))
    assert (request["additionalProperties"], "patternProperties" in request) == (False, False)


def test_names_that_are_required_but_not_declared_are_not_asked_for() -> None:
    assert rewrite({**NAME, "required": ["name", "age"]})["required"] == ["name"]

    assert rewrite({"type": "object", "required": ["age"], "additionalProperties": {"type": "integer"}})["required"] == []


def test_names_that_another_part_of_the_object_declares_stay_required() -> None:
    both = {"allOf": [{"required": ["name"]}, {"properties": {"name": {"type": "string"}}}]}
    assert rewrite(both)["allOf"][0] == {"required": ["name"]}


def test_one_of_several_kinds_of_object_may_be_null() -> None:
    kinds = {"anyOf": [NAME, {"type": "object", "properties": {"age": {"type": "integer"}}}]}
    assert rewrite(kinds)["anyOf"][-1] == {"type": "null"}
    assert {"type": "null"} not in rewrite({"anyOf": [NAME]})["anyOf"]


# --- forms that engines do not read


def test_a_decimal_of_pydantic_is_asked_for_as_a_number() -> None:
    decimal = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}], "title": "Total"}
    assert rewrite(decimal) == {"title": "Total", "type": ["number", "null"], "minimum": 0}
    assert rewrite(decimal, absent=False) == {"title": "Total", "type": "number", "minimum": 0}


def test_formats_that_servers_may_not_know_are_replaced() -> None:
    assert rewrite({"type": "string", "format": "binary"}) == {"type": ["string", "null"]}
    assert rewrite({"type": "string", "format": "x-local-date-time"})["pattern"] == schemas.LOCAL_DATE_TIME_PATTERN
    assert (
        check_grammar(
            build_request_schema({"type": "object", "properties": {"x": {"format": "x-local-date-time", "type": "string"}}}, True)
        )
        == ()
    )


def test_keywords_of_ones_own_are_left_out() -> None:
    assert rewrite({"type": "array", "x-merge": "first", "x-note": 1}) == {"type": "array"}


# --- what `check` says


def test_required_values_that_may_not_be_null_are_listed_with_their_paths() -> None:
    lines = {
        "type": "array",
        "items": {"type": "object", "required": ["amount", "tax"], "properties": {"amount": {"type": "number"}, "tax": {}}},
    }
    schema = {
        "type": "object",
        "required": ["total", "seller", "lines", "note"],
        "properties": {
            "total": {"type": "number"},
            "currency": {"type": "string"},
            "note": {"type": ["string", "null"]},
            "seller": {"anyOf": [{"$ref": "#/$defs/name"}]},
            "lines": lines,
        },
        "$defs": {"name": NAME},
    }
    assert list_required_leaves(schema) == ["$.total", "$.seller.name", "$.lines[].amount"]


def test_a_recursive_schema_is_listed_once() -> None:
    node = {
        "type": "object",
        "required": ["label"],
        "properties": {"label": {"type": "string"}, "kids": {"type": "array", "items": {"$ref": "#"}}},
    }
    assert list_required_leaves(node) == ["$.label"]


def test_keywords_that_are_not_sent_are_listed() -> None:
    schema = {
        "type": "object",
        "properties": {"x": {"type": "array", "contains": {}, "minContains": 1, "minItems": 1}},
        "if": {},
        "then": {},
    }
    assert list_unforced_keywords(schema) == ["/if", "/properties/x/contains", "/properties/x/minContains"]
