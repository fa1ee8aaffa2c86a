"""Schema files and JSON texts: what is refused with which message, and what is kept exactly."""

from __future__ import annotations

import hashlib
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import JobError
from pipeline.schema import (
    MAX_DEPTH,
    MAX_EXPONENT,
    check_schema,
    dump_compact_schema,
    dump_json,
    format_value,
    is_local_date_time,
    join_path,
    load_schema,
    parse_json,
    prompt,
    resolve_reference,
    walk_in_place,
    walk_schema,
)

SCHEMAS = Path(__file__).parents[3] / "schemas"
DRAFT_07 = "http://json-schema.org/draft-07/schema#"
DECIMALS = st.decimals(allow_nan=False, allow_infinity=False).filter(lambda number: abs(number.adjusted()) <= MAX_EXPONENT)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | DECIMALS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def make_schema(**more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": "string"}}, **more}


def read_refusal(folder: Path, text: str | bytes) -> str:
    """Return the message with which a schema file of this text is refused."""
    path = folder / "schema.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(JobError) as error:
        load_schema(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- files


def test_the_shipped_schemas_load_with_exact_numbers() -> None:
    total = load_schema(SCHEMAS / "invoice.json")["properties"]["total"]
    assert total["multipleOf"] == Decimal("0.01")


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("invoice", "d1aaa0c1d45de8d40138b4e99543ce62d46c5720012b36366328be9f5ef72ef1"),
        ("receipt", "7d53951d71f7ae18741969e8ef3cc5dff6406ec96171d83413e97143bd082236"),
    ],
)
def test_the_prompt_is_the_one_the_demonstration_model_was_trained_on(name: str, digest: str) -> None:
    text = prompt.build_system_message(load_schema(SCHEMAS / f"{name}.json"))
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_a_file_with_a_byte_order_mark_loads(tmp_path: Path) -> None:
    (tmp_path / "bom.json").write_text(json.dumps(make_schema()), encoding="utf-8-sig")
    assert load_schema(tmp_path / "bom.json") == make_schema()


@pytest.mark.parametrize("draft", ["https://json-schema.org/draft/2020-12/schema", DRAFT_07, DRAFT_07.rstrip("#")])
def test_both_drafts_are_known(draft: str) -> None:
    assert check_schema(make_schema(**{"$schema": draft}))["$schema"] == draft


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"none\.json cannot be read: No such file"):
        load_schema(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe", "is not UTF-8 text: byte 0 is 0xff"),
        ("{", "not JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
        ('{"type": 1, "type": 2}', 'the key "type" occurs twice'),
        ("[]", "the root is []; it must be an object"),
    ],
)
def test_a_file_that_is_no_schema_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert message in read_refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, '#/$schema is "http://json-schema.org/draft-04/schema#"; allowed are'),
        (make_schema(requried=["a"]), "#: 'requried' is not a keyword of its draft; did you mean 'required'?"),
        (make_schema(properties={"a": {"propeties": {}}}), "#/properties/a: 'propeties' is not a keyword of its draft; did you mean"),
        (make_schema(nullable=True), "#: 'nullable' is not a keyword of its draft; your own keywords must begin with 'x-'"),
        (make_schema(dependencies={}), "'dependencies' is not a keyword"),
        (make_schema(**{"$schema": DRAFT_07}, dependentRequired={}), "'dependentRequired' is not a keyword"),
        (make_schema(properties={"a/b": {"format": "dat"}}), "#/properties/a~1b/format is 'dat'; did you mean 'date'?"),
        (make_schema(properties={"a": {"type": "strin"}}), "#/properties/a/type: 'strin' is not"),
        (make_schema(properties={"a": {"multipleOf": 0}}), "#/properties/a/multipleOf: 0 is less than or equal to the minimum of 0"),
        (make_schema(properties={"a": {"minLength": 0.5}}), "#/properties/a/minLength: 0.5 is not of type 'integer'"),
        (make_schema(properties={"a": {"pattern": "("}}), "#/properties/a/pattern: '(' is not a 'regex'"),
        (make_schema(required="a"), "#/required: 'a' is not of type 'array'"),
        (make_schema(**{"$ref": "other.json"}), "#/$ref is 'other.json'; only references within this file are allowed, '#/…'"),
        (make_schema(items={"$ref": "#/$defs/b"}, **{"$defs": {"a": {}}}), "is not a schema in this file; did you mean '#/$defs/a'?"),
        (make_schema(items={"$ref": "#/title"}, title="T"), "#/items/$ref is '#/title', which is not a schema"),
        (make_schema(items={"$ref": "#/$defs/a"}, **{"$defs": {"a": {"$ref": "#/$defs/a"}}}), "refers back to itself"),
        (make_schema(items={"$ref": "#/$defs/a"}, **{"$defs": {"a": {"anyOf": [{"$ref": "#/items"}]}}}), "refers back to itself"),
        (make_schema(items={"$dynamicRef": "#a"}), "#/items: '$dynamicRef' and a nested '$id' are not supported"),
        (make_schema(items={"$id": "https://a.de/b"}), "#/items: '$dynamicRef' and a nested '$id' are not supported"),
        (make_schema(items={"$ref": "#", "minLength": 1}, **{"$schema": DRAFT_07}), "#/items: draft-07 ignores 'minLength' beside '$ref'"),
        ({"type": "array"}, "#/type is \"array\"; the root must be of type 'object'"),
        ({"properties": {"a": {}}}, "#/type is null; the root must be of type 'object'"),
        ({"type": "object"}, "#/properties is missing or empty"),
        (make_schema(properties={"_status": {}}), "#/properties/_status: a column's name must not begin with '_'"),
    ],
)
def test_a_schema_that_promises_too_much_is_refused_in_one_sentence(tmp_path: Path, schema: Any, message: str) -> None:
    assert message in read_refusal(tmp_path, json.dumps(schema))


