"""Validation: exact numbers, formats, and messages that a model can act on."""

from __future__ import annotations

import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import schema as schemas
from pipeline.schema.validate import Validator, Violation

SUITE = Path(__file__).parents[4] / "shared/corpora/schemas/test-suite"
MONEY = {"type": "number", "multipleOf": Decimal("0.01")}
OTHER_PLACES = {"refRemote", "dynamicRef", "vocabulary", "format", "pattern", "patternProperties"}
"""Files of the suite that differ: `check_schema` refuses remote and dynamic references, formats are checked, `re` lacks \\p{…}."""


def find_violations(part: Any, value: Any) -> list[Violation]:
    return Validator({"type": "object", "properties": {"x": part}}).find_violations({"x": value})


@pytest.mark.parametrize("amount", ["19.99", "0.07", "0", "-1.1", "1E+2", "123456789012345678901234567890.12", "1e300"])
def test_cents_are_multiples_of_a_cent(amount: str) -> None:
    assert find_violations(MONEY, schemas.parse_json(amount)) == []


def test_part_of_a_cent_is_not() -> None:
    assert find_violations(MONEY, Decimal("19.995")) == [Violation("$.x", "19.995 is not a multiple of 0.01", "multipleOf")]


def test_a_schema_written_in_python_with_floats_is_as_exact() -> None:
    assert find_violations({"multipleOf": 0.01}, Decimal("0.07")) == []
    assert find_violations({"multipleOf": 0.01}, 0.07) == []


@given(st.decimals(-(10**20), 10**20, places=2))
def test_every_amount_of_cents_is_valid(amount: Decimal) -> None:
    assert find_violations(MONEY, amount) == []


@pytest.mark.parametrize("value", [5, -5, Decimal("5.0"), Decimal("1E+40"), 5.0])
def test_an_integer_is_any_whole_number(value: Any) -> None:
    assert find_violations({"type": "integer"}, value) == []


@pytest.mark.parametrize("value", [Decimal("5.5"), 5.5, True, "5"])
def test_nothing_else_is_an_integer(value: Any) -> None:
    assert [error.keyword for error in find_violations({"type": "integer"}, value)] == ["type"]


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ({"type": ["string", "null"]}, 5, "5 is not of type string or null"),
        ({"enum": ["EUR", "USD", None]}, "FFF", '"FFF" is not one of ["EUR","USD",null]'),
        ({"const": 1}, 2, "2 is not 1"),
        ({"type": "string", "format": "date"}, "31.12.2024", '"31.12.2024" is not a valid date'),
        ({"pattern": "^[A-Z]+$"}, "a", '"a" does not match the pattern ^[A-Z]+$'),
        ({"minimum": 0}, Decimal("-0.5"), "-0.5 is less than 0"),
        ({"exclusiveMaximum": Decimal("9.5")}, Decimal("9.5"), "9.5 is not less than 9.5"),
        ({"maxLength": 1}, "ab", '"ab" is longer than 1 characters'),
        ({"minItems": 2}, [1], "[1] has fewer than 2 items"),
        ({"uniqueItems": True}, [1, Decimal("1.0")], "[1,1.0] has an item twice"),
        ({"required": ["a"]}, {}, "is required and was not found"),
        ({"not": {"const": 1}}, 1, '1 is excluded by {"const":1}'),
        (False, 1, "False schema does not allow 1"),
    ],
)
def test_a_message_says_what_was_found_and_what_is_allowed(part: Any, value: Any, message: str) -> None:
    assert [violation.message for violation in find_violations(part, value)] == [message]


def test_an_undeclared_property_is_named() -> None:
    assert "'b' was unexpected" in find_violations({"properties": {"a": {}}, "additionalProperties": False}, {"b": 1})[0].message


def test_a_long_value_is_cut() -> None:
    message = find_violations({"type": "integer"}, "x" * 5000)[0].message
    assert len(message) < 120
    assert "…" in message


def test_violations_are_sorted_by_path_and_say_where() -> None:
    lines = {"type": "array", "items": {"type": "object", "properties": {"amount": MONEY, "a b": {"type": "string"}}}}
    errors = find_violations(lines, [{}] * 2 + [{"amount": "1", "a b": 2}] + [{}] * 8 + [{"amount": True}])
    assert [error.path for error in errors] == ['$.x[2]["a b"]', "$.x[2].amount", "$.x[11].amount"]
    assert str(errors[1]) == '$.x[2].amount: "1" is not of type number'


def test_a_nullable_object_reports_what_is_wrong_inside_it() -> None:
    inner = {"type": "object", "required": ["a", "b"], "properties": {"a": {"type": "string"}, "b": {"type": "string"}}}
    errors = find_violations({"anyOf": [{"type": "null"}, inner]}, {"a": 1})
    assert [(error.path, error.keyword) for error in errors] == [("$.x.b", "required"), ("$.x.a", "type")]


def test_a_value_of_no_alternative_is_told_all_of_them() -> None:
    errors = find_violations({"anyOf": [{"type": "string"}, {"type": "null"}]}, 5)
    assert errors == [Violation("$.x", '5 fits none of [{"type":"string"},{"type":"null"}]', "anyOf")]


def test_a_value_of_two_alternatives_is_told_that_too() -> None:
    assert find_violations({"oneOf": [{"type": "number"}, {"minimum": 0}]}, 5)[0].message.startswith("5 does not fit exactly one of")


