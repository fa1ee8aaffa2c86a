"""OCR reads the pixels of real receipts, and its words witness their totals and dates."""

from __future__ import annotations

import json
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from pipeline.budget import RenderSettings
from pipeline.errors import JobError
from pipeline.evidence.match import UNWITNESSED, Match, Witness, match_values
from pipeline.evidence.ocr import load_ocr, read_words_by_ocr
from pipeline.evidence.text_layer import PageWords
from pipeline.render.document import render_pages
from tests.support.pdfs import make_page_pdf

RECEIPTS = Path(__file__).parents[3] / "shared/corpora/receipts"


def read(data: bytes) -> PageWords:
    pytest.importorskip("rapidocr")
    (page,) = render_pages(data, RenderSettings())
    return read_words_by_ocr(page.page_no, page.pixels, page.width_pt, page.height_pt)


@pytest.mark.skipif(not RECEIPTS.exists(), reason="the receipts are not here")
@pytest.mark.parametrize("name", ["000", "017", "022"])
def test_true_totals_and_dates_of_receipts_are_witnessed_and_altered_ones_are_not(name: str) -> None:
    words = read((RECEIPTS / f"{name}.jpg").read_bytes())
    truth = json.loads((RECEIPTS / f"{name}.json").read_text())
    total, day = truth["total"].removeprefix("RM"), truth["date"]
    true = match_values({}, {"total": total, "date": day}, [words])
    assert [found.match in UNWITNESSED for found in true] == [False, False]
    assert {found.witness for found in true} == {Witness.OCR}
    other_day = f"{(int(day[:2]) + 8) % 28 + 1:02}{day[2:]}"
    altered = match_values({}, {"total": str(Decimal(total) + Decimal("1111.11")), "date": other_day}, [words])
    assert [found.match in UNWITNESSED for found in altered] == [True, True]


def test_words_stand_where_the_page_has_them() -> None:
    page = read(make_page_pdf(400, 300, b"BT /F 24 Tf 100 100 Td (Total 19.99) Tj ET"))
    (found,) = match_values({}, {"total": Decimal("19.99")}, [page])
    assert (found.match, found.page) == (Match.EXACT, 1)
    assert found.box == pytest.approx((160, 178, 222, 206), abs=12)


def test_an_empty_page_has_no_words() -> None:
    assert read(make_page_pdf(400, 300)).texts == []


def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    load_ocr.cache_clear()
    with pytest.raises(JobError, match=r"pip install 'pipeline-documents\[ocr\]'"):
        read_words_by_ocr(1, np.zeros((28, 28, 3), np.uint8), 28, 28)