def test_words_of_ones_own_and_annotations_are_allowed() -> None:
    schema = make_schema(**{"x-owner": "me", "examples": [], "default": {}, "deprecated": False, "readOnly": True, "$comment": "c"})
    assert check_schema(schema) == schema


def test_names_of_properties_are_never_taken_for_keywords() -> None:
    names = {"requried": {"type": "string"}, "$ref": {"type": "string"}, "format": {"enum": [{"$ref": 1, "format": "dat"}]}}
    assert check_schema(make_schema(properties=names))["properties"] == names


def test_a_root_that_is_a_reference_is_put_in_place() -> None:
    root = {"$ref": "#/definitions/Invoice", "$schema": DRAFT_07, "definitions": {"Invoice": make_schema(title="Invoice")}}
    assert check_schema(root)["properties"] == {"a": {"type": "string"}}
    assert check_schema(root)["title"] == "Invoice"


# --- the parts of a schema


def test_every_schema_inside_is_walked_and_nothing_else() -> None:
    schema = {"properties": {"a": {"items": {"enum": [{"type": "x"}]}}, "b": True}, "anyOf": [{"not": {}}], "dependencies": {"a": ["b"]}}
    places = " ".join(place for place, _ in walk_schema(schema))
    assert places == "# #/properties/a #/properties/a/items #/properties/b #/anyOf/0 #/anyOf/0/not"


def test_a_reference_is_resolved_with_what_stands_beside_it() -> None:
    root = {"$defs": {"a~b/c": {"type": "string", "title": "A"}}}
    assert resolve_reference({"$ref": "#/$defs/a~0b~1c", "title": "B", "minLength": 1}, root)[0] == {
        "type": "string",
        "title": "B",
        "minLength": 1,
    }


def test_a_rule_on_both_sides_of_a_reference_holds_twice() -> None:
    root = {"$defs": {"a": {"minLength": 1, "title": "A"}}}
    both, _ = resolve_reference({"$ref": "#/$defs/a", "minLength": 2, "title": "B"}, root)
    assert both == {"title": "B", "allOf": [{"minLength": 1, "title": "A"}, {"minLength": 2, "title": "B"}]}


def test_a_reference_already_followed_stays_a_reference() -> None:
    root = {"properties": {"next": {"$ref": "#"}}}
    inside, seen = resolve_reference({"$ref": "#"}, root)
    assert resolve_reference(inside["properties"]["next"], root, seen) == ({"$ref": "#"}, ("#",))


def test_all_schemas_of_one_value_are_found_in_place() -> None:
    root = {"$defs": {"a": {"title": "A"}}}
    part = {"title": "P", "anyOf": [{"$ref": "#/$defs/a"}, {"title": "B", "properties": {"x": {"title": "X"}}}], "then": {"title": "T"}}
    assert [found["title"] for found in walk_in_place(part, root)] == ["P", "A", "B", "T"]


# --- the text of a schema


def test_the_compact_text_keeps_order_and_digits_and_drops_what_only_editors_read() -> None:
    schema = parse_json('{"$schema": "s", "$id": "i", "properties": {"z": {"multipleOf": 0.010, "$comment": "c"}, "$id": {}, "ä": true}}')
    assert dump_compact_schema(schema) == '{"properties":{"z":{"multipleOf":0.010},"$id":{},"ä":true}}'
    assert "$schema" in schema


