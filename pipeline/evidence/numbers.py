"""Numbers as documents print them: text in, the values that it can be read as out.

    "1.234,50" -> 1234.5      "1 234,50 €" -> 1234.5      "1,234" -> 1234 or 1.234      "(12.00)" -> 12 or -12     "19 %" -> 19 or 0.19

A value is compared by its canonical text: no sign, no leading zeros, no zeros at the end of a fraction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

DIGITS = r"\d+(?:[.,'’]\d+)*"
NUMBER = re.compile(DIGITS)
BEFORE_NUMBER = re.compile(r"(?:^|[\W_])(?P<currency>[^\W\d_]{1,4}\.?)?$")
"""What may stand before a number: not a word, but a currency does: EUR12, Rs.12."""
BEFORE, SIGN_CHARACTERS = 6, 4
"""Characters that are looked at before a number, and before a number with its currency for a sign."""
AFTER_NUMBER = re.compile(r"[ ]?%|-(?!\w)|[-/:]\d")
SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?:[ \u00a0\u202f]\d{3})+(?:[.,]\d+)?(?![\d.,]*\d)")
"""Groups of three digits with spaces between them."""
MINUS = r"\-\u2010\u2011\u2012\u2013\u2212"
SIGN_BEFORE = re.compile(rf"(?:^|[^\w])(?P<sign>[{MINUS}(])[^\w\s{MINUS}]?$")
YEAR_DIGITS = 4
PADDED = re.compile(r"00+[1-9]")
"""Digits that begin so are a code: 0000003 is no amount."""
SPACES = re.compile("[ \u00a0\u202f]")
NO_MARKS = dict.fromkeys(map(ord, ".,'’ \u00a0\u202f"))
PARTS = re.compile(r"(\d+)([.,'’])?")
CURRENCIES = "aud brl cad chf cny czk dkk eur gbp hkd huf inr jpy mxn myr nok nzd pln ron sek sgd thb try usd zar".split()
CURRENCY = rf"(?:[$€£¥₹₩₺₽฿₫₱₪₴]|us\$|rm|rs\.?|kr\.?|zł|kč|{'|'.join(CURRENCIES)})"
PLAIN_VALUE = re.compile(
    rf"""(?P<sign>[{MINUS}(])?\s?{CURRENCY}?\s?(?P<minus>[{MINUS}])?
    (?P<number>{DIGITS}|\d{{1,3}}(?:[ ]\d{{3}})+(?:[.,]\d+)?)\s?{CURRENCY}?\s?\)?""",
    re.IGNORECASE | re.VERBOSE,
)
"""A text that is a number, with a currency perhaps."""


@dataclass(frozen=True, slots=True)
class PrintedNumber:
    """A number in a text, from `start` to `end`."""

    start: int
    end: int
    keys: tuple[str, ...]
    """What it can be read as, in canonical form."""
    sign: str
    """`-` where a minus stands before or after it, `(` in brackets, which may mean the same, else ``."""


class NumberIndex:
    """The numbers of a text, all by their digits; what one can be read as, and what stands around it, is looked at when it is wanted."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.spans: dict[str, list[tuple[int, int]]] = {}
        self.found: dict[str, list[PrintedNumber]] = {}
        """What was looked for so far: the items of a table have values in common."""
        for pattern in (NUMBER, SPACED):
            for found in pattern.finditer(text):
                self.spans.setdefault(strip_digits(found[0]), []).append(found.span())

    def find(self, key: str) -> list[PrintedNumber]:
        """Return the numbers that can be read as a value in canonical form, in order; then those whose digits are in groups."""
        if key not in self.found:
            read = (self.read_number(start, end) for start, end in self.spans.get(strip_digits(key), ()))
            self.found[key] = [number for number in read if number and key in number.keys]
        return self.found[key]

    def read_number(self, start: int, end: int) -> PrintedNumber | None:
        """Return what digits of the text are as a number.

        None for those that marks join to others, the parts of a date, a time or an invoice's number, but not for the years of 1968-1973.
        """
        digits, before = self.text[start:end], self.text[max(0, start - BEFORE) : start]
        if SPACES.search(digits):
            return PrintedNumber(start, end, tuple(list_readings("".join(digits.split()))), find_sign(before[-SIGN_CHARACTERS:]))
        keys = list_readings(digits) if not PADDED.match(digits) else []
        if not keys or not (edge := BEFORE_NUMBER.search(before)):
            return None
        after = found[0] if (found := AFTER_NUMBER.match(self.text, end)) else ""
        if after.endswith("%"):
            keys += [shift_percent(key) for key in keys]
        marks = "/:" if len(digits) == YEAR_DIGITS else "-/:"
        begin = start - len(edge["currency"] or "")
        before = self.text[max(0, begin - SIGN_CHARACTERS) : begin]
        if (after[:1] in marks and after[-1:].isdigit()) or is_part(before, marks):
            return None
        return PrintedNumber(start, end, tuple(keys), "-" if after == "-" else find_sign(before))


