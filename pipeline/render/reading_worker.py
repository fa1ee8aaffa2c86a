"""Reading worker: a render worker (`worker.py`) that can also read a page by OCR, started with `python -m pipeline.render.reading_worker
DESCRIPTOR`.

The models of OCR are loaded, and have read a line, before the worker confines itself: it opens no file after that.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pymupdf

from pipeline.errors import DocumentError
from pipeline.evidence.ocr import read_words_by_ocr
from pipeline.records import Page, Word


def read_page(page: Page, cell_px: int) -> Page:
    """Return a page with the words that OCR reads on it, and no more pixels than one cell.

    Raises DocumentError of the kind `internal` for whatever the libraries of OCR raise, which have no common class.
    """
    try:
        words = read_words_by_ocr(page.page_no, page.pixels, page.width_pt, page.height_pt)
    except Exception as error:
        raise DocumentError("internal", f"{type(error).__name__}: {error}") from error
    found = tuple(Word(text, *box) for text, box in zip(words.texts, words.boxes.tolist(), strict=True))
    return replace(page, pixels=np.zeros((cell_px, cell_px, 3), np.uint8), words=found)


def read_first_line() -> None:
    """Read a line of print, so that whatever OCR loads at its first page is there."""
    sheet = pymupdf.open().new_page(width=280, height=56)
    sheet.insert_text((20, 36), "Total 19.99", fontsize=24)
    drawn = sheet.get_pixmap()
    read_words_by_ocr(1, np.frombuffer(drawn.samples, np.uint8).reshape(drawn.height, drawn.width, 3), drawn.width, drawn.height)


if __name__ == "__main__":
    from pipeline.render.document import open_document
    from pipeline.render.worker import serve_parent

    read_first_line()
    serve_parent(int(sys.argv[1]), open_document, read_page)