def test_values_in_a_schema_are_not_its_parts() -> None:
    schema = {"enum": [{"$comment": 1}], "default": {"$id": 2}}
    assert parse_json(dump_compact_schema(schema)) == schema


# --- JSON texts


@given(JSON)
def test_a_value_survives_its_text(value: Any) -> None:
    assert parse_json(dump_json(value)) == value
    assert dump_json(parse_json(dump_json(value))) == dump_json(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON: Expecting value at line 1, column 1"),
        ('{"a": 1', "not JSON: Expecting ',' delimiter at line 1, column 8"),
        ("[1] x", "not JSON: Extra data"),
        ("NaN", "NaN is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ('[{"a": 1, "b": 2, "b": 3}]', 'the key "b" occurs twice in one object'),
        ("1e999999999", "the number 1e999999999 has more than 1,100 digits before or after the point"),
        ("-1e-999999999", "digits before or after the point"),
        ("1e99999999999999999999", "the number 1e99999999999999999999 has more than 1,100 digits"),
        ("9" * 5000, "digits before or after the point"),
        ('"\\ud800"', "lone surrogate '\\ud800'"),
        ("[" * 100_000, "nested more than 100 levels deep"),
        ("[" * (MAX_DEPTH + 1) + "1" + "]" * (MAX_DEPTH + 1), "nested more than 100 levels deep"),
    ],
)
def test_an_answer_that_readers_could_take_differently_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the text is compared below
        parse_json(text)
    assert message in str(error.value)


def test_numbers_are_exact() -> None:
    assert [repr(number) for number in parse_json("[19.99, 5, 5.0, 1e2]")] == ["Decimal('19.99')", "5", "Decimal('5.0')", "Decimal('1E+2')"]


def test_a_path_quotes_names_that_need_it() -> None:
    assert join_path(join_path(join_path("$", "line_items"), 2), "Größe") == "$.line_items[2].Größe"
    assert join_path("$", 'a "b"') == '$["a \\"b\\""]'


def test_a_long_value_is_shown_cut() -> None:
    assert format_value(["x" * 100]) == '["' + "x" * 77 + "…"


# --- how parts are merged


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"type": "number", "x-merge": "lsat"},
            "#/properties/x/x-merge is \"lsat\"; did you mean 'last'?; allowed are first, last, concat, longest",
        ),
        ({"x-merge": True}, "#/properties/x/x-merge is true; allowed are first"),
        (
            {"type": ["number", "null"], "x-merge": "concat"},
            "'concat', which joins values of type array or string; the type here is number",
        ),
        ({"$ref": "#/$defs/n", "x-merge": "longest"}, "'longest', which joins values of type array or string; the type here is object"),
    ],
)
def test_a_rule_that_cannot_merge_is_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_schema({"type": "object", "properties": {"x": part}, "$defs": {"n": {"type": "object"}}})


@pytest.mark.parametrize("part", [{"type": "string", "x-merge": "concat"}, {"type": "number", "x-merge": "last"}, {"x-merge": "longest"}])
def test_a_rule_that_can_merge_is_kept_and_not_sent(part: dict[str, Any]) -> None:
    schema = check_schema({"type": "object", "properties": {"x": part}})
    assert schema["properties"]["x"] == part
    assert "x-merge" not in dump_compact_schema(schema)


def test_formats_of_pydantic_and_openapi_are_known_and_misspelt_ones_are_not() -> None:
    check_schema({"type": "object", "properties": {"x": {"type": "string", "format": "binary"}}})
    with pytest.raises(ValueError, match="format is 'dat'; did you mean 'date'"):
        check_schema({"type": "object", "properties": {"x": {"type": "string", "format": "dat"}}})


@pytest.mark.parametrize("text", ["2024-05-31T14:05:00", "2024-05-31T14:05:00.5", 5])
def test_a_local_date_and_time_is_valid(text: Any) -> None:
    assert is_local_date_time(text)


@pytest.mark.parametrize(
    "text",
    [
        "2024-05-31T14:05:00Z",
        "2024-05-31 14:05:00",
        "2024-02-30T14:05:00",
        "2024-05-31T14:05:60",
        "0000-01-01T00:00:00",
        "2024-05-31T14:05:00\n",
    ],
)
def test_what_is_no_local_date_and_time_is_not(text: str) -> None:
    assert not is_local_date_time(text)
