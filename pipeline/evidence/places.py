"""Choice of a place: the values of a record and all places where each is printed come in, one place for each value goes out.

A value that is printed once is there. Of several places of a value in a list of objects, that on the line with most of the object's
other values is taken, and there the one in the column of the same property of the other objects; of other values, the one that fits its
label and stands nearest to the values beside it in the schema.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pipeline.evidence.page_index import Box, Find, PageIndex

MAX_COMPARED = 40
"""Most places of a value whose labels are looked at."""
LABEL_LEFT_PT, LABEL_ABOVE_PT = 250.0, 40.0
"""How far to the left of a value on its line, or above it, its label is looked for."""
NEIGHBOUR_PT = 72.0
CELL_BELOW_PT = 30.0
PIECES_WEIGHT = 0.5
"""Of a text in pieces for the line of its first piece, which may be another item's; what is printed once as a whole has 2."""
MIN_ON_LINE = 2
"""Values of an item that show which line is its own."""
MIN_WEIGHT = 1.25
"""Of these together, each as much as one of its places: a unit and a period that are printed everywhere show no line."""
MIN_LONG = 3
"""Characters of a value that is not printed on most pages: a shorter one is misplaced by any line that the others have in common."""
MIN_IN_COLUMN = 3
"""Items of a list that show where on a page the column of a property is."""
COLUMN_GAP_PT = 2.0
"""How far beside the others of its column a cell may stand."""
LINE_SHARES = 27720
"""Of a value on its line, to be divided by the number of its places there: by 1 to 12 without a rest."""
STOP_WORDS = frozenset("the of a an in and or to for is at on by".split())
NAME_PARTS = re.compile(r"[^\W\d_][a-zà-ÿ]*|\d+")


class Place:
    """One place where a value is printed. Its box and lines are found when they are wanted: of most places they are not.

    No `cached_property`, which takes a lock in Python 3.11: a value of a table has some ten places.
    """

    __slots__ = ("find", "found_box", "found_lines", "is_exact", "page", "pieces", "words")

    def __init__(self, page: PageIndex, find: Find, is_exact: bool, pieces: tuple[Find, ...] = ()) -> None:
        """`pieces` are where its parts stand, if it is printed in several; the first is `find`."""
        self.page, self.find, self.is_exact, self.pieces = page, find, is_exact, pieces
        self.words = page.get_words(find)
        """The first and the last word of it, or of its first part."""
        self.found_box: Box | None = None
        self.found_lines: tuple[int, ...] = ()

    @property
    def finds(self) -> tuple[Find, ...]:
        """All that is printed of it."""
        return self.pieces or (self.find,)

    @property
    def box(self) -> Box:
        """The box around all of it."""
        if self.found_box is None:
            self.found_box = self.page.get_box(self.find, self.words)
            for piece in self.pieces[1:]:
                self.found_box = join_boxes(self.found_box, self.page.get_box(piece))
        return self.found_box

    @property
    def lines(self) -> tuple[int, ...]:
        """The lines of the page that the value covers, or its first part."""
        if not self.found_lines:
            first, last = self.words
            lines = self.page.lines[first : last + 1]
            self.found_lines = (lines[0],) if first == last else tuple(sorted({*lines}))
        return self.found_lines

    @property
    def is_overlay(self) -> bool:
        """Whether OCR software added words of it to a scan."""
        return not self.page.overlay.isdisjoint(self.list_words())

    def list_words(self) -> list[int]:
        """Return the words of all of it, by their positions on the page, which are the same in each order of reading."""
        spans = [self.words, *map(self.page.get_words, self.pieces[1:])]
        return [word for first, last in spans for word in self.page.order[first : last + 1]]


Boxes = dict[int, list[tuple[Place, Box]]]
"""Chosen places of some values with their boxes, by page."""


@dataclass(eq=False)
class PlacedValue:
    """A value of a record, where it is printed, and the place that was chosen."""

    path: str
    group: str
    """Path of the object or list that holds it."""
    item: str
    """Path of the item of a list of objects in which it is, "" outside of lists."""
    labels: tuple[str, ...]
    """Words of its name and title, in lower case."""
    places: Sequence[Place] = ()
    chosen: Place | None = None
    label_fit: float = 0.0
    """0 to 1: how much of its label stands to the left of the place or above it."""
    on_line: Sequence[Place] = ()
    """Its places on the line of its item, if it is in one."""
    is_misplaced: bool = False
    """Whether it is printed, but neither on the line of the other values of its item nor closely below it, or not in its column."""
    distance_pt: float | None = None
    """Between the place and the nearest chosen one of a value beside it in the schema, on the same page."""
    item_fit: float | None = None
    """0 to 1: with how many of the other values of its item it is on a line; None where there are none."""
    rivals: int = 0
    """Other values with the same place."""
    has_words_before: bool = False
    """Whether words stand closely before it that are no value's, as those of a longer text do."""
    has_words_after: bool = False


