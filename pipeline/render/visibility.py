"""Visibility of words: the words of a PDF page and its pixels in, a `WordMark` for each word out.

A text layer can hold words that a reader cannot see on the page. What a PDF says of them (text render mode 3, size, place) is compared with
what is to be seen there: a word leaves ink, and its own colour is among it. Both are sampled for all words at once, `ROWS` x `COLUMNS`
pixels of each; what looks empty is looked at again in full. The list of everything that is drawn, which costs as much as drawing, is made
only for pages on which a word is suspicious.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.records import Pixels, WordMark

ROWS, COLUMNS = 6, 16
MARGIN = 0.2
"""Share of a word's height above and below that is not looked at: the neighbouring lines may reach into it."""
MIN_HEIGHT_PX = 4.0
"""Smaller words are not judged by their pixels."""
INK, SCAN_INK = 24, 40
"""Least difference of a channel's values, of 255, at a word that can be seen, and at one over a scan, which has noise."""
SAME_COLOUR = 12
"""Up to this difference a pixel has the word's colour."""
MIN_APPROACH = 0.25
"""How far the pixels of a word go from its background to its own colour, as a share; thin letters never reach it."""
MAX_SHARE = 0.55
"""Share of a word's pixels in its own colour from which this is the colour of its background."""
MIN_LETTERS = 3
"""Letters and digits of a word that is judged by this share: a dash or an l fills its box."""
TINY_PT, PRINT_PT = 2.0, 4.0
"""Below the first size words are tiny, on pages that have words of at least the second."""
COVER = 0.8
UNDER_IMAGE = 0.5
"""Shares of a word that something drawn later covers, and that an image under an undrawn word has."""

Boxes = NDArray[np.float64]
"""(words, 4): x0, y0, x1, y1 in pixels or points."""


@dataclass(frozen=True, eq=False)
class WordStyles:
    """What a PDF says of its words."""

    colours: NDArray[np.int16]
    """(words, 3), RGB."""
    sizes_pt: NDArray[np.float64]
    is_drawn: NDArray[np.bool_]
    """Filled or stroked, as all render modes but 3 and 7 are."""
    is_vertical: NDArray[np.bool_]
    """Written from top to bottom: MuPDF's boxes of such letters are up to one size too low."""


Drawn = tuple[str, tuple[float, float, float, float]]
"""Something that is drawn, in order: MuPDF's name of the kind, and its box in points."""


def mark_words(
    texts: Sequence[str],
    boxes_pt: Boxes,
    styles: WordStyles,
    page_box: tuple[float, float, float, float],
    pixels: Pixels,
    scale: tuple[float, float],
    list_drawn: Callable[[], Sequence[Drawn]],
    has_large_image: bool = False,
) -> NDArray[np.uint8]:
    """Return the mark of each word.

    `boxes_pt` and `page_box` are in the page's own coordinates, `pixels` begin at the page's top left corner and `scale` is in pixels per
    point. `list_drawn` is called where a word is suspicious, and where `has_large_image` says that the page may be a scan.
    """
    marks = np.zeros(len(texts), np.uint8)
    if not len(texts):
        return marks
    left, top, right, bottom = page_box
    middles = (boxes_pt[:, :2] + boxes_pt[:, 2:]) / 2
    is_off = (middles < (left, top)).any(1) | (middles > (right, bottom)).any(1)
    reach_pt = np.where(styles.is_vertical, styles.sizes_pt, 0.0)
    boxes = (boxes_pt - (left, top, left, top)) * (*scale, *scale)
    boxes += np.outer(reach_pt * scale[1], (0, -1, 0, 1))
    letters = np.array([sum(map(str.isalnum, text)) for text in texts])
    is_judged = ~is_off & (letters > 0) & (boxes[:, 3] - boxes[:, 1] >= MIN_HEIGHT_PX)
    ink, share, approach = measure_pixels(pixels, boxes, styles.colours)
    for word in np.flatnonzero(is_judged & (ink < SCAN_INK)):
        ink[word] = measure_ink(pixels, boxes[word])
    sizes = styles.sizes_pt
    is_tiny = (sizes < TINY_PT) & (letters > 0) & (sizes.max() >= PRINT_PT)
    is_same = is_judged & (share > MAX_SHARE) & (letters >= MIN_LETTERS)
    marks[is_same | (is_judged & (ink < INK))] = WordMark.NO_INK
    marks[is_tiny] = WordMark.TINY
    is_strange = is_judged & styles.is_drawn & (marks == 0) & (approach < MIN_APPROACH)
    undrawn = ~styles.is_drawn & ~is_off
    if is_strange.any() or undrawn.any() or has_large_image:
        drawn = list_drawn()
        if covers_all_text(drawn, page_box):
            marks[is_judged & (marks == 0) & (ink >= SCAN_INK)] = WordMark.OVERLAY
        for word in np.flatnonzero(is_strange):
            marks[word] = judge_covered(boxes_pt[word], drawn, ink[word], page_box)
        images = [box for kind, box in drawn if kind in ("fill-image", "fill-imgmask", "fill-shade")]
        for word in np.flatnonzero(undrawn):
            over = any(measure_overlap(boxes_pt[word], box) >= UNDER_IMAGE for box in images)
            marks[word] = WordMark.OVERLAY if over and (ink[word] >= SCAN_INK or not is_judged[word]) else WordMark.UNDRAWN
    marks[is_off] = WordMark.OFF_PAGE
    return marks


