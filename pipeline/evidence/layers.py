"""Text layers and pixels compared: whether a page's text layer can be a witness, and where OCR of its pixels reads something else.

    usable layer        its words witness values first, OCR of the page second
    any other           OCR first, the layer second

A layer that says something else than what is drawn is an attack on readers of text, or a font without a table of its letters. OCR itself
errs in a letter here and there: a page differs where most of what can be compared does, a value where the layer has other words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.evidence.text_layer import PageWords
from pipeline.records import PageLayer, Pixels, WordMark

MAX_GARBAGE = 0.2
"""Share of a layer's characters that may stand for no letter."""
NO_LETTERS = frozenset({"Cc", "Cn", "Co", "Cs"})
CELL_PX = 14
INK = 64
"""Least range of a channel's values, of 255, in a cell of the page with ink on it."""
MIN_CELLS, MIN_COVERED = 60, 0.2
"""Cells with ink from which a page is judged, and the share of them that words must cover."""
COMPARED = re.compile(r"[a-z0-9]{4,}")
"""Runs of letters that every model of OCR reads; of other scripts and of accents its models differ."""
PARTS = re.compile(r"\d+|[^\W\d_]+")
MIN_VALUE = 2
"""Letters and digits of a value that is compared."""
MIN_COMPARED, MIN_AGREEMENT = 20, 0.4
"""Different runs of a layer from which a page is compared, and the share of them that OCR must have read."""


def judge_layer(layer: PageWords, pixels: Pixels, width_pt: float, height_pt: float) -> PageLayer:
    """Return how the text layer of a page does as a witness, given its pixels and its size."""
    if not layer.texts:
        return PageLayer.NONE
    if (layer.marks == WordMark.OVERLAY).mean() > 0.5:
        return PageLayer.OCR_SOFTWARE
    text = "".join(layer.texts)
    if sum(letter == "\ufffd" or unicodedata.category(letter) in NO_LETTERS for letter in text) > MAX_GARBAGE * len(text):
        return PageLayer.GARBAGE
    printed = layer.boxes[layer.marks <= WordMark.OVERLAY]
    is_inked, is_covered = find_ink(pixels), cover_cells(pixels, printed, width_pt, height_pt)
    is_picture = is_inked.sum() >= MIN_CELLS and (is_inked & is_covered).sum() < MIN_COVERED * is_inked.sum()
    return PageLayer.PICTURES if is_picture else PageLayer.USABLE


def find_ink(pixels: Pixels) -> NDArray[np.bool_]:
    """Return which cells of `CELL_PX` x `CELL_PX` pixels have ink; what remains at the right and the bottom is left out."""
    rows, columns = pixels.shape[0] // CELL_PX, pixels.shape[1] // CELL_PX
    green = pixels[: rows * CELL_PX, : columns * CELL_PX, 1].reshape(rows, CELL_PX, columns, CELL_PX)
    found: NDArray[np.bool_] = green.max((1, 3)).astype(np.int16) - green.min((1, 3)) >= INK
    return found


def cover_cells(pixels: Pixels, boxes: NDArray[np.float64], width_pt: float, height_pt: float) -> NDArray[np.bool_]:
    """Return which of these cells the boxes touch."""
    rows, columns = pixels.shape[0] // CELL_PX, pixels.shape[1] // CELL_PX
    covered = np.zeros((rows, columns), np.bool_)
    scale = np.array([pixels.shape[1] / width_pt, pixels.shape[0] / height_pt] * 2) / CELL_PX
    for x0, y0, x1, y1 in np.clip(boxes * scale, 0, [columns, rows] * 2).tolist():
        covered[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] = True
    return covered


def order_witnesses(layer: PageWords | None, ocr: PageWords | None, judged: str | None) -> list[PageWords]:
    """Return the readings of a page, the better witness first and the other marked as the second."""
    found = [one for one in ((layer, ocr) if judged == PageLayer.USABLE else (ocr, layer)) if one is not None and one.texts]
    return [*found[:1], *(replace(one, is_second=True) for one in found[1:])]


def is_page_different(layer: PageWords, ocr: PageWords) -> bool:
    """Say whether a text layer is another text than the one that OCR reads on the page.

    Both must have words to compare; a page whose lines OCR saw upright, turned by 90 degrees, is not compared.
    """
    wide, high = (ocr.boxes[:, 2] - ocr.boxes[:, 0]), (ocr.boxes[:, 3] - ocr.boxes[:, 1])
    if not len(wide) or float(np.median(wide - high)) <= 0:
        return False
    said = collect_runs(text for text, mark in zip(layer.texts, layer.marks.tolist(), strict=True) if mark <= WordMark.OVERLAY)
    read = "".join("".join(filter(str.isalnum, text.lower())) for text in ocr.texts)
    if len(said) < MIN_COMPARED or len(collect_runs(ocr.texts)) < MIN_COMPARED:
        return False
    return sum(run in read for run in said) < MIN_AGREEMENT * len(said)


def collect_runs(texts: Iterable[str]) -> set[str]:
    """Return the different runs of letters and digits that can be compared."""
    return {run for text in texts for run in COMPARED.findall(text.lower())}


def is_same_text(read: str, layer: str) -> bool:
    """Say whether what OCR reads at a place is what a layer has there, among other words perhaps.

    Numbers must be whole: 19.99 is not in 119.99. Of a text without digits the letters are compared, without the numbers of footnotes in
    the layer. One letter or digit alone is taken as the same: OCR reads a 1 for an I.
    """
    ours, theirs = (PARTS.findall(remove_accents(text)) for text in (read, layer))
    if not any(part.isdigit() for part in ours):
        return len("".join(ours)) < MIN_VALUE or "".join(ours) in "".join(part for part in theirs if not part.isdigit())
    return len("".join(ours)) < MIN_VALUE or any(theirs[at : at + len(ours)] == ours for at in range(len(theirs)))


def remove_accents(text: str) -> str:
    """Return a text in lower case without accents, which OCR does not read, and ligatures."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter)).casefold()


def find_words_at(layer: PageWords, box: Sequence[float]) -> str:
    """Return the words of a layer that a reader would see in a box, "" for none: those with their middle in it, or that have its middle."""
    x0, y0, x1, y1 = box
    left, top, right, bottom = layer.boxes.T
    across, down = (left + right) / 2, (top + bottom) / 2
    is_inside = (across > x0) & (across < x1) & (down > y0) & (down < y1)
    is_around = (left < (x0 + x1) / 2) & (right > (x0 + x1) / 2) & (top < (y0 + y1) / 2) & (bottom > (y0 + y1) / 2)
    return " ".join(layer.texts[at] for at in np.flatnonzero((is_inside | is_around) & (layer.marks == WordMark.PRINTED)))
