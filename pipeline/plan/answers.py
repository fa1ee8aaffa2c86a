"""Length of answers: a schema and the lines of some pages in, the tokens of a run's answers out.

Tokens are those of compact JSON in Qwen's tokenizer: a token for each digit, for each run of punctuation, and for most words.

    {"invoice_number":"A-0012","invoice_date":"2024-05-31","total":19.99,"line_items":[{"amount":1.50}]}

A page says by its lines how many items a list has. Where an item has three numbers or more (quantity, price, amount), these are the lines
with as many; where it has fewer, those that end in an amount, without those of the amounts that stand outside of lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.records import Word
from pipeline.schema import Schema, list_types, walk_in_place

PRESENT, PRESENT_LATER = 0.75, 0.3
"""Share of the values outside of lists that are not null: in an answer about a document, and in one about its later pages."""
ROWS_PER_PAGE = 4.0
"""Items of a list on a page of which no text is known."""
PLAIN_ITEMS = 4.0
"""Items of a list whose items have no number."""
COUNT_TOKENS = 1.5
"""Of a whole number, or of one that is no sum of money by its name and schema."""
AMOUNT_TOKENS, AMOUNT_TOKENS_IN_LISTS = 6.5, 5.5
"""Of a sum of money: each digit is one. Measured, as the others, on the true values of the samples: totals have a digit more than items."""
AMOUNT_NAME = r"amount|sub_?total|total|sum|price|net|gross|tax|vat|balance|paid|due|cost|costs|fee|salary|value|discount"
FORMAT_TOKENS = {"date": 10.0, "date-time": 20.0, "x-local-date-time": 19.0, "time": 9.0, "email": 8.0, "uri": 14.0}
NAME_TOKENS = (
    (r"iban|account", 20.0),
    (r"number|no|nr|id|code|reference|ref|order|phone|fax|vat|sku|ean|serial", 8.0),
    (r"address|street", 18.0),
    (r"email|mail|url|website", 9.0),
    (r"summary|notes?|comments?|remarks?|terms|abstract", 25.0),
    (r"currency|country|unit|language", 1.5),
)
"""Tokens of a text by a word of its property's name; the first that fits."""
TEXT_TOKENS, TEXT_TOKENS_IN_LISTS = 5.0, 3.0
"""Of any other text: a name, an address line; in lists a description of goods."""
CHARACTERS_PER_TOKEN_OF_TEXT = 3.0
MAX_DEPTH = 8
LETTER, NUMBER = re.compile(r"[^\W\d_]"), re.compile(r"\D{0,3}\d[\d.,'’]*\D{0,3}")
AMOUNT, DAY = re.compile(r"\D{0,3}\d[\d.,'’]*[.,]\d\d\D{0,3}"), re.compile(r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}\D?")


@dataclass(frozen=True)
class LineFacts:
    """What a line of print says of a list."""

    numbers: int
    ends_in_amount: bool


@dataclass(frozen=True)
class AnswerCount:
    """The requests of a run."""

    first: int
    """About the first pages of a document, or all of them."""
    later: int
    pages: int


def describe_lines(words: Iterable[Word]) -> tuple[LineFacts, ...]:
    """Return what the lines of a page say; words whose middles are at one height are a line."""
    lines: list[list[Word]] = []
    bottom_pt = float("-inf")
    for word in sorted((word for word in words if not word.mark.is_hidden), key=lambda word: word.y0_pt + word.y1_pt):
        if (word.y0_pt + word.y1_pt) / 2 > bottom_pt:
            lines.append([])
            bottom_pt = word.y1_pt
        lines[-1].append(word)
    return tuple(describe_line([word.text for word in sorted(line, key=lambda word: word.x0_pt)]) for line in lines)


def describe_line(texts: Sequence[str]) -> LineFacts:
    """Return what a line of these words says."""
    numbers = sum(1 for text in texts if NUMBER.fullmatch(text) and not DAY.fullmatch(text))
    has_name = any(LETTER.search(text) for text in texts[:-1])
    return LineFacts(numbers, has_name and bool(AMOUNT.fullmatch(texts[-1])))


def count_answer_tokens(schema: Schema, asked: AnswerCount, pages: Sequence[tuple[LineFacts, ...]], factor: float = 1.0) -> float:
    """Return the tokens of all answers of a run, whose lists have `factor` times as many items as these pages say."""
    counter = TokenCounter(schema, pages, factor)
    total = 0.0
    for requests, present in ((asked.first, PRESENT), (asked.later, PRESENT_LATER)):
        counter.present, counter.pages_per_request = present, asked.pages / max(1, asked.first + asked.later)
        total += requests * (counter.count_value(schema, "", 0) + 2)  # and the braces, and the token that ends an answer
    return total


