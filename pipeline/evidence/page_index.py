"""Index of a page: its words, read once, and where a text, a number or a day stands among them.

    words           Total:  EUR  1,234.50      (the next word far to the right)  22.05.20
    text            total: eur 1,234.50⏎22.05.20
    letters         totaleur1~234~50           a mark where two numbers would run together
    numbers         1234.5 -> characters 11 to 19
    days            (2020, 5, 22) -> 20 to 28

Texts are compared by their letters and digits alone, from the start of a run of them to the end of one: case, spacing, punctuation and
hyphens at the end of a line make no difference, but `12` does not stand in `2012`.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from pipeline.evidence.dates import Day, PrintedDate, scan_dates
from pipeline.evidence.numbers import YEAR_DIGITS, NumberIndex
from pipeline.evidence.text_layer import PageWords

RUN = re.compile(r"[^\W_]+")
NEAR = 1.2
"""Words of one line at most so many heights apart are read together: 1 234,50 is a number, and not two cells of a table."""
MAX_CODE = 0x30000
"""Characters from here on, of historic scripts and private use, are no letters."""
DIGIT = 2
MIN_LOOSE = 8
"""Letters and digits that a text must have to be found also where its numbers run together: DE89370400440532013000."""
MAX_FINDS = 200
"""Most places of one value on a page: a 1 on a page of tables says nothing more."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Find:
    """Where something stands on a page: characters `start` to `end` of its text."""

    start: int
    end: int


