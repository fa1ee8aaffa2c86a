"""OCR reads the pixels of real receipts, and its words witness their totals and dates."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from pipeline.budget import RenderSettings
from pipeline.errors import DocumentError, JobError
from pipeline.evidence.layers import judge_layer
from pipeline.evidence.match import UNWITNESSED, Match, Witness, match_values
from pipeline.evidence.ocr import load_ocr, read_words_by_ocr
from pipeline.evidence.text_layer import PageWords, collect_page_words
from pipeline.records import OcrRow, PageLayer
from pipeline.render.document import render_pages
from pipeline.render.sandbox import ReadingSandbox
from pipeline.stages.ocr import OcrStage, OcrTaskRow, UnreadRow
from tests.support.pdfs import make_page_pdf, make_pages_pdf, make_undrawn_pdf
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
    stage = OcrStage(make_render_plan(RenderSettings(), folder, 1))
    try:
        return list(stage.read_documents(list_documents(folder, *files, must_read=must_read)))
    finally:
        stage.close()


def list_documents(folder: Path, *files: bytes, pages: int = 1, must_read: bool = False) -> list[OcrTaskRow]:
    """Write some documents, and return them as the stage gets them."""
    wanted: list[OcrTaskRow] = []
    for number, data in enumerate(files):
        (folder / f"{number}.pdf").write_bytes(data)
        found = (folder / f"{number}.pdf").stat()
        doc_id = hashlib.sha256(data).hexdigest()
        listed = {"source": f"{number}.pdf", "size_bytes": found.st_size, "version": str(found.st_mtime_ns), "doc_id": doc_id}
        wanted.append({**listed, "page_count": pages, "pages": [*range(1, pages + 1)], "must_read": must_read})  # type: ignore[typeddict-item]
    return wanted


def test_a_page_that_cannot_be_read_is_a_row_and_the_next_is_read(tmp_path: Path) -> None:
    pytest.importorskip("rapidocr")
    undrawn, scan, printed = look_at(tmp_path, make_undrawn_pdf(b""), scan_slip(), print_slip())
    assert (undrawn["status"], undrawn["failure"]["stage"]) == ("failed", "render")  # type: ignore[typeddict-item,index]
    assert (scan["status"], scan["layer"], "19.99" in scan["words"]["text"]) == ("read", "none", True)  # type: ignore[typeddict-item,index]
    assert (printed["status"], printed["layer"], printed["words"]) == ("not_needed", "usable", None)  # type: ignore[typeddict-item]


HANGING_READER = """
import sys, time
from dataclasses import replace
import numpy as np
from pipeline.records import Word
from pipeline.render.document import open_document
from pipeline.render.worker import serve_parent

def read_page(page, cell_px):
    while page.page_no == 2:
        time.sleep(1)
    return replace(page, pixels=np.zeros((cell_px, cell_px, 3), np.uint8), words=(Word(f"page{page.page_no}", 1, 2, 3, 4),))

serve_parent(int(sys.argv[1]), open_document, read_page)
"""
"""A reading worker whose library never returns from the second page."""


def test_a_page_on_which_ocr_never_returns_is_a_row_and_the_next_ones_are_read(tmp_path: Path) -> None:
    pytest.importorskip("rapidocr")
    (tmp_path / "reader.py").write_text(HANGING_READER)
    stage = OcrStage(make_render_plan(RenderSettings(timeout_s=1.5), tmp_path, 1))
    stage.sandbox.program = (str(tmp_path / "reader.py"),)
    before, failed, after = stage.read_documents(list_documents(tmp_path, make_pages_pdf(3), pages=3, must_read=True))
    stage.close()
    assert [(row["status"], row["words"] and row["words"]["text"]) for row in (before, failed, after)] == [  # type: ignore[typeddict-item]
        ("read", "page1"),
        ("failed", None),
        ("read", "page3"),
    ]
    why = {"stage": "ocr", "kind": "timeout", "message": "page 2 took more than 7.5 s (5 times `limits.timeout_s`) and was given up"}
    assert failed["failure"] == why


def test_a_reader_that_stands_still_is_replaced() -> None:
    pytest.importorskip("rapidocr")
    with ReadingSandbox(RenderSettings(timeout_s=2)) as sandbox:
        sandbox.open(scan_slip())
        assert sandbox.child is not None
        still = sandbox.child
        os.kill(still.pid, signal.SIGSTOP)
        with pytest.raises(DocumentError, match="page 1 took more than 10 s"):
            sandbox.read_page(1)
        assert still.returncode == -signal.SIGKILL
        assert "19.99" in {word.text for word in sandbox.read_page(1).words}


READER_WITHOUT_FILES = """
import sys
from pipeline.render import landlock, reading_worker, worker
from pipeline.render.document import open_document
landlock.query_landlock_abi = lambda: 0
reading_worker.read_first_line()
worker.serve_parent(int(sys.argv[1]), open_document, reading_worker.read_page)
"""
"""The reading worker on a kernel without Landlock, where it opens no file after its start."""


def test_no_file_is_opened_to_read_a_page(tmp_path: Path) -> None:
    expected = read(scan_slip())
    (tmp_path / "reader.py").write_text(READER_WITHOUT_FILES)
    with ReadingSandbox(RenderSettings()) as sandbox:
        sandbox.program = (str(tmp_path / "reader.py"),)
        sandbox.open(scan_slip())
        words = sandbox.read_page(1).words
    assert [word.text for word in words] == expected.texts
    assert np.array_equal([word[1:5] for word in words], expected.boxes)


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