class TokenCounter:
    """Counts the tokens of values of one schema."""

    def __init__(self, schema: Schema, pages: Sequence[tuple[LineFacts, ...]], factor: float) -> None:
        self.schema, self.pages, self.factor = schema, [page for page in pages if page], factor
        self.present, self.pages_per_request = PRESENT, 1.0
        self.amounts = sum("number" in self.list_kinds(part) for _, part in self.list_properties(schema))

    def count_value(self, part: Any, name: str, depth: int, in_list: bool = False) -> float:
        """Return the tokens of a value, a property of this name."""
        if depth > MAX_DEPTH:
            return 1.0
        properties = list(self.list_properties(part))
        kinds = self.list_kinds(part)
        if properties:
            return sum(count_name_tokens(inner) + 2 + self.count_value(sub, inner, depth + 1, in_list) for inner, sub in properties)
        if "array" in kinds and (item := self.find_item(part)) is not None:
            separator = 0 if any(self.list_properties(item)) else 1  # between objects it is one token with the quote of the next name
            return 1 + self.count_items(part, item) * (separator + self.count_value(item, name, depth + 1, in_list=True))
        present = self.present if not in_list and self.allows_null(part) else 1.0
        return present * self.count_scalar(part, kinds, name, in_list) + (1 - present)

    def count_scalar(self, part: Any, kinds: set[str], name: str, in_list: bool) -> float:
        """Return the tokens of a value that is neither null nor has others in it."""
        shapes = list(walk_in_place(part, self.schema))
        if choices := [str(value) for shape in shapes for value in shape.get("enum", []) if value is not None]:
            return sum(1 + len(choice) // 8 for choice in choices) / len(choices)
        if "number" in kinds and (any(shape.get("multipleOf", 1) < 1 for shape in shapes) or has_word(name, AMOUNT_NAME)):
            return AMOUNT_TOKENS_IN_LISTS if in_list else AMOUNT_TOKENS
        if kinds & {"number", "integer"}:
            return COUNT_TOKENS
        if "string" not in kinds:
            return 1.0
        if form := next((shape["format"] for shape in shapes if shape.get("format") in FORMAT_TOKENS), None):
            return FORMAT_TOKENS[form]
        other = TEXT_TOKENS_IN_LISTS if in_list else TEXT_TOKENS
        tokens = next((count for pattern, count in NAME_TOKENS if has_word(name, pattern)), other)
        longest = min((shape["maxLength"] for shape in shapes if "maxLength" in shape), default=None)
        return tokens if longest is None else min(tokens, max(1.0, float(longest) / CHARACTERS_PER_TOKEN_OF_TEXT))

    def count_items(self, part: Any, item: Any) -> float:
        """Return how many items a list has in an answer."""
        kinds = [self.list_kinds(inner) for _, inner in self.list_properties(item)]
        numbers = sum(bool({"number", "integer"} & found) for found in kinds)
        items = self.factor * (self.count_rows(numbers) * self.pages_per_request if numbers else PLAIN_ITEMS)
        shapes = list(walk_in_place(part, self.schema))
        least = max((shape["minItems"] for shape in shapes if "minItems" in shape), default=0)
        most = min((shape["maxItems"] for shape in shapes if "maxItems" in shape), default=items)
        return float(max(least, min(items, most)))

    def count_rows(self, numbers: int) -> float:
        """Return how many items with so many numbers a page has, on average of those of which the text is known."""
        if not self.pages:
            return ROWS_PER_PAGE
        if numbers >= 3:
            return sum(line.numbers >= numbers for page in self.pages for line in page) / len(self.pages)
        outside = (1 + self.amounts) / 2 if self.amounts else 0.0  # a total, and half of what else a document may state
        return sum(max(0.0, sum(line.ends_in_amount for line in page) - outside) for page in self.pages) / len(self.pages)

    def list_properties(self, part: Any) -> Iterator[tuple[str, Any]]:
        """Yield the properties of an object, in all schemas that apply to it."""
        found = {name: inner for shape in walk_in_place(part, self.schema) for name, inner in shape.get("properties", {}).items()}
        yield from found.items()

    def list_kinds(self, part: Any) -> set[str]:
        """Return the types of a value, null left out."""
        return {kind for shape in walk_in_place(part, self.schema) for kind in list_types(shape)} - {"null"}

    def find_item(self, part: Any) -> Any:
        """Return the schema of a list's items; None where there is none."""
        return next((shape["items"] for shape in walk_in_place(part, self.schema) if isinstance(shape.get("items"), dict)), None)

    def allows_null(self, part: Any) -> bool:
        shapes = list(walk_in_place(part, self.schema))
        return any("null" in list_types(shape) or None in shape.get("enum", ()) for shape in shapes)


def has_word(name: str, pattern: str) -> bool:
    """Say whether one of the words of a property's name is of a pattern, or the name is."""
    return any(re.fullmatch(pattern, word) for word in (name.lower(), *re.findall(r"[a-z]+", name.lower())))


def count_name_tokens(name: str) -> float:
    """Return the tokens of a property's name: its words, a long one two."""
    words = re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+|\d", name.replace("_", " "))
    return sum(1 + len(word) // 13 for word in words) or 1