class PageIndex:
    """Some words of a page in an order of reading, and what is printed there."""

    def __init__(self, page: PageWords, order: Sequence[int]) -> None:
        """Index the words with these positions in the page, in this order; there must be one."""
        self.is_ocr = page.is_ocr
        self.page_no, self.order = page.page_no, list(order)
        self.words = [page.texts[index] for index in order]
        self.boxes = page.boxes[self.order]
        self.marks = page.marks[self.order]
        folded = fold_words(self.words)
        separators = np.where(find_near_words(self.boxes), " ", "\n").tolist()
        lengths = list(map(len, folded))
        self.starts = [0, *accumulate(length + 1 for length in lengths[:-1])]
        self.text = interleave_words(folded, separators)
        self.is_even = lengths == list(map(len, self.words))
        """Whether folding changed no word's length, so that characters of the text are those of the words."""
        self.raw = interleave_words(self.words, separators) if self.is_even else ""
        self.found_words: dict[str, list[int]] = {}
        self.found_similar: dict[str, tuple[Find, int] | None] = {}

    @cached_property
    def letters(self) -> LetterIndex:
        return LetterIndex(self.text, "~")

    @cached_property
    def loose_letters(self) -> LetterIndex:
        """The same without a mark between numbers."""
        return LetterIndex(self.text, "")

    @cached_property
    def numbers(self) -> NumberIndex:
        return NumberIndex(self.text)

    @cached_property
    def dates(self) -> list[PrintedDate]:
        return list(scan_dates(self.text))

    def find_text(self, text: str, is_loose: bool = False) -> list[Find]:
        """Return where a text stands, by its letters and digits; where it has none, by its characters.

        `is_loose` lets numbers run together in a text of at least `MIN_LOOSE` letters and digits.
        """
        folded = fold_text(text)
        wanted = squeeze_letters(folded, "~")
        if not wanted:
            sign = "".join(folded.split())
            return [Find(found.start(), found.end()) for found in re.finditer(re.escape(sign), self.text)][:MAX_FINDS] if sign else []
        if is_loose and len(wanted) - wanted.count("~") < MIN_LOOSE:
            return []
        found = self.loose_letters.find(wanted.replace("~", "")) if is_loose else self.letters.find(wanted)
        inside = ".,'’/:-" if wanted.isdigit() and len(wanted) != YEAR_DIGITS else ".,'’"
        return [
            find
            for find in found
            if not (wanted[0].isdigit() and is_joined(self.text[max(0, find.start - 2) : find.start][::-1], inside))
            and not (wanted[-1].isdigit() and is_joined(self.text[find.end : find.end + 2], inside))
        ]

    def extend_find(self, find: Find, text: str) -> Find:
        """Return what was found with the marks before and after it that a text has, too: the bracket at the end of "President (R)"."""
        folded = fold_text(text)
        runs = list(RUN.finditer(folded))
        if not runs:
            return find
        head, tail = folded[: runs[0].start()], folded[runs[-1].end() :]
        start = find.start - len(head) * self.text.endswith(head, 0, find.start)
        return Find(start, find.end + len(tail) * self.text.startswith(tail, find.end))

    def find_day(self, day: Day, day_first: bool | None) -> list[Find]:
        """Return where a day is printed."""
        return [Find(date.start, date.end) for date in self.dates if day in date.list_days(day_first)][:MAX_FINDS]

    def get_words(self, find: Find) -> tuple[int, int]:
        """Return the first and the last word of what was found."""
        return bisect_right(self.starts, find.start) - 1, bisect_right(self.starts, find.end - 1) - 1

    def list_words(self, find: Find) -> list[int]:
        """Return the words of what was found, by their positions on the page, which are the same in each order of reading."""
        first, last = self.get_words(find)
        return self.order[first : last + 1]

    def get_beside(self, find: Find, step: int) -> int | None:
        """Return the position of the word closely before (-1) or after (1) what was found, on its line; None if there is none."""
        beside = self.get_words(find)[step > 0] + step
        if not 0 <= beside < len(self.words) or not RUN.search(self.words[beside]):
            return None
        gap = self.starts[max(beside, beside - step)] - 1
        return self.order[beside] if self.text[gap] == " " else None

    def get_marks(self, find: Find) -> list[int]:
        """Return the marks of the words of what was found."""
        first, last = self.get_words(find)
        marks: list[int] = self.marks[first : last + 1].tolist()
        return marks

    def get_printed(self, find: Find) -> str:
        """Return what was found as it is printed."""
        if self.is_even:
            return " ".join(self.raw[find.start : find.end].split())
        first, last = self.get_words(find)
        return " ".join(self.words[first : last + 1])

    def get_box(self, find: Find) -> Box:
        """Return the box around what was found, cut from its first and last word by the share of their characters."""
        first, last = self.get_words(find)
        lefts, tops, rights, bottoms = (list(edges) for edges in zip(*self.box_tuples[first : last + 1], strict=True))
        cut_left, cut_right = self.cut_word(first, find.start), self.cut_word(last, find.end)
        lefts[0], rights[-1] = cut_left, cut_right
        return min(lefts), min(tops), max(rights), max(bottoms)

    def cut_word(self, word: int, at: int) -> float:
        """Return the x at which a character of the text stands in a word."""
        left, _, right, _ = self.box_tuples[word]
        end = self.starts[word + 1] - 1 if word + 1 < len(self.starts) else len(self.text)
        return left + (right - left) * min(1.0, (at - self.starts[word]) / max(1, end - self.starts[word]))

    @cached_property
    def box_tuples(self) -> list[Box]:
        return list(map(tuple, self.boxes.tolist()))

    @cached_property
    def lines(self) -> list[int]:
        """The number of each word's line on the page, from the top."""
        lines: list[int] = number_lines(self.boxes).tolist()
        return lines

    def get_line_top(self, line: int) -> float:
        """Return where a line begins."""
        return min(box[1] for box, other in zip(self.box_tuples, self.lines, strict=True) if other == line)

    def find_words(self, run: str) -> list[int]:
        """Return the words in which a run of letters or digits stands, in lower case; a label is looked for at each place of its value."""
        if run in self.found_words:
            return self.found_words[run]
        found, at = self.found_words.setdefault(run, []), self.text.find(run)
        while at >= 0:
            end = at + len(run)
            if not self.text[max(0, at - 1) : at].isalnum() and not self.text[end : end + 1].isalnum():
                found.append(bisect_right(self.starts, at) - 1)
            at = self.text.find(run, end)
        return found


