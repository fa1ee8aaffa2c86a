"""Choice of a place: the values of a record and all places where each is printed come in, one place for each value goes out.

A value that is printed once is there. Of several places of a value in a list of objects, that on the line with most of the object's
other values is taken; of other values, the one that fits its label and stands nearest to the values beside it in the schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

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
STOP_WORDS = frozenset("the of a an in and or to for is at on by".split())
NAME_PARTS = re.compile(r"[^\W\d_][a-zà-ÿ]*|\d+")


@dataclass(frozen=True, eq=False)
class Place:
    """One place where a value is printed."""

    page: PageIndex
    find: Find
    is_exact: bool
    pieces: tuple[Find, ...] = ()
    """Where its parts stand, if it is printed in several; the first is `find`."""

    @property
    def finds(self) -> tuple[Find, ...]:
        """All that is printed of it."""
        return self.pieces or (self.find,)

    @cached_property
    def box(self) -> Box:
        """The box around all of it."""
        x0, y0, x1, y1 = zip(*(self.page.get_box(find) for find in self.finds), strict=True)
        return min(x0), min(y0), max(x1), max(y1)

    @cached_property
    def lines(self) -> tuple[int, ...]:
        """The lines of the page that the value covers."""
        first, last = self.page.get_words(self.find)
        return tuple(sorted({*self.page.lines[first : last + 1]}))


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
    is_off_line: bool = False
    """Whether it is printed, but neither on the line of the other values of its item nor closely below it."""
    distance_pt: float | None = None
    """Between the place and the nearest chosen one of a value beside it in the schema, on the same page."""


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
    root = [value for value in values if not value.item]
    for value in values:
        if value.places and value.chosen is None:
            choose_by_label(value, groups[value.item or value.group], root)
        if value.chosen:
            value.label_fit = measure_label(value.chosen, value.labels) if len(value.places) > 1 else value.label_fit
            beside = list_boxes(other for other in groups[value.item or value.group] if other is not value)
            value.distance_pt = find_nearest(value.chosen, beside)


def choose_lines(items: Mapping[str, list[PlacedValue]]) -> None:
    """Choose the line of a page for each item of a list, the items in order, and on it or below it the places of its values."""
    reached: dict[str, tuple[int, int]] = {}
    for item, cells in items.items():
        if len(cells) < 2:
            continue
        votes: dict[tuple[int, int], float] = {}
        for cell in cells:
            weight = PIECES_WEIGHT if cell.places[0].pieces else 1 + 1 / len(cell.places)
            for line in {(place.page.page_no, line) for place in cell.places for line in place.lines}:
                votes[line] = votes.get(line, 0) + weight
        before = reached.get(name := item.rpartition("[")[0], (0, -1))
        best = max(votes, key=lambda line: (votes[line] + 0.5 * (line > before) - 0.5 * (line == before), (-line[0], -line[1])))
        reached[name] = best
        found = [find_cell(cell.places, best) for cell in cells]
        for cell, place in zip(cells, found, strict=True):
            cell.is_off_line = place is None and len(found) - found.count(None) >= MIN_ON_LINE
            cell.chosen = cell.chosen or place


def find_cell(places: Sequence[Place], line: tuple[int, int]) -> Place | None:
    """Return the place on a line, or the next one closely below it; None if there is none."""
    here = [place for place in places if place.page.page_no == line[0]]
    on = next((place for place in here if line[1] in place.lines), None)
    if on or not here:
        return on
    top = here[0].page.get_line_top(line[1])
    return min((place for place in here if 0 <= place.box[1] - top <= CELL_BELOW_PT), key=lambda place: place.box[1], default=None)


def choose_by_label(value: PlacedValue, group: Sequence[PlacedValue], root: Sequence[PlacedValue]) -> None:
    """Choose the place that fits the value's label and stands near the places of the values beside it."""
    beside = list_boxes(group) or list_boxes(other for other in root if len(other.places) == 1)

    def rate_place(place: Place) -> tuple[float, float]:
        distance = find_nearest(place, beside)
        near = 0.5 / (1 + distance / NEIGHBOUR_PT) if distance is not None else 0.0
        return 2 * measure_label(place, value.labels) + near + 0.3 * place.is_exact, -place.find.start

    value.chosen = max(value.places[:MAX_COMPARED], key=rate_place)


def list_boxes(values: Iterable[PlacedValue]) -> dict[int, list[Box]]:
    """Return the boxes of the chosen places of values, by page."""
    boxes: dict[int, list[Box]] = {}
    for value in values:
        if value.chosen:
            boxes.setdefault(value.chosen.page.page_no, []).append(value.chosen.box)
    return boxes


def find_nearest(place: Place, others: Mapping[int, Sequence[Box]]) -> float | None:
    """Return the distance in pt between a place and the nearest box of others on its page; None if there is none."""
    return min((measure_gap(place.box, box) for box in others.get(place.page.page_no, ())), default=None)


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


def split_label(*names: str) -> tuple[str, ...]:
    """Return the words of a property's name and title: `invoiceDate` and "Date of issue" give invoice, date, issue."""
    words = (part.lower() for name in names for part in NAME_PARTS.findall(name))
    return tuple(dict.fromkeys(word for word in words if word not in STOP_WORDS))
