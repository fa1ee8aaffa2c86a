"""Merging the parts of a document into one value: first properties that hold for all values, then one case per rule."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.schema.certainty import TokenScore
from pipeline.schema.merge import Disagreement, Part, merge_parts

BOX = {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}
SELLER = {"type": "object", "properties": {"name": {"type": ["string", "null"]}, "phones": {"type": "array", "items": {"type": "string"}}}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "number": {"type": ["string", "null"]},
        "total": {"type": ["number", "null"]},
        "seller": {"anyOf": [{"$ref": "#/$defs/seller"}, {"type": "null"}]},
        "items": {"type": "array", "items": {"type": "object"}},
        "box": {"$ref": "#/$defs/box"},
        "extra": {"type": "object"},
    },
    "$defs": {"box": BOX, "seller": SELLER},
}
TEXTS = st.none() | st.sampled_from(["a", "b", ""])
SELLERS = st.none() | st.fixed_dictionaries({}, optional={"name": TEXTS, "phones": st.lists(st.sampled_from(["1", "2"]), max_size=2)})
EXTRAS = st.none() | st.fixed_dictionaries({}, optional={"x": st.none() | st.integers(0, 1), "y": st.lists(st.booleans(), max_size=2)})
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "number": TEXTS,
        "total": st.none() | st.sampled_from([Decimal("1.5"), 2, 0]),
        "seller": SELLERS,
        "items": st.none() | st.lists(st.fixed_dictionaries({"n": st.integers(0, 2)}), max_size=3),
        "extra": EXTRAS,
    },
)


def make_parts(*values: Any) -> list[Part]:
    """Return the values as parts of four pages each."""
    return [Part(4 * n + 1, 4 * n + 4, value) for n, value in enumerate(values)]


def merge_values(*values: Any) -> Any:
    return merge_parts(SCHEMA, make_parts(*values)).value


# --- properties


@given(VALUES)
def test_one_part_is_unchanged(value: Any) -> None:
    result = merge_parts(SCHEMA, make_parts(value))
    assert result.value == value
    assert result.disagreements == ()


@given(st.lists(VALUES, min_size=1, max_size=4))
def test_lists_are_joined_in_page_order_and_lose_nothing(values: list[Any]) -> None:
    joined = [item for value in values for item in value.get("items") or []]
    assert (merge_values(*values).get("items") or []) == joined


@given(st.lists(VALUES, min_size=1, max_size=4))
def test_a_scalar_is_the_first_that_says_something(values: list[Any]) -> None:
    given_ones = [value["number"] for value in values if value.get("number") is not None]
    assert merge_values(*values).get("number") == next((one for one in given_ones if one), given_ones[0] if given_ones else None)


@given(st.lists(VALUES, min_size=1, max_size=4))
def test_a_scalar_that_is_not_kept_is_recorded_with_its_page(values: list[Any]) -> None:
    result = merge_parts(SCHEMA, make_parts(*values))
    for part in make_parts(*values):
        total = part.value.get("total")
        recorded = {(d.other, d.other_page) for d in result.disagreements if d.path == "$.total"}
        assert total in (None, result.value.get("total")) or (total, part.first_page) in recorded


@given(VALUES, VALUES, VALUES)
def test_merging_a_merged_part_changes_nothing(one: Any, two: Any, three: Any) -> None:
    assert merge_values(merge_values(one, two), three) == merge_values(one, two, three) == merge_values(one, merge_values(two, three))


@given(VALUES)
def test_equal_parts_never_disagree(value: Any) -> None:
    assert merge_parts(SCHEMA, make_parts(value, value)).disagreements == ()


# --- the rules one by one


def test_a_disagreement_names_both_values_and_pages() -> None:
    result = merge_parts(SCHEMA, make_parts({"seller": {"name": "A"}}, {"seller": None}, {"seller": {"name": "B"}}))
    assert result.value == {"seller": {"name": "A"}}
    assert result.disagreements == (Disagreement("$.seller.name", "A", 1, "B", 9),)


def test_equal_items_of_a_list_are_kept() -> None:
    assert merge_values({"items": [{"n": 1}]}, {"items": [{"n": 1}]}) == {"items": [{"n": 1}, {"n": 1}]}


def test_numbers_that_are_equal_agree_however_written() -> None:
    assert merge_parts(SCHEMA, make_parts({"total": Decimal("2.0")}, {"total": 2})).disagreements == ()


def test_true_and_one_disagree() -> None:
    assert merge_parts(SCHEMA, make_parts({"extra": {"x": True}}, {"extra": {"x": 1}})).disagreements == (
        Disagreement("$.extra.x", True, 1, 1, 5),
    )


def test_objects_without_declared_properties_are_merged_too() -> None:
    assert merge_values({"extra": {"x": 1}}, {"extra": {"y": 2, "x": None}}) == {"extra": {"x": 1, "y": 2}}


@pytest.mark.parametrize("rule", [BOX, {"type": "array", "prefixItems": [{}, {}]}, {"items": [{}, {}]}])
def test_a_list_with_fixed_places_is_taken_whole(rule: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"box": {"anyOf": [{"$ref": "#/$defs/box"}, {"type": "null"}]}}, "$defs": {"box": rule}}
    result = merge_parts(schema, make_parts({"box": [0, 0, 1, 1]}, {"box": [2, 2, 3, 3]}))
    assert result.value == {"box": [0, 0, 1, 1]}
    assert [d.other for d in result.disagreements] == [[2, 2, 3, 3]]


def test_values_of_different_kinds_are_a_disagreement() -> None:
    result = merge_parts(SCHEMA, make_parts({"extra": [1]}, {"extra": "one"}))
    assert result.value == {"extra": [1]}
    assert result.disagreements == (Disagreement("$.extra", [1], 1, "one", 5),)


def test_a_recursive_schema_is_followed_as_deep_as_the_values_go() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "next": {"$ref": "#"}}}
    one, two = {"n": 1, "next": {"next": {"n": 3}}}, {"next": {"n": 2, "next": {"n": 3}}}
    assert merge_parts(schema, make_parts(one, two)).value == {"n": 1, "next": {"next": {"n": 3}, "n": 2}}


# --- values that say nothing


@pytest.mark.parametrize("blank", ["", None])
def test_a_value_that_says_nothing_never_replaces_one_that_does(blank: Any) -> None:
    result = merge_parts(SCHEMA, make_parts({"number": blank}, {"number": "A-7"}, {"number": blank}))
    assert (result.value, result.disagreements) == ({"number": "A-7"}, ())


def test_items_that_say_nothing_are_dropped_where_parts_are_joined() -> None:
    blank = {"n": None, "text": "", "more": []}
    assert merge_values({"items": [blank, {"n": 1}]}, {"items": [blank]}) == {"items": [{"n": 1}]}
    assert merge_values({"items": [blank]}) == {"items": [blank]}


# --- certainty


def test_the_most_certain_part_is_kept_and_the_disagreement_says_so() -> None:
    parts = [Part(1, 4, {"total": 0}, {"$.total": TokenScore(-2.5, 1)}), Part(5, 8, {"total": 7}, {"$.total": TokenScore(-0.1, 1)})]
    result = merge_parts(SCHEMA, parts)
    assert (result.value, result.disagreements) == ({"total": 7}, (Disagreement("$.total", 7, 5, 0, 1),))


def test_the_first_part_is_kept_where_the_certainty_of_one_is_not_known() -> None:
    parts = [Part(1, 4, {"total": 0}), Part(5, 8, {"total": 7}, {"$.total": TokenScore(-0.1, 1)})]
    assert merge_parts(SCHEMA, parts).value == {"total": 0}


def test_a_list_with_fixed_places_is_as_certain_as_its_numbers() -> None:
    parts = [
        Part(1, 4, {"box": [0, 0]}, {"$.box[0]": TokenScore(-1.0, 1), "$.box[1]": TokenScore(-1.0, 1)}),
        Part(5, 8, {"box": [2, 2]}, {"$.box[0]": TokenScore(-1.5, 1), "$.box[1]": TokenScore(0, 1)}),
    ]
    assert merge_parts(SCHEMA, parts).value == {"box": [2, 2]}


# --- rules of the schema


@pytest.mark.parametrize(
    ("rule", "part", "values", "merged"),
    [
        ("first", {"type": "number"}, [None, 1, 2], 1),
        ("last", {"type": ["number", "null"]}, [1, 2, None], 2),
        ("longest", {"type": "string"}, ["a", "abc", "ab"], "abc"),
        ("concat", {"type": "string"}, ["a", "", "b"], "a\nb"),
        ("first", {"type": "array", "items": {}}, [[], [1], [2]], [1]),
        ("last", {"type": "array", "items": {}}, [[1], [2], []], [2]),
        ("longest", {"type": "array", "items": {}}, [[1], [2, 3]], [2, 3]),
        ("concat", {"type": "array", "items": {}}, [[1], [2, 3]], [1, 2, 3]),
        ("last", {"type": "object"}, [{"a": 1}, {"b": 2}], {"b": 2}),
    ],
)
def test_the_schema_chooses_how_a_property_is_merged(rule: str, part: dict[str, Any], values: list[Any], merged: Any) -> None:
    schema = {"type": "object", "properties": {"x": {**part, "x-merge": rule}}}
    result = merge_parts(schema, make_parts(*({"x": value} for value in values)))
    assert (result.value, result.disagreements) == ({"x": merged}, ())


def test_a_rule_applies_inside_of_objects_and_through_references() -> None:
    total = {"type": "number", "x-merge": "last"}
    schema = {"type": "object", "properties": {"sum": {"$ref": "#/$defs/sum"}}, "$defs": {"sum": {"properties": {"total": total}}}}
    assert merge_parts(schema, make_parts({"sum": {"total": 1}}, {"sum": {"total": 2}})).value == {"sum": {"total": 2}}


# --- origins


def test_each_value_knows_the_tokens_from_which_it_was_taken() -> None:
    first = {"number": "A", "total": None, "items": [{"n": 1}, {"n": None}]}
    second = {"number": "B", "total": 7, "items": [{"n": 2}]}
    scores = {"$.number": TokenScore(-3, 1), "$.items[0].n": TokenScore(-1, 1)}
    others = {"$.number": TokenScore(-2, 1), "$.total": TokenScore(-4, 2), "$.items[0].n": TokenScore(-5, 1)}
    result = merge_parts(SCHEMA, [Part(1, 4, first, scores), Part(5, 8, second, others)])
    assert result.value == {"number": "B", "total": 7, "items": [{"n": 1}, {"n": 2}]}
    found = {path: score.total for path in ("$.number", "$.total", "$.items[0].n", "$.items[1].n") if (score := result.find_score(path))}
    assert found == {"$.number": -2, "$.total": -4, "$.items[0].n": -1, "$.items[1].n": -5}
    assert result.find_score("$.other") is None


def test_a_single_part_s_values_are_its_own() -> None:
    result = merge_parts(SCHEMA, [Part(1, 1, {"items": [{"n": 1}]}, {"$.items[0].n": TokenScore(-1, 2)})])
    assert result.find_score("$.items[0].n") == TokenScore(-1, 2)