def choose_places(values: Sequence[PlacedValue]) -> None:
    """Choose a place for each value that has one."""
    groups: dict[str, list[PlacedValue]] = {}
    items: dict[str, list[PlacedValue]] = {}
    for value in values:
        groups.setdefault(value.item or value.group, []).append(value)
        if value.item and value.places:
            items.setdefault(value.item, []).append(value)
        if len(value.places) == 1:
            value.chosen = value.places[0]
    choose_lines(items)
    choose_columns(items)
    boxes = {name: list_boxes(group) for name, group in groups.items()}
    root = list_boxes(value for value in values if not value.item and len(value.places) == 1)
    for value in values:
        beside = boxes[value.item or value.group]
        if value.places and value.chosen is None:
            choose_by_label(value, beside or root)
            add_box(beside, value)
        elif value.chosen:
            value.label_fit = measure_label(value.chosen, value.labels)
        if value.chosen:
            value.distance_pt = find_nearest(value.chosen, beside)
    compare_lines(items.values())
    compare_words([value for value in values if value.chosen])


def compare_lines(items: Iterable[Sequence[PlacedValue]]) -> None:
    """Note with how many of the other values of its item each value of an item is on a line."""
    for cells in items:
        lines = [{(cell.chosen.page.page_no, line) for line in cell.chosen.lines} if cell.chosen else set() for cell in cells]
        for cell, here in zip(cells, lines, strict=True):
            if len(cells) > 1:
                cell.item_fit = sum(not here.isdisjoint(there) for there in lines if there is not here) / (len(cells) - 1)


def compare_words(values: Sequence[PlacedValue]) -> None:
    """Note which values share their place with others, and beside which stand words that are no value's."""
    places = [value.chosen for value in values if value.chosen]
    claimed = {(place.page.page_no, word) for place in places for word in place.list_words()}
    first_words = [(place.page.page_no, place.page.order[place.words[0]]) for place in places]
    counts = Counter(first_words)
    for value, place, first_word in zip(values, places, first_words, strict=True):
        page_no, page = place.page.page_no, place.page
        value.rivals = counts[first_word] - 1
        beside = [page.get_beside(place.words[step > 0], step) for step in (-1, 1)] if not place.pieces else [None, None]
        value.has_words_before, value.has_words_after = ((page_no, word) not in claimed if word is not None else False for word in beside)


def choose_lines(items: Mapping[str, list[PlacedValue]]) -> None:
    """Choose the line of a page for each item of a list, the items in order, and on it or below it the places of its values."""
    reached: dict[str, tuple[int, int]] = {}
    chosen: dict[str, tuple[int, int]] = {}
    for item, cells in items.items():
        if len(cells) < 2:
            continue
        votes: dict[tuple[int, int], float] = {}
        for cell in cells:
            weight = PIECES_WEIGHT if cell.places[0].pieces else 1 + 1 / len(cell.places)
            for line in {(place.page.page_no, line) for place in cell.places for line in place.lines}:
                votes[line] = votes.get(line, 0) + weight
        before = reached.get(name := item.rpartition("[")[0], (0, -1))
        chosen[item] = max(votes, key=lambda line: (votes[line] + 0.5 * (line > before) - 0.5 * (line == before), (-line[0], -line[1])))
        reached[name] = chosen[item]
    lines = {*chosen.values()}
    for item, best in chosen.items():
        found = [find_cell(cell, best, lines) for cell in items[item]]
        weights = [1 / len(cell.places) for cell, place in zip(items[item], found, strict=True) if place]
        for cell, place in zip(items[item], found, strict=True):
            is_short = cell.places[0].find.end - cell.places[0].find.start < MIN_LONG
            least = 0.0 if is_short else MIN_WEIGHT
            cell.is_misplaced = place is None and len(weights) >= MIN_ON_LINE and sum(weights) >= least
            cell.chosen = cell.chosen or place


def find_cell(cell: PlacedValue, best: tuple[int, int], lines: Container[tuple[int, int]]) -> Place | None:
    """Return the first place of a value on the line of its item, or the next one closely below it; None if there is none.

    Those on the line are noted. `lines` are those of all items: what stands on that of another one is not below this one's.
    """
    here = [place for place in cell.places if place.page.page_no == best[0]]
    cell.on_line = [place for place in here if best[1] in place.lines]
    if cell.on_line or not here:
        return next(iter(cell.on_line), None)
    top = here[0].page.get_line_top(best[1])
    below = [place for place in here if not any((best[0], line) in lines for line in place.lines)]
    return min((place for place in below if 0 <= place.box[1] - top <= CELL_BELOW_PT), key=lambda place: place.box[1], default=None)