def strip_digits(number: str) -> str:
    """Return the digits of a number without zeros at its ends, which are the same in all of its forms: 12345 for 1.234,50 and 0.12345."""
    return number.translate(NO_MARKS).strip("0")


def is_part(before: str, marks: str) -> bool:
    """Say whether text before a number joins it to another by one of these marks, or to letters: INV/2012, but not Total:12."""
    return before[-1:] in marks and (before[-2:-1].isdigit() or (before[-1:] != ":" and before[-2:-1].isalpha()))


def find_sign(before: str) -> str:
    """Return the sign of a number after this text."""
    found = SIGN_BEFORE.search(before)
    return "" if not found else "(" if found["sign"] == "(" else "-"


def list_readings(digits: str) -> list[str]:
    """Return the values that digits with separators can be read as; none for what is no number, such as 08.10.2015."""
    groups = PARTS.findall(digits)
    numbers, marks = [group[0] for group in groups], [group[1] for group in groups[:-1]]
    if not marks:
        return [make_key(numbers[0], "")]
    grouped = [len(group) for group in numbers[1:]]
    is_whole = len(numbers[0]) <= 3 and numbers[0][0] != "0" and grouped[-1] == 3 and {*grouped} <= {2, 3} and len({*marks}) == 1
    if len(marks) == 1:
        whole = [make_key("".join(numbers), "")] if is_whole else []
        return whole if marks[0] in "'’" else [*whole, make_key(numbers[0], numbers[1])]
    if is_whole:
        return [make_key("".join(numbers), "")]
    if marks[-1] in ".," and marks[-1] not in marks[:-1] and {*grouped[:-1]} <= {2, 3}:
        return [make_key("".join(numbers[:-1]), numbers[-1])]
    return []


def make_key(whole: str, fraction: str) -> str:
    """Return the canonical text of a number's digits."""
    fraction = fraction.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{fraction}" if fraction else "")


def shift_percent(key: str) -> str:
    """Return the canonical text of a hundredth of a number: 19 -> 0.19."""
    whole, _, fraction = key.partition(".")
    whole = whole.rjust(3, "0")
    return make_key(whole[:-2], whole[-2:] + fraction)


def describe_number(value: float | Decimal) -> tuple[str, bool]:
    """Return the canonical text of a value and whether it is negative."""
    try:
        text = format(abs(Decimal(str(value))), "f")
    except (InvalidOperation, ValueError):
        return "", False
    whole, _, fraction = text.partition(".")
    return make_key(whole, fraction), value < 0


def parse_number_text(text: str) -> tuple[list[str], bool]:
    """Return what a text that is a number, with a currency perhaps, can be read as, and whether it is negative."""
    found = PLAIN_VALUE.fullmatch(text.strip())
    return (list_readings("".join(found["number"].split())), bool(found["sign"] or found["minus"])) if found else ([], False)
