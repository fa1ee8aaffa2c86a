"""Searches: a value of a record and its schemas in, the ways to look for it on a page out, the nearest to how it is written first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.evidence.dates import Day, PrintedDate, decide_order, scan_dates
from pipeline.evidence.letters import RUN, fold_text, read_query
from pipeline.evidence.numbers import describe_number, parse_number_text
from pipeline.evidence.page_index import Find, PageIndex, PageSet, sort_by_line
from pipeline.evidence.places import Place
from pipeline.evidence.text_layer import PageWords
from pipeline.records import WordMark
from pipeline.schema import LOCAL_DATE_TIME, Schema, dump_json

CURRENCY_SIGNS = {
    "AUD": ("a$", "$"), "BRL": ("r$",), "CAD": ("c$", "ca$", "$"), "CHF": ("sfr",), "CNY": ("¥", "元"), "CZK": ("kč",), "DKK": ("kr",),
    "EUR": ("€",), "GBP": ("£",), "HKD": ("hk$", "$"), "ILS": ("₪",), "INR": ("₹", "rs"), "JPY": ("¥", "円"), "KRW": ("₩", "원"),
    "MXN": ("$",), "MYR": ("rm",), "NOK": ("kr",), "NZD": ("nz$", "$"), "PHP": ("₱",), "PLN": ("zł",), "RUB": ("₽",), "SEK": ("kr",),
    "SGD": ("s$", "$"), "THB": ("฿",), "TRY": ("₺",), "UAH": ("₴",), "USD": ("us$", "$"), "VND": ("₫",), "ZAR": ("r",),
}  # fmt: skip
"""What documents print for a currency of ISO 4217, in lower case."""
DAY_FORMATS = {"date", "date-time", LOCAL_DATE_TIME}
ISO_TIME = re.compile(r"T?(?P<hour>\d\d):(?P<minute>\d\d)(?P<seconds>:\d\d)?")
MAX_DATE = 40
"""Most characters of a text that is a date and nothing else."""


class DocumentIndex:
    """The words of a document, page by page, in up to two orders of reading; those that a reader cannot see apart."""

    def __init__(self, pages: Iterable[PageWords]) -> None:
        self.words, self.by_line = list(pages), dict[int, PageSet]()

    def index_pages(self, hidden: bool) -> PageSet:
        """Return the indexes of the pages that have such words."""
        orders = [(page, np.flatnonzero((page.marks > WordMark.OVERLAY) == hidden).tolist()) for page in self.words]
        return PageSet(PageIndex(page, order) for page, order in orders if order)

    @cached_property
    def pages(self) -> PageSet:
        """What a reader sees, in the order of the text layer."""
        return self.index_pages(hidden=False)

    def read_lines(self, text: str) -> Iterator[PageSet]:
        """Yield the pages on which a text may stand that the text layer divides, in the order of their lines."""
        runs, query, is_day = RUN.findall(fold_text(text)), read_query(text), parse_date(text) is not None
        for page in self.pages:
            if all(run in page.text for run in runs) and (is_day or page.may_divide(query)):
                yield self.read_by_line(page)

    def read_by_line(self, page: PageIndex) -> PageSet:
        """Return a page in the order of its lines; it costs as much as the page."""
        if page.page_no not in self.by_line:
            words = next(one for one in self.words if one.page_no == page.page_no)
            self.by_line[page.page_no] = PageSet([PageIndex(words, [page.order[at] for at in sort_by_line(page.boxes)])])
        return self.by_line[page.page_no]

    @cached_property
    def hidden_pages(self) -> PageSet:
        """What a reader does not see."""
        return self.index_pages(hidden=True)

    @cached_property
    def day_first(self) -> bool | None:
        """Whether the day comes before the month in the document's dates; None if they do not tell."""
        return decide_order(date for page in self.pages for date in page.dates)


@dataclass(frozen=True, eq=False)
class Scalar:
    """A scalar of a record, and the schemas that apply to it."""

    path: str
    value: Any
    schemas: Sequence[Schema]
    group: str
    item: str
    name: str


Search = Callable[[PageSet], Iterator[Place]]
"""Pages -> where a value is printed on them, page by page."""


def choose_searches(scalar: Scalar, index: DocumentIndex) -> list[Search]:
    """Return what to look for on pages, what is nearest to the value as it is written first."""
    value = scalar.value
    if isinstance(value, bool):
        return list_printed_forms(scalar)
    if isinstance(value, int | float | Decimal):
        return [make_number_search([describe_number(value)[0]], dump_json(value), is_negative=value < 0)]
    text = str(value).strip()
    formats = {schema.get("format") for schema in scalar.schemas}
    date = parse_date(text) if formats & DAY_FORMATS or not formats - {None} else None
    day_first = index.day_first if date else None  # for which all dates of the document are read
    days = date.list_days(day_first) if date else []
    if formats & DAY_FORMATS and days:
        return [make_day_search(days, text, day_first)]
    if "time" in formats and (time := ISO_TIME.match(text)):
        return [make_text_search(text), *map(make_form_search, list_times(time))]
    keys, is_negative = parse_number_text(text)
    searches = [make_text_search(text, days, day_first, is_literal=bool(keys))]
    searches.append(make_number_search(keys, text, is_negative) if keys else make_form_search(text, is_loose=True))
    searches += [make_form_search(sign) for sign in CURRENCY_SIGNS.get(text, ())]
    return searches + list_printed_forms(scalar)


