"""The prompt, word for word. `test_schema.py` pins the two prompts of the demonstration model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.errors import JobError
from pipeline.schema import prompt

PAGE = np.zeros((28, 28, 3), np.uint8)


def outline_schema(properties: dict[str, Any], **root: Any) -> list[str]:
    """Return the outline of a schema with these properties."""
    schema = {"type": "object", "properties": properties, **root}
    return list(prompt.outline_properties(schema, schema))


def describe_part(part: dict[str, Any]) -> str:
    """Return the description of a property's type in the outline."""
    (line,) = outline_schema({"x": part})
    return line.removeprefix("- x (").removesuffix(")")


def build_last_line(pages: int, *which: Any) -> str:
    """Return the line after the page images."""
    last = prompt.build_messages("sys", [PAGE] * pages, *which)[-1].parts[-1]
    assert isinstance(last, str)
    return last


# --- the system message


def test_task_instructions_and_schema_stand_in_this_order() -> None:
    schema = {"title": "Bill", "description": "A bill.", "type": "object", "properties": {"total": {"type": "number"}}}
    assert prompt.build_system_message(schema, " Look twice.\n") == f"{prompt.TASK}\nLook twice.\nBill. A bill.\n- total (number)"


def test_without_instructions_there_is_no_empty_line() -> None:
    assert "\n\n" not in prompt.build_system_message({"type": "object", "properties": {"total": {"type": "number"}}})


def test_a_schema_without_a_title_is_a_document() -> None:
    assert prompt.format_heading({"type": "object"}) == "Document."


def test_titles_and_descriptions_come_with_their_property_on_one_line() -> None:
    lines = outline_schema({"due": {"title": "Due date", "description": "The day\n  payment is due.", "type": "string", "format": "date"}})
    assert lines == ["- due (date YYYY-MM-DD): Due date. The day payment is due."]


@pytest.mark.parametrize(
    "held", [{"instructions": "<|im_end|>"}, {"title": "a <|vision_start|> b"}, {"properties": {"x": {"description": "</tool_call>"}}}]
)
def test_a_control_token_is_refused_wherever_it_stands(held: dict[str, Any]) -> None:
    instructions = held.pop("instructions", "")
    with pytest.raises(JobError, match="control token"):
        prompt.build_system_message({"type": "object", **held}, instructions)


# --- the outline


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "string"}, "string"),
        ({"type": ["string", "null"], "format": "date"}, "date YYYY-MM-DD or null"),
        ({"type": "string", "format": "date-time"}, "date and time, RFC 3339"),
        ({"type": "string", "format": "email"}, "string"),
        ({"type": ["integer", "null"]}, "integer or null"),
        ({"enum": ["EUR", "USD", None]}, "one of EUR, USD, null"),
        ({"enum": [1, True]}, "one of 1, true"),
        ({"const": "B"}, '"B"'),
        ({"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "string"}]}, "string or null"),
        ({"oneOf": [{"type": "string"}, True]}, "string or any"),
        ({}, "any"),
        ({"type": "array", "items": {"type": ["string", "null"]}}, "array of string or null"),
        ({"type": "array", "items": {"type": "array", "items": {"type": "number"}}}, "array of array of number"),
        ({"type": ["array", "null"], "items": {"enum": ["a", "b"]}}, "array of one of a, b or null"),
        ({"type": "array"}, "array"),
        ({"type": "array", "items": True}, "array"),
    ],
)
def test_a_type_is_said_in_words(part: dict[str, Any], words: str) -> None:
    assert describe_part(part) == words


def test_properties_of_objects_and_of_items_are_indented_below() -> None:
    inner = {"type": "object", "properties": {"name": {"type": "string"}}}
    assert outline_schema({"party": inner, "lines": {"type": "array", "items": inner}}) == [
        "- party (object)",
        "  - name (string)",
        "- lines (array)",
        "  - name (string)",
    ]


def test_a_reference_is_followed_and_keeps_the_title_beside_it() -> None:
    party = {"type": "object", "title": "Party", "properties": {"name": {"type": "string"}}}
    lines = outline_schema({"buyer": {"title": "Buyer", "$ref": "#/$defs/party"}}, **{"$defs": {"party": party}})
    assert lines == ["- buyer (object): Buyer.", "  - name (string)"]


def test_a_recursive_schema_is_followed_once() -> None:
    node = {"type": "object", "properties": {"name": {"type": "string"}, "parts": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}
    lines = outline_schema({"root": {"$ref": "#/$defs/node"}}, **{"$defs": {"node": node}})
    assert lines == ["- root (object)", "  - name (string)", "  - parts (array)"]


def test_alternatives_show_the_properties_of_each() -> None:
    options = [{"type": "object", "properties": {name: {"type": "string"}}} for name in ("iban", "card")]
    assert outline_schema({"paid": {"anyOf": options}}) == ["- paid (object)", "  - iban (string)", "  - card (string)"]


# --- the conversation


def test_the_system_message_comes_first_then_the_pages_then_the_question() -> None:
    first, second = PAGE.copy(), PAGE.copy()
    system, user = prompt.build_messages("sys", [first, second])
    assert (system.role, system.parts) == ("system", ("sys",))
    assert user.role == "user"
    assert [id(part) for part in user.parts[:2]] == [id(first), id(second)]
    assert user.parts[2:] == (prompt.ASK,)


def test_a_whole_document_is_asked_without_page_numbers() -> None:
    assert build_last_line(2) == build_last_line(2, [], 2) == prompt.ASK


def test_a_part_of_a_document_says_which_of_its_pages_these_are() -> None:
    assert build_last_line(2, [5, 6], 6) == f"These are pages 5 to 6 of 6. {prompt.ASK}"


def test_the_first_part_of_a_document_says_so_too() -> None:
    assert build_last_line(4, [1, 2, 3, 4], 6) == f"These are pages 1 to 4 of 6. {prompt.ASK}"


def test_pages_between_which_one_is_missing_are_listed() -> None:
    assert build_last_line(3, [1, 2, 4], 4) == f"These are pages 1, 2, 4 of 4. {prompt.ASK}"


def test_a_re_ask_shows_the_answer_and_what_is_wrong_with_it() -> None:
    asked = prompt.build_messages("sys", [PAGE])
    again = prompt.build_correction(asked, '{"total":"x"}', ["$.total: not a number", "$: no date"])
    assert again[:2] == asked
    assert (again[2].role, again[2].parts) == ("assistant", ('{"total":"x"}',))
    assert "- $.total: not a number\n- $: no date\n" in str(again[3].parts[0])


def test_an_error_that_quotes_a_control_token_cannot_end_the_turn() -> None:
    again = prompt.build_correction(prompt.build_messages("sys", [PAGE]), "{}", ["$.name: '<|im_end|>' is too long"])
    assert "<|" not in str(again[-1].parts[0])
