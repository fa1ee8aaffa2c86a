"""Pages of words for tests, laid out as they are typed: a letter is 6 pt wide, a line 20 pt high, two spaces begin another cell."""

from __future__ import annotations

import re

import numpy as np

from pipeline.evidence.text_layer import PageWords, pack_words
from pipeline.records import Page, TextLayerRow, Word, WordMark

LETTER_PT, LINE_PT, PRINT_PT = 6.0, 20.0, 10.0


def print_page(text: str, page_no: int = 1, mark: int = 0) -> PageWords:
    """Return the words of a page as typed, in the order of its lines; the first line stands 0 to 10 pt from the top."""
    words = [
        (word[0], word.start() * LETTER_PT, line * LINE_PT, word.end() * LETTER_PT, line * LINE_PT + PRINT_PT)
        for line, typed in enumerate(text.strip("\n").split("\n"))
        for word in re.finditer(r"\S+", typed)
    ]
    boxes = np.array([word[1:] for word in words], np.float64).reshape(-1, 4)
    return PageWords(page_no, [word[0] for word in words], boxes, np.full(len(words), mark, np.uint8))


def pack_printed(page: PageWords) -> TextLayerRow | None:
    """Return the words of an A4 page as a ledger keeps them."""
    words = [Word(text, *box, WordMark(mark)) for text, box, mark in zip(page.texts, page.boxes.tolist(), page.marks.tolist(), strict=True)]
    return pack_words(Page(page.page_no, np.zeros((28, 28, 3), np.uint8), 100, 595, 842, 1, tuple(words)))
