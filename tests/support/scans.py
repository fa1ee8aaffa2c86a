"""Pages of print and pictures of them, for tests of OCR."""

from __future__ import annotations

import io

from PIL import Image

from pipeline.budget import RenderSettings
from pipeline.render.document import render_pages
from tests.support.pdfs import make_page_pdf

SLIP = "BT /F 24 Tf 60 400 Td (Slip of the tea house) Tj 0 -60 Td (Total) Tj 200 0 Td (19.99 EUR) Tj ET"


def print_slip(content: str = SLIP) -> bytes:
    """Return a PDF whose text layer is what it shows."""
    return make_page_pdf(600, 500, content.encode())


def draw_picture(pdf: bytes) -> bytes:
    """Return a PDF's first page as a PNG."""
    (page,) = render_pages(pdf, RenderSettings())
    picture = io.BytesIO()
    Image.fromarray(page.pixels).save(picture, "png")
    return picture.getvalue()


def scan_slip() -> bytes:
    """Return a slip as a picture."""
    return draw_picture(print_slip())


def forge_slip() -> bytes:
    """Return a slip whose text layer says another total than it shows."""
    return print_slip(SLIP.replace("(19.99 EUR) Tj", "/Span <</ActualText (11.11)>> BDC (19.99) Tj EMC ( EUR) Tj"))
