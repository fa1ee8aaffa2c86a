"""Alerts of a document: its words and the evidence for its values in, what a reader of the pages cannot know of out.

    hidden_text     text that a reader cannot see, of `MIN_LETTERS` letters or more in the document: it may hold instructions for the model
    hidden_value    a value of the record that only such text shows, however short
    different_text  a page whose text layer is another text than the one that OCR reads there, or a value that OCR reads where the layer
                    has other words: readers of text and of pixels do not read the same document

Honest documents hide text, too: a report that prints zeros in white, a template's mark below the page. These are shorter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TypedDict

from pipeline.evidence.layers import find_words_at, is_page_different, is_same_text
from pipeline.evidence.match import Evidence, Match, Witness
from pipeline.evidence.text_layer import PageWords
from pipeline.records import WordMark

MIN_LETTERS = 20
"""Letters of the distinct hidden texts of a document from which they are an alert; digits are not counted."""
MAX_TEXT = 500
PRODUCERS_MARKS = frozenset({"powered by tcpdf (www.tcpdf.org)", "<powered by set in code>"})
"""What PDF libraries put on pages without drawing it."""


class AlertRow(TypedDict):
    """An alert as a record holds it."""

    kind: str
    page: int
    reason: str
    """Why it is hidden: the name of a `WordMark` in lower case; `page` or `value`: what differs."""
    text: str
    path: str | None
    """Of the value that only hidden text shows."""


def list_alerts(pages: Sequence[PageWords], evidence: Sequence[Evidence]) -> list[AlertRow]:
    """Return the alerts of a document: one for each reason for which text is hidden, one for each page that differs, one for each value."""
    hidden = [found for found in list_hidden_texts(pages) if found[2].casefold() not in PRODUCERS_MARKS]
    distinct = {text.casefold(): text for _, _, text in hidden}
    alerts: list[AlertRow] = []
    if sum(letter.isalpha() for text in distinct.values() for letter in text) >= MIN_LETTERS:
        for mark in sorted({mark for _, mark, _ in hidden}):
            texts = dict.fromkeys(text for _, other, text in hidden if other == mark)
            page_no = next(number for number, other, _ in hidden if other == mark)
            alerts.append(make_alert("hidden_text", page_no, name_mark(mark), " … ".join(texts)))
    layers = {page.page_no: page for page in pages if not (page.is_ocr or page.is_second)}
    for page in pages:
        if page.is_ocr and (layer := layers.get(page.page_no)) and is_page_different(layer, page):
            alerts.append(make_alert("different_text", page.page_no, "page", " ".join(layer.texts)))
    for found in evidence:
        if found.match == Match.HIDDEN and found.page is not None:
            alerts.append(make_alert("hidden_value", found.page, name_mark(find_mark(pages, found)), found.words or "", found.path))
        elif found.witness == Witness.OCR and found.is_witnessed and (layer := layers.get(found.page or 0)) is not None:
            words = find_words_at(layer, found.box or (0, 0, 0, 0))
            if words and not is_same_text(found.words or "", words):
                alerts.append(make_alert("different_text", layer.page_no, "value", words, found.path))
    return alerts


def make_alert(kind: str, page: int, reason: str, text: str, path: str | None = None) -> AlertRow:
    """Return an alert, its text cut."""
    return {"kind": kind, "page": page, "reason": reason, "text": text[:MAX_TEXT], "path": path}


def name_mark(mark: int) -> str:
    """Return why words with a mark are hidden."""
    return WordMark(mark).name.lower()


def list_hidden_texts(pages: Iterable[PageWords]) -> list[tuple[int, int, str]]:
    """Return the hidden texts of a document, each words that follow each other and are hidden for one reason: page, mark, text."""
    found = []
    for page in pages:
        if page.marks.max(initial=0) > WordMark.OVERLAY:
            for mark, words in groupby(zip(page.marks.tolist(), page.texts, strict=True), key=lambda word: word[0]):
                if mark > WordMark.OVERLAY:
                    found.append((page.page_no, mark, " ".join(text for _, text in words)))
    return found


def find_mark(pages: Iterable[PageWords], found: Evidence) -> int:
    """Return why the words of a value are hidden."""
    x0, y0, x1, y1 = found.box or (0, 0, 0, 0)
    for page in pages:
        if page.page_no == found.page:
            left, top, right, bottom = page.boxes.T
            inside = (left < x1 + 1) & (right > x0 - 1) & (top < y1 + 1) & (bottom > y0 - 1) & (page.marks > WordMark.OVERLAY)
            if inside.any():
                return int(page.marks[inside][0])
    return int(WordMark.NO_INK)
