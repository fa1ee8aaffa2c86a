"""Index of a document's pages: their words, read once, and where a text, a number or a day stands among them.

    words           Total:  EUR  1,234.50      (the next word far to the right)  22.05.20
    text            total: eur 1,234.50⏎22.05.20
    letters         totaleur1~234~50           a mark where two numbers would run together
    numbers         1234.5 -> characters 11 to 19
    days            (2020, 5, 22) -> 20 to 28

Texts are compared by their letters and digits alone, from the start of a run of them to the end of one: case, spacing, punctuation and
hyphens at the end of a line make no difference, but `12` does not stand in `2012`. Pages are searched together, so that a value costs
as much in a document of a hundred pages, on one of which it is printed, as in one of two.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from pipeline.evidence.dates import Day, PrintedDate, scan_dates
from pipeline.evidence.letters import RUN, LetterIndex, TextQuery, fold_words
from pipeline.evidence.numbers import NumberIndex, PrintedNumber, strip_digits
from pipeline.evidence.text_layer import PageWords
from pipeline.records import WordMark

NEAR = 1.2
"""Words of one line at most so many heights apart are read together: 1 234,50 is a number, and not two cells of a table."""
MIN_LOOSE = 8
"""Letters and digits that a text must have to be found also where its numbers run together: DE89370400440532013000."""
MAX_SHORT = 3
"""Letters and digits of a text that is looked up and not searched for."""
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
        self.words = [page.texts[index] for index in self.order]
        self.boxes = page.boxes[self.order]
        self.overlay = frozenset(np.flatnonzero(page.marks == WordMark.OVERLAY).tolist())
        """Positions of the words that OCR software added to a scan."""
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
        return LetterIndex(self.text)

    @cached_property
    def loose_letters(self) -> LetterIndex:
        """The same without a mark between numbers."""
        return self.letters.drop_marks()

    @cached_property
    def runs(self) -> frozenset[str]:
        """The runs of letters and digits, in lower case."""
        return frozenset(RUN.findall(self.text))

    @cached_property
    def numbers(self) -> NumberIndex:
        return NumberIndex(self.text)

    @cached_property
    def dates(self) -> list[PrintedDate]:
        return list(scan_dates(self.text))

    def keep_whole(self, query: TextQuery, finds: Sequence[Find]) -> list[Find]:
        """Return the finds that are no part of a longer number."""
        return [
            find
            for find in finds
            if not (query.is_number_first and is_joined(self.text[max(0, find.start - 2) : find.start][::-1], query.joining))
            and not (query.is_number_last and is_joined(self.text[find.end : find.end + 2], query.joining))
        ]

    def extend_find(self, find: Find, query: TextQuery) -> Find:
        """Return what was found with the marks before and after it that a text has, too: the bracket at the end of "President (R)"."""
        start = find.start - len(query.head) * self.text.endswith(query.head, 0, find.start)
        return Find(start, find.end + len(query.tail) * self.text.startswith(query.tail, find.end))

    def may_divide(self, query: TextQuery) -> bool:
        """Say whether a text that does not stand on the page may stand there in another order of its words: whether it consists of them."""
        letters = query.letters.replace("~", "")
        size, reached = len(letters), {0}
        for at in range(size):
            if at in reached:
                reached.update(end for end in range(at + 1, size + 1) if letters[at:end] in self.runs)
        return size > 0 and size in reached

    def get_words(self, find: Find) -> tuple[int, int]:
        """Return the first and the last word of what was found."""
        return bisect_right(self.starts, find.start) - 1, bisect_right(self.starts, find.end - 1) - 1

    def get_beside(self, word: int, step: int) -> int | None:
        """Return the position of the word closely before (-1) or after (1) another one on its line; None if there is none."""
        beside = word + step
        if not 0 <= beside < len(self.words) or not RUN.search(self.words[beside]):
            return None
        gap = self.starts[max(beside, beside - step)] - 1
        return self.order[beside] if self.text[gap] == " " else None

    def get_printed(self, find: Find) -> str:
        """Return what was found as it is printed."""
        if self.is_even:
            return " ".join(self.raw[find.start : find.end].split())
        first, last = self.get_words(find)
        return " ".join(self.words[first : last + 1])

    def get_box(self, find: Find, words: tuple[int, int] | None = None) -> Box:
        """Return the box around what was found, cut from its first and last word by the share of their characters."""
        first, last = words or self.get_words(find)
        cut_left, cut_right = self.cut_word(first, find.start), self.cut_word(last, find.end)
        if first == last:
            return cut_left, self.box_tuples[first][1], cut_right, self.box_tuples[first][3]
        lefts, tops, rights, bottoms = (list(edges) for edges in zip(*self.box_tuples[first : last + 1], strict=True))
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


class PageSet(tuple[PageIndex, ...]):
    """Pages of a document, in order, that are searched together."""

    @cached_property
    def letters(self) -> tuple[str, list[int]]:
        """The letters of all pages with a line break between them, and where those of each page begin."""
        return join_letters([page.letters for page in self])

    @cached_property
    def loose_letters(self) -> tuple[str, list[int]]:
        """The same without a mark between numbers."""
        return join_letters([page.loose_letters for page in self])

    @cached_property
    def short_texts(self) -> dict[int, dict[str, dict[PageIndex, list[Find]]]]:
        """Where texts stand that have so many letters, for each number that was asked for."""
        return {}

    def find_short(self, letters: str) -> dict[PageIndex, list[Find]]:
        """Return where a text of few letters stands, by page: searched for in all letters, it would be found inside of most words."""
        size = len(letters)
        if size not in self.short_texts:
            found = self.short_texts.setdefault(size, {})
            for page in self:
                text, starts, ends = page.letters.letters, page.letters.starts, page.letters.ends
                for end in sorted({begin + size for begin in starts} & ends.keys()):
                    find = Find(starts[end - size], ends[end])
                    found.setdefault(text[end - size : end], {}).setdefault(page, []).append(find)
        return self.short_texts[size].get(letters, {})

    @cached_property
    def numbers(self) -> dict[str, list[PageIndex]]:
        """The pages on which a number with these digits is printed (`strip_digits`)."""
        found: dict[str, list[PageIndex]] = {}
        for page in self:
            for digits in page.numbers.spans:
                found.setdefault(digits, []).append(page)
        return found

    @cached_property
    def days(self) -> dict[bool | None, dict[Day, dict[PageIndex, list[Find]]]]:
        """Where each day is printed, for each order of day and month that was asked for."""
        return {}

    def find_text(self, query: TextQuery, is_loose: bool = False) -> Iterator[tuple[PageIndex, list[Find]]]:
        """Yield the pages on which a text stands, in order, and where: by its letters and digits, or by its characters if it has none.

        `is_loose` lets numbers run together in a text of at least `MIN_LOOSE` letters and digits.
        """
        if not query.letters:
            for page in self if query.sign else ():
                if found := [Find(one.start(), one.end()) for one in re.finditer(re.escape(query.sign), page.text)][:MAX_FINDS]:
                    yield page, found
            return
        wanted = query.letters.replace("~", "") if is_loose else query.letters
        if is_loose and len(wanted) < MIN_LOOSE:
            return
        if len(wanted) <= MAX_SHORT:
            for page, finds in self.find_short(wanted).items():
                if whole := page.keep_whole(query, finds[:MAX_FINDS]):
                    yield page, whole
            return
        letters, begins = self.loose_letters if is_loose else self.letters
        at, size = letters.find(wanted), len(wanted)
        while at >= 0:
            number = bisect_right(begins, at) - 1
            page, begin = self[number], begins[number]
            end = begins[number + 1] if number + 1 < len(begins) else len(letters) + 1
            index, found = page.loose_letters if is_loose else page.letters, list[Find]()
            while 0 <= at < end and len(found) < MAX_FINDS:
                if (start := index.starts.get(at - begin)) is not None and (stop := index.ends.get(at - begin + size)) is not None:
                    found.append(Find(start, stop))
                at = letters.find(wanted, at + 1)
            if whole := page.keep_whole(query, found):
                yield page, whole
            if 0 <= at < end:
                at = letters.find(wanted, end)

    def find_number(self, keys: Sequence[str]) -> Iterator[tuple[PageIndex, list[PrintedNumber]]]:
        """Yield the pages on which a number stands, in order, and where; `keys` are the readings of one text, whose digits are the same."""
        for page in self.numbers.get(strip_digits(keys[0]), ()):
            yield page, [number for key in dict.fromkeys(keys) for number in page.numbers.find(key)]

    def find_day(self, day: Day, day_first: bool | None) -> dict[PageIndex, list[Find]]:
        """Return where a day is printed, by page."""
        if day_first not in self.days:
            days = self.days.setdefault(day_first, {})
            for page in self:
                for date in page.dates:
                    for one in date.list_days(day_first):
                        found = days.setdefault(one, {}).setdefault(page, [])
                        if len(found) < MAX_FINDS:
                            found.append(Find(date.start, date.end))
        return self.days[day_first].get(day, {})


def join_letters(indexes: Sequence[LetterIndex]) -> tuple[str, list[int]]:
    """Return the letters of pages with a line break between them, and where those of each page begin."""
    texts = [index.letters for index in indexes]
    return "\n".join(texts), [0, *accumulate(len(text) + 1 for text in texts[:-1])]


def interleave_words(words: Sequence[str], separators: Sequence[str]) -> str:
    """Return words with a separator after each but the last."""
    parts = [""] * (2 * len(words) - 1)
    parts[::2], parts[1::2] = words, separators
    return "".join(parts)


def is_joined(beside: str, marks: str) -> bool:
    """Say whether the two characters beside a number, the nearer first, join it to another one by one of these marks."""
    return len(beside) == 2 and beside[0] in marks and beside[1].isdigit()


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