def choose_columns(items: Mapping[str, list[PlacedValue]]) -> None:
    """Choose of several places on the line of an item the one in the column of its property, and note what stands in no column of it.

    The column of a property on a page is where most items have the value on their lines; a value in several places of a line counts for
    each in part.
    """
    columns: dict[tuple[str, int], list[PlacedValue]] = {}
    for item, cells in items.items():
        for cell in cells:
            if cell.on_line:
                name = item.rpartition("[")[0] + cell.path[len(item) :]
                columns.setdefault((name, cell.on_line[0].page.page_no), []).append(cell)
    taken: set[tuple[str, int]] = set()
    for cells in columns.values():
        at = group_places([place for cell in cells for place in cell.on_line])
        weights = Counter[int]()
        for cell in cells:
            for place in cell.on_line:
                weights[at[place]] += LINE_SHARES // len(cell.on_line)
        best = list[Place]()
        for cell in cells:
            best.append(max(cell.on_line, key=lambda place: (weights[at[place]], (cell.item, place.find.start) not in taken)))
            taken.add((cell.item, best[-1].find.start))
        counts = Counter(at[place] for place in best)
        most = max(counts.values())
        for cell, place in zip(cells, best, strict=True):
            cell.is_misplaced |= counts[at[place]] == 1 and most >= MIN_IN_COLUMN and 2 * most >= len(cells)
            cell.chosen = place if cell.chosen in cell.on_line else cell.chosen


def group_places(places: Sequence[Place]) -> dict[Place, int]:
    """Return the number of the column of each place, from the left; between two columns there is a gap."""
    found, column, right = dict[Place, int](), -1, -math.inf
    for place in sorted(places, key=lambda place: place.box[0]):
        column += place.box[0] > right + COLUMN_GAP_PT
        right = max(right, place.box[2])
        found[place] = column
    return found


def choose_by_label(value: PlacedValue, beside: Boxes) -> None:
    """Choose the place that fits the value's label and stands near the places of the values beside it."""
    best = -math.inf
    for place in sorted(value.places[:MAX_COMPARED], key=lambda place: place.find.start):
        label_fit, distance = measure_label(place, value.labels), find_nearest(place, beside)
        near = 0.5 / (1 + distance / NEIGHBOUR_PT) if distance is not None else 0.0
        rating = 2 * label_fit + near + 0.3 * place.is_exact
        if rating > best:
            best, value.chosen, value.label_fit = rating, place, label_fit


def list_boxes(values: Iterable[PlacedValue]) -> Boxes:
    """Return the boxes of the chosen places of values, by page."""
    boxes: Boxes = {}
    for value in values:
        if value.chosen:
            add_box(boxes, value)
    return boxes


def add_box(boxes: Boxes, value: PlacedValue) -> None:
    """Add the box of the chosen place of a value."""
    assert value.chosen is not None
    boxes.setdefault(value.chosen.page.page_no, []).append((value.chosen, value.chosen.box))


def find_nearest(place: Place, others: Boxes) -> float | None:
    """Return the distance in pt between a place and the nearest box of other ones on its page; None if there is none."""
    x0, y0, x1, y1 = place.box
    least, nearest = math.inf, None
    for other, box in others.get(place.page.page_no, ()):
        across = x0 - box[2] if x0 - box[2] > box[0] - x1 else box[0] - x1
        down = y0 - box[3] if y0 - box[3] > box[1] - y1 else box[1] - y1
        square = (across * across if across > 0 else 0.0) + (down * down if down > 0 else 0.0)
        if square < least and other is not place:
            least, nearest = square, box
    return None if nearest is None else measure_gap(place.box, nearest)


def join_boxes(one: Box, other: Box) -> Box:
    """Return the box around two."""
    return min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3])


def measure_gap(one: Box, other: Box) -> float:
    """Return the distance between two boxes, 0 where they touch."""
    across = max(one[0] - other[2], other[0] - one[2], 0.0)
    down = max(one[1] - other[3], other[1] - one[3], 0.0)
    return float((across**2 + down**2) ** 0.5)


def measure_label(place: Place, labels: Sequence[str]) -> float:
    """Return how much of a label, 0 to 1, stands to the left of a place on its line, or above it; what is nearer counts more."""
    if not labels:
        return 0.0
    x0, y0, x1, y1 = place.box
    total = 0.0
    for label in labels:
        best = 0.0
        for word in place.page.find_words(label):
            left, top, right, bottom = place.page.box_tuples[word]
            if abs(top + bottom - y0 - y1) < y1 - y0 + bottom - top and -1 <= x0 - right <= LABEL_LEFT_PT:
                best = max(best, 1 - (x0 - right) / LABEL_LEFT_PT / 2)
            elif -1 <= y0 - bottom <= LABEL_ABOVE_PT and left < x1 + 10 and right > x0 - 10:
                best = max(best, 0.9 - (y0 - bottom) / LABEL_ABOVE_PT / 2)
        total += best
    return total / len(labels)


@lru_cache(maxsize=4096)
def split_label(*names: str) -> tuple[str, ...]:
    """Return the words of a property's name and title: `invoiceDate` and "Date of issue" give invoice, date, issue."""
    words = (part.lower() for name in names for part in NAME_PARTS.findall(name))
    return tuple(dict.fromkeys(word for word in words if word not in STOP_WORDS))
