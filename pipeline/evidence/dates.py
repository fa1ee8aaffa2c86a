"""Dates as documents print them: text in, the days that it can be read as out.

    "5/22/20" -> 2020-05-22      "22. Mai 2020" -> 2020-05-22      "04/03/2018" -> 2018-03-04 or 2018-04-03

Whether a day or a month comes first is decided for a document by its dates that have only one reading; a dot means that the day does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Day = tuple[int, int, int]
"""Year, month, day."""
MIN_VOTES, MIN_SHARE = 2, 0.75
NAMES = """
january januar janvier enero gennaio januari janeiro styczeń stycznia jan janv ene gen sty
february februar février fevrier febrero febbraio februari fevereiro luty lutego feb févr fevr fev fév
march märz marz mars marzo maart março marco marzec marca mar mär mrz mrt
april avril abril aprile kwiecień kwietnia apr avr abr kwi
may mai mayo maggio mei maio maj maja mag
june juni juin junio giugno junho czerwiec czerwca jun giu cze
july juli juillet julio luglio julho lipiec lipca jul juil lug lip
august août aout agosto augustus sierpień sierpnia aug ago sie
september septembre septiembre settembre setembro wrzesień września sep sept set wrz
october oktober octobre octubre ottobre outubro październik października oct okt ott out paź
november novembre noviembre novembro listopad listopada nov lis
december dezember décembre decembre diciembre dicembre dezembro grudzień grudnia dec dez déc dic gru
"""
MONTHS = {name: number for number, line in enumerate(NAMES.strip().splitlines(), 1) for name in line.split()}
NAME = "|".join(sorted(MONTHS, key=len, reverse=True))
YEAR = r"(?:(?:19|20)\d\d|['’]?\d\d)(?!\d(?!\d?:\d\d))"
"""Of four digits or two; a time may follow without a space, as OCR reads it."""
DATE = re.compile(
    rf"""(?<!\d)(?<!\d[./-])(?:
      (?P<a>\d{{1,2}})[ ]?(?P<mark>[./-])[ ]?(?P<b>\d{{1,2}})[ ]?(?P=mark)[ ]?(?P<c>{YEAR})
    | (?P<y1>(?:19|20)\d\d)[ ]?(?P<mark1>[./-])[ ]?(?P<m1>\d{{1,2}})[ ]?(?P=mark1)[ ]?(?P<d1>\d{{1,2}})(?!\d(?!\d?:\d\d))
    | (?P<d2>\d{{1,2}})(?:st|nd|rd|th|er|[ºª])?[\s.,/-]{{0,2}}(?:of\s|de\s)?(?<![^\W\d_])(?P<n2>{NAME})(?![^\W\d_])
      [\s.,/-]{{0,3}}(?:del?\s)?(?P<y2>{YEAR})
    | (?P<y4>(?:19|20)\d\d)[\s.,/-]{{1,2}}(?P<n4>{NAME})\.?[\s.,/-]{{1,2}}(?P<d4>\d{{1,2}})(?!\d)
    | (?P<y5>(?:19|20)\d\d)[ ]?[年년][ ]?(?P<m5>\d{{1,2}})[ ]?[月월][ ]?(?P<d5>\d{{1,2}})[ ]?[日일]
    | (?P<y6>(?:19|20)\d\d)(?P<m6>0[1-9]|1[0-2])(?P<d6>0[1-9]|[12]\d|3[01])(?!\d)
    | (?P<a7>\d{{1,2}})[ ](?P<b7>\d{{1,2}})[ ](?P<c7>(?:19|20)\d\d)(?!\d)
    )""",
    re.VERBOSE,
)
"""On text in lower case, from a number on."""
NAMED = re.compile(rf"(?P<n3>{NAME})\.?[\s-]{{0,2}}(?P<d3>\d{{1,2}})(?!\d)(?:st|nd|rd|th)?[\s,/-]{{1,3}}(?P<y3>{YEAR})")
FORMS = {
    "c": ("a", "b", "c"), "c7": ("a7", "b7", "c7"), "d1": ("y1", "m1", "d1"), "y2": ("y2", "n2", "d2"), "y3": ("y3", "n3", "d3"),
    "d4": ("y4", "n4", "d4"), "d5": ("y5", "m5", "d5"), "d6": ("y6", "m6", "d6"),
}  # fmt: skip
"""Of each form of a date its last group, and the groups of year, month and day, or of its three numbers."""
BEFORE = re.compile(r"([^\W\d_]+)\.?[\s-]{0,2}$")
NUMBER_START = re.compile(
    r"""(?<!\d)(?:\d{8}(?!\d)|\d{1,4}(?!\d)
    (?=[ ]?[./-][ ]?\d{1,2}[ ]?[./-] | [\s,/-]{1,3}['’]?\d | [\s.,/-]{0,2}[^\W\d_] | [ºª]))""",
    re.VERBOSE,
)
"""A number after which a date may go on."""
MAX_NAME = 15
NAME_ENDS = frozenset(name[-2:] for name in MONTHS)
DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


@dataclass(frozen=True, slots=True)
class PrintedDate:
    """A date in a text, from `start` to `end`."""

    start: int
    end: int
    day_first: Day | None
    """Its reading with the day before the month; None if there is none."""
    month_first: Day | None
    """The other reading, if it is another."""
    mark: str = ""
    """What stands between its numbers, where it is all numbers and the year comes last."""

    def list_days(self, day_first: bool | None) -> list[Day]:
        """Return its readings; one where both are possible and the document's order is known."""
        if self.day_first and self.month_first:
            known = True if self.mark == "." else day_first
            return [self.day_first, self.month_first] if known is None else [self.day_first if known else self.month_first]
        return [day for day in (self.day_first, self.month_first) if day]


def scan_dates(text: str) -> Iterator[PrintedDate]:
    """Yield the dates in a text of lower case, in order."""
    end = 0
    for number in NUMBER_START.finditer(text):
        start = number.start()
        if start < end:
            continue
        found = DATE.match(text, start)
        if found is None and len(number[0]) <= 2 and text[max(0, start - 5) : start].rstrip(" .-\n")[-2:] in NAME_ENDS:
            name = BEFORE.search(text[max(0, start - MAX_NAME) : start])
            found = NAMED.match(text, start - len(name[0])) if name and name[1] in MONTHS else None
        printed = read_date(found) if found else None
        if printed and (printed.day_first or printed.month_first):
            yield printed
            end = printed.end


def read_date(found: re.Match[str]) -> PrintedDate:
    """Return what a match of `DATE` can be read as."""
    start, end = found.span()
    form = FORMS[str(found.lastgroup)]
    one, other, last = found.group(*form)
    if form[0][0] == "a":
        day_first, month_first = make_day(last, other, one), make_day(last, one, other)
        mark = found["mark"] if form[0] == "a" else " "
        return PrintedDate(start, end, day_first, None if month_first == day_first else month_first, mark)
    return PrintedDate(start, end, make_day(one, str(MONTHS.get(other, other)), last), None)


def make_day(year: str, month: str, day: str) -> Day | None:
    """Return a day; None where there is no such day. Years of two digits are from 1970 to 2069."""
    year = year.lstrip("'’")
    full = int(year) if len(year) == 4 else int(year) + (2000 if int(year) < 70 else 1900)
    found = full, int(month), int(day)
    return found if 1 <= found[1] <= 12 and 1 <= found[2] <= DAYS[found[1] - 1] else None


def decide_order(dates: Iterable[PrintedDate]) -> bool | None:
    """Return whether the days come first in a document's dates, by three quarters of those that can be read in one way only; None if
    they do not tell."""
    votes = [
        date.day_first is not None
        for date in dates
        if date.mark not in ("", ".") and (date.day_first is None) != (date.month_first is None)
    ]
    share = sum(votes) / max(1, len(votes))
    return share > 0.5 if len(votes) >= MIN_VOTES and not MIN_SHARE > share > 1 - MIN_SHARE else None
