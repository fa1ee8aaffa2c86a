"""The second PDF renderer draws the pages that MuPDF cannot, on the same pixels, and no others."""

from __future__ import annotations

import numpy as np
import pymupdf
import pytest

from pipeline.budget import PixelBudget, RenderSettings
from pipeline.errors import DocumentError
from pipeline.render import document
from pipeline.render.document import open_document, render_pages
from pipeline.render.pdf import open_pdf
from pipeline.render.pdfium import open_pdf_with_pdfium
from tests.support.pdfs import LEAF, draw_corners, make_page_pdf, make_pdf, make_stream, make_undrawn_pdf, make_unopened_pdf
from tests.support.tiffs import MIN_IS_BLACK, write_tiff

SETTINGS = RenderSettings(PixelBudget(784, 200 * 784))


def test_a_document_that_mupdf_cannot_open() -> None:
    opened = open_document(make_unopened_pdf(), SETTINGS)
    page = opened.draw(1)
    assert (opened.page_count, page.renderer, page.width_pt, page.height_pt) == (1, "pdfium", 200, 100)
    assert (page.pixels < 128).all(axis=2).mean() == pytest.approx(1 / 8, abs=0.01)


def test_a_page_that_mupdf_cannot_draw() -> None:
    page = next(render_pages(make_undrawn_pdf(), SETTINGS))
    assert page.renderer == "pdfium"
    assert (page.pixels < 128).all(axis=2).mean() == pytest.approx(1 / 8, abs=0.01)


def test_a_page_that_it_leaves_white_stays_a_failure() -> None:
    with pytest.raises(DocumentError) as caught:
        next(render_pages(make_undrawn_pdf(b""), SETTINGS))
    assert caught.value.kind == "broken"


def test_a_page_that_mupdf_draws_is_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setitem(document.SECOND_RENDERERS, document.DocumentKind.PDF, lambda *_: tried.append("pdfium"))
    monkeypatch.setitem(document.SECOND_RENDERERS, document.DocumentKind.TIFF, lambda *_: tried.append("tifffile"))
    for data in (make_page_pdf(), write_tiff(np.zeros((28, 28, 1), np.uint8), 8, MIN_IS_BLACK)):
        assert next(render_pages(data, SETTINGS)).renderer == ""
    assert tried == []


GEOMETRIES = {"plain": "", "rotated": "/Rotate 90", "turned back": "/Rotate -90", "cropped": "/CropBox[20 10 150 90]",
              "cropped and rotated": "/CropBox[20 10 150 90]/Rotate 270"}  # fmt: skip


@pytest.mark.parametrize("extra", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("budget", [SETTINGS.budget, PixelBudget(resized_width=280, resized_height=280)], ids=["free", "fixed"])
def test_its_pixels_are_where_mupdf_has_them(extra: str, budget: PixelBudget) -> None:
    data = make_page_pdf(content=b"1 0 0 rg " + draw_corners(200, 100, 30) + b" 0 0 1 rg 60 20 25 40 re f", extra=extra)
    first, second = (opener(data, RenderSettings(budget)).draw(1) for opener in (open_pdf, open_pdf_with_pdfium))
    assert first.pixels.shape == second.pixels.shape
    assert (first.width_pt, first.height_pt, first.dpi, first.visual_tokens) == pytest.approx(
        (second.width_pt, second.height_pt, second.dpi, second.visual_tokens)
    )
    assert np.abs(first.pixels.astype(int) - second.pixels).mean() < 2


def test_form_fields_and_annotations_are_drawn() -> None:
    made = pymupdf.open(stream=make_page_pdf())
    widget = pymupdf.Widget()
    widget.field_type, widget.field_name, widget.field_value = pymupdf.PDF_WIDGET_TYPE_TEXT, "a", "HHHHH"
    widget.rect, widget.fill_color = pymupdf.Rect(0, 0, 100, 100), (1, 0, 0)
    made[0].add_widget(widget)
    pixels = open_pdf_with_pdfium(made.tobytes(), SETTINGS).draw(1).pixels.astype(int)
    assert ((pixels[..., 0] - pixels[..., 1]) > 100).mean() > 0.4


def test_a_password_opens_it_and_another_does_not() -> None:
    made = pymupdf.open(stream=make_page_pdf(content=b"0 0 50 50 re f"))
    data = made.tobytes(encryption=pymupdf.PDF_ENCRYPT_AES_256, user_pw="sesame", owner_pw="other")
    assert open_pdf_with_pdfium(data, RenderSettings(password="sesame")).page_count == 1
    with pytest.raises(DocumentError) as caught:
        open_document(data, RenderSettings(password="wrong"))
    assert caught.value.kind == "encrypted"


def test_an_empty_icc_profile_is_no_lack_of_memory() -> None:
    image = "/Type/XObject/Subtype/Image/Width 10/Height 10/BitsPerComponent 8/ColorSpace[/ICCBased 6 0 R]"
    leaf = LEAF.replace("/Contents", "/Resources<</XObject<</X 5 0 R>>>>/Contents")
    tree = ("<</Type/Catalog/Pages 2 0 R>>", "<</Type/Pages/Kids[3 0 R]/Count 1>>", leaf, make_stream(b"200 0 0 100 0 0 cm /X Do"))
    page = next(render_pages(make_pdf(*tree, make_stream(bytes(100), image), make_stream(b"", "/N 1/Alternate/DeviceGray")), SETTINGS))
    assert page.renderer == ""
    assert page.pixels.max() == 0