def measure_pixels(pixels: Pixels, boxes: Boxes, colours: NDArray[np.int16]) -> tuple[NDArray[np.int16], Boxes, Boxes]:
    """Return for each word the range of its sampled pixels, the share of them in its own colour, and how far they approach it: 1 where one
    has it, 0 where all are as far from it as the one that is farthest."""
    height, width, _ = pixels.shape
    x0, y0, x1, y1 = boxes.T
    rows = y0 + (y1 - y0) * np.linspace(MARGIN, 1 - MARGIN, ROWS)[:, None]
    columns = x0 + (x1 - x0) * ((np.arange(COLUMNS) + 0.5) / COLUMNS)[:, None]
    rows, columns = np.clip(rows, 0, height - 1).astype(np.intp), np.clip(columns, 0, width - 1).astype(np.intp)
    places = (rows[:, None, :] * width + columns[None, :, :]).reshape(ROWS * COLUMNS, len(boxes))
    ink, differences = np.zeros(len(boxes), np.int16), np.zeros(places.shape, np.int16)
    for channel in range(3):  # each contiguous over the words, so that numpy reduces whole rows at once
        samples = pixels.reshape(-1, 3)[places, channel].astype(np.int16)
        np.maximum(ink, samples.max(0) - samples.min(0), out=ink)
        np.maximum(differences, np.abs(samples - colours[:, channel]), out=differences)
    return ink, (differences <= SAME_COLOUR).mean(0), 1 - differences.min(0) / np.maximum(1, differences.max(0))


def measure_ink(pixels: Pixels, box: NDArray[np.float64]) -> int:
    """Return the range of a word's pixels, of the channel in which it is largest."""
    x0, y0, x1, y1 = box
    margin = (y1 - y0) * MARGIN
    inside = pixels[max(0, int(y0 + margin)) : max(0, int(y1 - margin)) + 1, max(0, int(x0)) : max(0, int(x1)) + 1].reshape(-1, 3)
    return int((inside.max(0) - inside.min(0)).max()) if len(inside) else 0


def judge_covered(box: NDArray[np.float64], drawn: Sequence[Drawn], ink: int, page_box: tuple[float, float, float, float]) -> int:
    """Return the mark of a word whose colour is not to be seen: covered if something that was drawn after the first text there covers it.

    Under a picture of the page with ink there it is what OCR software adds to a scan.
    """
    middle = (box[1] + box[3]) / 2
    box = np.array([box[0], middle - (box[3] - box[1]) * MARGIN, box[2], middle + (box[3] - box[1]) * MARGIN])  # no taller than its letters
    texts = (at for at, (kind, other) in enumerate(drawn) if kind.endswith("-text") and measure_overlap(box, other) >= COVER)
    for kind, other in drawn[next(texts, len(drawn)) + 1 :]:
        if kind in ("fill-path", "fill-image", "fill-shade") and measure_overlap(box, other) >= COVER:
            is_scan = kind == "fill-image" and measure_overlap(np.array(page_box), other) >= UNDER_IMAGE and ink >= SCAN_INK
            return WordMark.OVERLAY if is_scan else WordMark.COVERED
    return WordMark.PRINTED


def covers_all_text(drawn: Sequence[Drawn], page_box: tuple[float, float, float, float]) -> bool:
    """Say whether a picture of the page is drawn over all of its text: a scan, whose text OCR software has added beneath it."""
    last = max((at for at, (kind, _) in enumerate(drawn) if kind.endswith("-text") and kind != "ignore-text"), default=len(drawn))
    return any(kind == "fill-image" and measure_overlap(page_box, box) >= COVER for kind, box in drawn[last + 1 :])


def measure_overlap(box: Iterable[float], other: Sequence[float]) -> float:
    """Return the share of a box that another one covers."""
    x0, y0, x1, y1 = box
    across, down = min(x1, other[2]) - max(x0, other[0]), min(y1, other[3]) - max(y0, other[1])
    area = (x1 - x0) * (y1 - y0)
    return across * down / area if area > 0 and across > 0 and down > 0 else 0.0


def collect_styles(words: Sequence[Any], blocks: Sequence[dict[str, Any]], drawn_flags: int) -> WordStyles:
    """Return the styles of MuPDF's words, given its spans by block and line; `drawn_flags` are the character flags of drawn text.

    A line's words and spans are the same characters: the n-th word begins where its text is found after the one before.
    """
    lines = {
        (block["number"], number): (line["spans"], line["wmode"] == 1)
        for block in blocks
        for number, line in enumerate(block.get("lines", ()))
    }
    styles: list[tuple[int, float, bool, bool]] = []
    place, at = None, 0
    for *_, text, block_no, line_no, _ in words:
        spans, is_vertical = lines.get((block_no, line_no), ((), False))
        if place != (block_no, line_no):
            place, at, whole = (block_no, line_no), 0, "".join(span["text"] for span in spans) if len(spans) > 1 else ""
        if len(spans) > 1:
            at = max(at, whole.find(text, at))
            span = find_span(spans, at)
            at += len(text)
        elif spans:
            span = spans[0]
        else:
            styles.append((0, PRINT_PT, True, False))
            continue
        styles.append((span["color"], span["size"], bool(span["char_flags"] & drawn_flags), is_vertical))
    columns = [np.array(column) for column in zip(*styles, strict=True)] or [np.zeros(0, np.int64)] * 4
    colours = np.stack([columns[0] >> shift & 255 for shift in (16, 8, 0)], 1).astype(np.int16)
    return WordStyles(colours, columns[1].astype(np.float64), columns[2].astype(np.bool_), columns[3].astype(np.bool_))


def find_span(spans: Sequence[dict[str, Any]], at: int) -> dict[str, Any]:
    """Return the span in which a character of a line stands."""
    for span in spans:
        at -= len(span["text"])
        if at < 0:
            return span
    return spans[-1]
