"""OCR reads the pixels of real receipts, and its words witness their totals and dates."""

from __future__ import annotations

import hashlib
import json
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from pipeline.budget import RenderSettings
from pipeline.errors import JobError
from pipeline.evidence.layers import judge_layer
from pipeline.evidence.match import UNWITNESSED, Match, Witness, match_values
from pipeline.evidence.ocr import load_ocr, read_words_by_ocr
from pipeline.evidence.text_layer import PageWords, collect_page_words
from pipeline.records import OcrRow, PageLayer
from pipeline.render.document import render_pages
from pipeline.stages.ocr import OcrStage, OcrTaskRow, UnreadRow
from tests.support.pdfs import make_page_pdf, make_undrawn_pdf
from tests.support.scans import print_slip, scan_slip
from tests.support.stages import make_render_plan

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


def look_at(folder: Path, *files: bytes, must_read: bool = False) -> list[OcrRow | UnreadRow]:
    """Return what the stage says of the first page of some documents."""
    wanted: list[OcrTaskRow] = []
    for number, data in enumerate(files):
        (folder / f"{number}.pdf").write_bytes(data)
        found = (folder / f"{number}.pdf").stat()
        doc_id = hashlib.sha256(data).hexdigest()
        listed = {"source": f"{number}.pdf", "size_bytes": found.st_size, "version": str(found.st_mtime_ns), "doc_id": doc_id}
        wanted.append({**listed, "page_count": 1, "pages": [1], "must_read": must_read})  # type: ignore[typeddict-item]
    stage = OcrStage(make_render_plan(RenderSettings(), folder, 1))
    try:
        return list(stage.read_documents(wanted))
    finally:
        stage.close()


def test_a_page_that_cannot_be_read_is_a_row_and_the_next_is_read(tmp_path: Path) -> None:
    pytest.importorskip("rapidocr")
    undrawn, scan, printed = look_at(tmp_path, make_undrawn_pdf(b""), scan_slip(), print_slip())
    assert (undrawn["status"], undrawn["failure"]["stage"]) == ("failed", "render")  # type: ignore[typeddict-item,index]
    assert (scan["status"], scan["layer"], "19.99" in scan["words"]["text"]) == ("read", "none", True)  # type: ignore[typeddict-item,index]
    assert (printed["status"], printed["layer"], printed["words"]) == ("not_needed", "usable", None)  # type: ignore[typeddict-item]


def test_a_document_that_has_changed_is_not_read(tmp_path: Path) -> None:
    look_at(tmp_path, print_slip())
    (tmp_path / "0.pdf").write_bytes(scan_slip())
    found = (tmp_path / "0.pdf").stat()
    asked: OcrTaskRow = {
        "source": "0.pdf",
        "size_bytes": found.st_size,
        "version": str(found.st_mtime_ns),
        "doc_id": "0" * 64,
        "pages": [1, 2],
        "must_read": True,
    }
    (row,) = OcrStage(make_render_plan(RenderSettings(), tmp_path, 1)).read_documents([asked])
    assert (row["pages"], row["failure"]["kind"]) == (2, "changed")  # type: ignore[typeddict-item,index]


@pytest.mark.parametrize(
    ("content", "layer"),
    [
        (b"", PageLayer.NONE),
        (b"BT /F 24 Tf 60 400 Td (Total 19.99) Tj ET", PageLayer.USABLE),
        (
            b"".join(b"%d %d 6 9 re f " % (x, y) for x in range(40, 560, 12) for y in range(40, 460, 30))
            + b"BT /F 9 Tf 9 9 Td (Fax 1) Tj ET",
            PageLayer.PICTURES,
        ),
    ],
)
def test_a_layer_is_judged_by_what_it_covers(content: bytes, layer: PageLayer) -> None:
    (page,) = render_pages(make_page_pdf(600, 500, content), RenderSettings(text_layer=True))
    assert judge_layer(collect_page_words(page), page.pixels, page.width_pt, page.height_pt) == layer