@pytest.mark.parametrize("alternatives", [[False, False], [True, False], [{"const": 1}, {"const": 2}]])
def test_odd_alternatives_are_judged_without_a_crash(alternatives: list[Any]) -> None:
    assert (find_violations({"anyOf": alternatives}, 5) == []) is (True in alternatives)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date", "2024-02-29", "2023-02-29"),
        ("date-time", "2024-02-29T10:00:00+01:00", "2024-02-29 10:00"),
        ("time", "10:00:00Z", "10:00"),
        ("duration", "P1D", "1 day"),
        ("email", "a@b.de", "a"),
        ("hostname", "a.de", "-a"),
        ("ipv4", "10.0.0.1", "10.0.0"),
        ("ipv6", "::1", "1"),
        ("uri", "https://a.de/b", "a b"),
        ("iri", "https://ä.de/ß?ö", "ä.de/ß"),
        ("iri-reference", "ä.de/ß", "a b"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123"),
        ("json-pointer", "/a", "a"),
        ("regex", "a+", "a{99999999999}"),
    ],
)
@pytest.mark.parametrize("draft", schemas.DRAFTS)
def test_formats_are_checked_in_both_drafts(draft: str, name: str, good: str, bad: str) -> None:
    validator = Validator({"$schema": f"http://{draft}", "format": name})
    assert validator.find_violations(good) == []
    assert [error.keyword for error in validator.find_violations(bad)] == ["format"]


@given(st.text(max_size=40), st.sampled_from(sorted(schemas.FORMATS.checkers)))
def test_no_text_makes_a_format_crash(text: str, name: str) -> None:
    assert len(find_violations({"format": name}, text)) <= 1


def test_the_draft_decides() -> None:
    tuple_of_draft_07 = {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "string"}], "additionalItems": False}
    assert [str(error) for error in Validator(tuple_of_draft_07).find_violations([1])] == ["$[0]: 1 is not of type string"]
    assert Validator(tuple_of_draft_07).find_violations(["a", "b"]) != []


def test_the_deepest_answer_that_parses_is_judged() -> None:
    tree = {"$defs": {"n": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/n"}}, {"type": "null"}]}}, "$ref": "#/$defs/n"}
    assert Validator(tree).find_violations(schemas.parse_json("[" * 100 + "null" + "]" * 100)) == []


def test_a_reference_is_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda request: asked.append(request))
    with pytest.raises(Exception, match=r"Unresolvable.*example\.com"):
        Validator({"$ref": "https://example.com/schema.json"}).find_violations(1)
    assert asked == []


def test_a_validator_travels() -> None:
    validator = Validator({"properties": {"x": MONEY}})
    assert (
        pickle.loads(pickle.dumps(validator)).find_violations({"x": Decimal("0.001")})
        == validator.find_violations({"x": Decimal("0.001")})
        != []
    )


@pytest.mark.skipif(not SUITE.exists(), reason="the shared corpus is absent")
@pytest.mark.parametrize("draft", ["draft2020-12", "draft7"])
def test_the_official_suite_agrees(draft: str) -> None:
    uri = {"draft2020-12": "https://json-schema.org/draft/2020-12/schema", "draft7": "http://json-schema.org/draft-07/schema#"}[draft]
    files = [path for path in sorted((SUITE / draft).glob("*.json")) if path.stem not in OTHER_PLACES]
    groups = [group for path in files for group in schemas.parse_json(path.read_text("utf-8")) if isinstance(group["schema"], dict)]
    differing, judged = [], 0
    for group in groups:
        validator = Validator({**group["schema"], "$schema": uri})
        differing += [(group, test) for test in group["tests"] if (validator.find_violations(test["data"]) == []) is not test["valid"]]
        judged += len(group["tests"])
    assert differing == []
    assert judged > 600


# --- null stands for what the pages do not show

SELLER = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}, "vat": {"type": "string"}}}
ORDER = {
    "type": "object",
    "required": ["total", "seller", "items"],
    "properties": {
        "total": {"type": "number"},
        "note": {"type": "string"},
        "seller": SELLER,
        "payer": SELLER,
        "items": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}},
        },
    },
}


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"note": None, "payer": None}, []),
        ({"payer": {"name": None, "vat": None}}, []),
        ({"payer": {"name": None, "vat": "DE1"}}, ["$.payer.name: is required and was not found"]),
        ({"payer": {}}, ["$.payer.name: is required and was not found"]),
        ({"total": None}, ["$.total: is required and was not found"]),
        ({"seller": None}, ["$.seller: is required and was not found"]),
        ({"seller": {"name": None}}, ["$.seller.name: is required and was not found"]),
        ({"items": [{"text": None}]}, ["$.items[0].text: is required and was not found"]),
        ({"items": [None]}, ["$.items[0]: null is not of type object"]),
    ],
)
def test_null_for_a_value_that_may_not_be_null_is_a_value_that_was_not_found(changes: dict[str, Any], messages: list[str]) -> None:
    value = {"total": 1, "seller": {"name": "A"}, "items": [{"text": "tea"}], **changes}
    assert [str(violation) for violation in Validator(ORDER).find_violations(value)] == messages


def test_the_value_itself_is_not_changed() -> None:
    value = {"total": 1, "note": None, "seller": {"name": "A"}, "items": [{"text": "tea"}]}
    Validator(ORDER).find_violations(value)
    assert value["note"] is None
    assert "note" in value