def list_printed_forms(scalar: Scalar) -> list[Search]:
    """Return what to look for by the titles that a schema gives its constants: `oneOf: [{const: true, title: PAID}, …]`."""
    titles = [
        schema["title"] for schema in scalar.schemas if schema.get("const") == scalar.value and "const" in schema and "title" in schema
    ]
    return [make_form_search(str(title)) for title in titles]


def make_text_search(text: str, days: Sequence[Day] = (), day_first: bool | None = None, is_literal: bool = False) -> Search:
    """Return a search for a text, and for days that it names, in whatever form; `is_literal` wants the text as it is written."""
    core, query = strip_marks(text), read_query(text)

    def search_text(pages: PageSet) -> Iterator[Place]:
        if not days:
            for page, finds in pages.find_text(query):
                yield from place_text(page, finds)
            return
        texts = dict(pages.find_text(query))
        printed = [pages.find_day(day, day_first) for day in days]
        for page in pages:
            yield from place_text(page, texts.get(page, ()))
            for found in printed:
                yield from (Place(page, find, page.get_printed(find) == core) for find in found.get(page, ()))

    def place_text(page: PageIndex, finds: Iterable[Find]) -> Iterator[Place]:
        for find in finds:
            whole = page.extend_find(find, query)
            is_exact = page.get_printed(whole) in (core, text)
            if is_exact or not is_literal:
                yield Place(page, whole, is_exact)

    return search_text


def make_form_search(form: str, is_loose: bool = False) -> Search:
    """Return a search for another form of a value; with `is_loose` numbers in it may be divided otherwise: DE89370400 for DE89 3704 00."""
    query = read_query(form)

    def search_form(pages: PageSet) -> Iterator[Place]:
        return (Place(page, find, False) for page, finds in pages.find_text(query, is_loose) for find in finds)

    return search_form


def make_day_search(days: Sequence[Day], text: str, day_first: bool | None) -> Search:
    """Return a search for a day, and for the time of day where there is one: of another time the day alone is no match."""
    time = ISO_TIME.search(text, 10)
    forms = list_times(time) if time and (time["hour"], time["minute"]) != ("00", "00") else []

    def search_day(pages: PageSet) -> Iterator[Place]:
        printed = [pages.find_day(day, day_first) for day in days]
        timed = {page for form in forms for page, _ in pages.find_text(read_query(form))}
        for page in pages:
            for find in (find for found in printed for find in found.get(page, ()) if page in timed or not forms):
                yield Place(page, find, page.get_printed(find) == text)

    return search_day


def make_number_search(keys: Sequence[str], text: str, is_negative: bool) -> Search:
    """Return a search for a number in whatever form, with its sign."""
    plain = text.lstrip("-")

    def search_number(pages: PageSet) -> Iterator[Place]:
        for page, numbers in pages.find_number(keys):
            for number in numbers:
                if number.sign != "" if is_negative else number.sign != "-":
                    find = Find(number.start, number.end)
                    yield Place(page, find, page.get_printed(find) == plain)

    return search_number


def list_times(time: re.Match[str]) -> list[str]:
    """Return how a time of day may be printed: 14:05:00, 14:05, 2:05 pm."""
    hour, minute = int(time["hour"]), time["minute"]
    short = f"{time['hour']}:{minute}"
    forms = [f"{short}{time['seconds']}"] if time["seconds"] else []
    twelve = f"{(hour - 1) % 12 + 1}:{minute}"
    half = "am" if hour < 12 else "pm"
    return [*forms, short, *([f"{hour}:{minute}"] if hour < 10 else []), f"{twelve} {half}", f"{twelve}{half}"]


def parse_date(text: str) -> PrintedDate | None:
    """Return what a text is as a date, if it is one and nothing else; a time of day may follow one of ISO 8601."""
    if re.match(r"\d{4}-\d\d-\d\d(?:[Tt ]\d\d:\d\d|$)", text):
        text = text[:10]
    if len(text) > MAX_DATE or not any(map(str.isdigit, text)):
        return None
    folded = fold_text(text)
    return next((date for date in scan_dates(folded) if date.end - date.start == len(folded)), None)


def strip_marks(text: str) -> str:
    """Return a text without the marks before its first letter or digit and after its last one, its white space as single spaces."""
    inside = " ".join(text.split())
    found = re.search(r"[^\W_].*[^\W_]|[^\W_]", inside)
    return found[0] if found else inside
