"""Readings of a model in the places that it named: values that no witness shows in, those that it reads there again out.

    $.total: 119.00, absent    the model names a box on page 1, and reads "Total 119.00" in that part of the page, shown alone
      -> $.total: 119.00, reread, "119.00", witness `model`

The model is no independent reader of its own answer: such a value stays unwitnessed, and a witness that shows it comes first. Values are
looked for in a reading as they are in the words of a page; what is only similar there is not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evidence.match import (
    Evidence,
    Match,
    Witness,
    find_places,
    format_scalar,
    is_choice,
    list_scalars,
    make_placed_row,
    match_scalars,
)
from pipeline.evidence.page_index import Box, PageIndex, PageSet
from pipeline.evidence.searches import DocumentIndex, Scalar
from pipeline.evidence.text_layer import PageWords
from pipeline.records import PlacedValueRow
from pipeline.schema import Schema

MAX_READING = 2000
"""Characters of a reading that are looked at."""
LETTER_PT, LINE_PT = 5.0, 20.0
"""Width of a letter and distance of lines on the page as which a reading is laid out; letters are 10 pt high."""


@dataclass(frozen=True)
class Reading:
    """What a model read of a value that it was asked about."""

    value: str
    """The value, as text."""
    page: int | None = None
    """None: it named no place, or none that can be read."""
    box: Box | None = None
    """In PDF points, origin top left, page rotation applied."""
    text: str | None = None
    """What it read there, "" for nothing; None where it read nothing, because there is no place."""


class ReadingRow(PlacedValueRow):
    """A `Reading` as a record holds it."""

    reading: str | None
    agrees: bool


def list_unwitnessed_values(schema: Schema, value: Any, words: Sequence[PageWords]) -> list[Scalar]:
    """Return the values of a record that these words do not show: absent, or only similar; without words all but choices."""
    scalars = list(list_scalars(value, [schema], schema))
    if not words:
        return [scalar for scalar in scalars if not is_choice(scalar)]
    return [
        scalar for scalar, found in zip(scalars, match_scalars(scalars, words), strict=True) if found.match in (Match.ABSENT, Match.SIMILAR)
    ]


def confirm_values(
    schema: Schema, value: Any, words: Sequence[PageWords], readings: Mapping[str, Reading]
) -> tuple[list[Evidence], list[ReadingRow]]:
    """Return the evidence for each value of a record, and what was read of those in `readings`, which are by path.

    A value that is not read in the place that the model named stays as it is, and is absent where there are no words to look in. A reading
    of another value than the record has by now, because parts were merged or a person has corrected it, counts as none.
    """
    scalars, evidence, rows = list(list_scalars(value, [schema], schema)), [], list[ReadingRow]()
    order = DocumentIndex([*words, *(lay_out_words(one.text) for one in readings.values() if one.text and one.text.strip())])
    for scalar, found in zip(scalars, match_scalars(scalars, words), strict=True):
        reading = readings.get(scalar.path)
        if reading is None or reading.value != format_scalar(scalar.value):
            evidence.append(found)
            continue
        printed = find_in_reading(scalar, reading.text or "", order)
        if not found.is_witnessed and found.match != Match.HIDDEN:
            if printed is not None:
                found = Evidence(scalar.path, found.value, Match.REREAD, reading.page, reading.box, Witness.MODEL, printed)
            elif found.match == Match.NOT_APPLICABLE:
                found = Evidence(scalar.path, found.value, Match.ABSENT)
        evidence.append(found)
        placed = make_placed_row(scalar.path, reading.value, reading.page, reading.box)
        rows.append({**placed, "reading": reading.text, "agrees": printed is not None})
    return evidence, rows


def find_in_reading(scalar: Scalar, text: str, order: DocumentIndex) -> str | None:
    """Return a value as it stands in a reading, exactly or in another form; None if it does not.

    `order` has all that is known of the order of day and month in the document's dates.
    """
    if not text.strip():
        return None
    words = lay_out_words(text)
    places = find_places(scalar, order, PageSet([PageIndex(words, range(len(words.texts)))]))
    return " ".join(places[0].page.get_printed(find) for find in places[0].finds) if places else None


def lay_out_words(text: str) -> PageWords:
    """Return a text as the words of a page, its lines below each other and its letters evenly spaced."""
    texts, boxes = list[str](), list[tuple[float, float, float, float]]()
    for number, line in enumerate(text[:MAX_READING].splitlines()):
        at, top = 0, number * LINE_PT
        for word in line.split():
            texts.append(word)
            boxes.append((at * LETTER_PT, top, (at + len(word)) * LETTER_PT, top + LINE_PT / 2))
            at += len(word) + 1
    return PageWords(1, texts, np.array(boxes, np.float64).reshape(-1, 4), np.zeros(len(texts), np.uint8))
