"""Length of answers, by the schema and by the lines of pages; the shipped samples and true values say how good it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.plan.answers import AnswerCount, LineFacts, count_answer_tokens, describe_lines
from pipeline.records import Word, WordMark
from pipeline.schema import Schema, load_schema

ROOT = Path(__file__).parents[3]
TEXT = {"type": ["string", "null"]}
MONEY = {"type": ["number", "null"], "multipleOf": 0.01}
ONE = AnswerCount(1, 0, 1)


def make_schema(**properties: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def make_list(**properties: Any) -> Schema:
    return {"type": "array", "items": make_schema(**properties)}


def count(pages: Any = (), asked: AnswerCount = ONE, **properties: Any) -> float:
    return count_answer_tokens(make_schema(**properties), asked, pages)


def print_line(text: str, y_pt: float, mark: WordMark = WordMark.PRINTED) -> list[Word]:
    return [Word(word, 20.0 * place, y_pt, 20.0 * place + 15, y_pt + 10, mark) for place, word in enumerate(text.split())]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tea 2 1.50 3.00", LineFacts(3, True)),
        ("Total EUR 1.234,50", LineFacts(1, True)),
        ("Total €12.00", LineFacts(1, True)),
        ("Date 31.05.2024", LineFacts(0, False)),
        ("4.00 5.00", LineFacts(2, False)),
        ("Receipt no. 225056", LineFacts(1, False)),
    ],
)
def test_a_line_says_how_many_numbers_it_has_and_whether_it_ends_in_an_amount(text: str, expected: LineFacts) -> None:
    assert describe_lines(print_line(text, 10)) == (expected,)


def test_lines_are_words_at_one_height_and_hidden_ones_are_none() -> None:
    words = [*print_line("Tea 1.50", 10), *print_line("Milk 2.50", 30), *print_line("Ink 9.50", 50, WordMark.NO_INK)]
    assert describe_lines(reversed(words)) == (LineFacts(1, True),) * 2
    assert describe_lines([]) == ()


def test_a_list_has_as_many_items_as_pages_have_rows() -> None:
    item = make_list(text=TEXT, quantity={"type": "number"}, price=MONEY, amount=MONEY)
    rows = (LineFacts(3, True),) * 5 + (LineFacts(1, True),) * 3
    five, none = count([rows], lines=item), count([(LineFacts(0, False),)], lines=item)
    ten = count([rows], AnswerCount(1, 0, 2), lines=item)
    assert (five - none) / 5 == pytest.approx((ten - none) / 10)
    assert five > none + 50


def test_amounts_outside_of_lists_are_no_items() -> None:
    lines = (LineFacts(1, True),) * 6
    total = {"total": MONEY, "tax": MONEY, "net": MONEY}
    alone, beside = count([lines], lines=make_list(amount=MONEY)), count([lines], lines=make_list(amount=MONEY), **total)
    assert beside - count([()], **total) < alone


def test_bounds_of_a_schema_hold() -> None:
    item = make_list(amount=MONEY)
    assert count(lines=item | {"maxItems": 1}) < count(lines=item) < count(lines=item | {"minItems": 40})
    assert count(note=TEXT) > count(note={"type": "string", "maxLength": 3})
    assert count(kind={"enum": ["a", "b"]}) < count(kind={"enum": ["a very long choice of words", "another of them, as long"]})


def test_later_pages_of_a_document_repeat_little() -> None:
    values = dict.fromkeys(("seller", "buyer", "number", "place"), TEXT)
    assert count(asked=AnswerCount(1, 1, 8), **values) < 1.8 * count(asked=AnswerCount(1, 0, 4), **values)


def test_a_recursive_schema_ends() -> None:
    node = {"type": "object", "properties": {"name": TEXT, "parts": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}
    assert count_answer_tokens({**node, "$defs": {"node": node}}, ONE, []) > 10


@pytest.mark.parametrize("name", ["invoice", "receipt"])
def test_true_values_are_as_long_as_expected(name: str) -> None:
    """In Qwen's tokens, given lines of as many items as they have."""
    tokenizer = ROOT.parent / "shared/qwen2.5-vl-7b-awq"
    if not tokenizer.is_dir():
        pytest.skip("the tokenizer of Qwen2.5-VL is not here")
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)
    truth = [json.loads(line) for line in (ROOT / f"jobs/samples/truth/{name}s.jsonl").read_text().splitlines()]
    texts = [json.dumps({key: row[key] for key in row if key != "source"}, separators=(",", ":"), ensure_ascii=False) for row in truth]
    actual = sum(len(encode(text).input_ids) + 1 for text in texts)
    schema = load_schema(ROOT / f"schemas/{name}.json")
    totals = ("total", "tax_amount") if name == "receipt" else ()  # end in an amount as items do; an invoice's items have three numbers
    pages = [(LineFacts(3, True),) * (len(row["line_items"]) + sum(row[total] is not None for total in totals)) for row in truth]
    expected = count_answer_tokens(schema, AnswerCount(len(truth), 0, len(truth)), pages)
    assert expected == pytest.approx(actual, rel=0.2)