class LetterIndex:
    """The letters and digits of a text, and where its runs of them begin and end."""

    def __init__(self, text: str, mark: str) -> None:
        """`mark` is put between two digits of different runs."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        kinds = classify_letters()[np.minimum(codes, MAX_CODE)]
        edges = np.flatnonzero(np.diff(kinds > 0, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        lengths, kept = np.cumsum(ends - starts), codes[kinds > 0]
        is_between = (kinds[ends[:-1] - 1] == DIGIT) & (kinds[starts[1:]] == DIGIT) if mark else np.zeros(max(0, len(starts) - 1), np.bool_)
        shifts = np.concatenate([[0], np.cumsum(is_between)])[: len(starts)]
        self.letters = np.insert(kept, lengths[:-1][is_between], ord(mark or " ")).tobytes().decode("utf-32-le", "surrogatepass")
        begins = lengths - (ends - starts) + shifts
        self.starts = dict(zip(begins.tolist(), starts.tolist(), strict=True))
        self.ends = dict(zip((lengths + shifts).tolist(), ends.tolist(), strict=True))

    def find(self, wanted: str) -> list[Find]:
        """Return where these letters and digits stand as whole runs."""
        found: list[Find] = []
        at = self.letters.find(wanted)
        while at >= 0 and len(found) < MAX_FINDS:
            if at in self.starts and at + len(wanted) in self.ends:
                found.append(Find(self.starts[at], self.ends[at + len(wanted)]))
            at = self.letters.find(wanted, at + 1)
        return found


@lru_cache(maxsize=1)
def classify_letters() -> NDArray[np.uint8]:
    """Return for each character whether it is part of a run: 1 for letters, `DIGIT`, 0 for others and for all from `MAX_CODE` on."""
    letters = map(chr, range(MAX_CODE))
    return np.array([*(DIGIT if one.isdigit() and RUN.match(one) else int(RUN.match(one) is not None) for one in letters), 0], np.uint8)


def interleave_words(words: Sequence[str], separators: Sequence[str]) -> str:
    """Return words with a separator after each but the last."""
    parts = [""] * (2 * len(words) - 1)
    parts[::2], parts[1::2] = words, separators
    return "".join(parts)


def is_joined(beside: str, marks: str) -> bool:
    """Say whether the two characters beside a number, the nearer first, join it to another one by one of these marks."""
    return len(beside) == 2 and beside[0] in marks and beside[1].isdigit()


@lru_cache(maxsize=4096)
def squeeze_letters(folded: str, mark: str) -> str:
    """Return the letters and digits of a text, with a mark between two digits of different runs."""
    return LetterIndex(folded, mark).letters


def fold_text(text: str) -> str:
    """Return a text without differences of case, ligatures, widths of characters and soft hyphens."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).replace("\u00ad", "").casefold()


def fold_words(words: list[str]) -> list[str]:
    """Return words without these differences."""
    return fold_text("\n".join(words)).split("\n")


def find_near_words(boxes: np.ndarray) -> NDArray[np.bool_]:
    """Return for each word but the last whether the next one follows it closely on its line."""
    height = boxes[:-1, 3] - boxes[:-1, 1]
    same_line = np.abs(boxes[1:, 1] + boxes[1:, 3] - boxes[:-1, 1] - boxes[:-1, 3]) < height
    gap = boxes[1:, 0] - boxes[:-1, 2]
    near: NDArray[np.bool_] = same_line & (gap < NEAR * height) & (gap > -height)
    return near


def number_lines(boxes: np.ndarray) -> np.ndarray:
    """Return the number of each word's line on the page, from the top: words whose middles are less than half a height apart."""
    middles, height = (boxes[:, 1] + boxes[:, 3]) / 2, float(np.median(boxes[:, 3] - boxes[:, 1])) or 1.0
    by_middle = np.argsort(middles, kind="stable")
    lines = np.empty(len(boxes), np.int64)
    lines[by_middle] = np.cumsum(np.diff(middles[by_middle], prepend=middles[by_middle[0]]) > height / 2)
    return lines


def sort_by_line(boxes: np.ndarray) -> list[int]:
    """Return the order in which words stand on the page: line by line from the top, each from the left."""
    order: list[int] = np.lexsort((boxes[:, 0], number_lines(boxes))).tolist()
    return order
