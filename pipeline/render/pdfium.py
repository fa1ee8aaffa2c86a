"""Second PDF renderer, on PDFium: takes the bytes of a PDF that MuPDF cannot open, or cannot draw a page of, and returns its pages.

A page has the size and the pixel grid that MuPDF would have given it, except that PDFium does not tell a page's UserUnit. The text
layer is not read. PDFium is built without JavaScript here.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from pypdfium2 import PdfDocument, raw

from pipeline.budget import ImageSize, RenderSettings, count_visual_tokens, fit_content, fit_page
from pipeline.errors import DocumentError
from pipeline.records import Page, Pixels
from pipeline.render.fallback import OpenPages
from pipeline.render.images import pad_with_white

RENDERER = "pdfium"


def open_pdf_with_pdfium(data: bytes, settings: RenderSettings) -> OpenPages:
    """Return the pages of a PDF. Raises DocumentError and PDFium's errors, also if the first page cannot be loaded."""
    pdf = PdfDocument(data, settings.password)
    pdf.init_forms()
    if not len(pdf):
        raise DocumentError("no_pages", "the PDF opens but has no pages")
    pdf[0].close()  # the number of pages may be a claim
    return OpenPages(len(pdf), lambda page_no: draw_page_with_pdfium(pdf, page_no, settings))


def draw_page_with_pdfium(pdf: Any, page_no: int, settings: RenderSettings) -> Page:
    """Return a page as it would be printed: crop box and rotation applied, annotations and form fields drawn."""
    page = pdf[page_no - 1]
    try:
        width_pt, height_pt = page.get_size()
        if not (0 < width_pt < math.inf and 0 < height_pt < math.inf):
            raise DocumentError("broken", f"page {page_no} measures {width_pt} x {height_pt} pt")
        canvas = fit_page(width_pt, height_pt, settings.dpi, settings.budget)
        inner = fit_content(width_pt, height_pt, canvas)
        pixels = pad_with_white(paint_page_with_pdfium(page, inner), canvas)
    finally:
        page.close()
    dpi = 72 * math.sqrt(inner.width_px * inner.height_px / (width_pt * height_pt))
    return Page(page_no, pixels, dpi, width_pt, height_pt, count_visual_tokens(canvas, settings.budget.cell_px), renderer=RENDERER)


def paint_page_with_pdfium(page: Any, size: ImageSize) -> Pixels:
    """Return the pixels of a page at exactly this size."""
    pixels = np.full((size.height_px, size.width_px, 3), 0xFF, np.uint8)
    buffer = pixels.ctypes.data_as(ctypes.c_void_p)
    bitmap = raw.FPDFBitmap_CreateEx(size.width_px, size.height_px, raw.FPDFBitmap_BGR, buffer, pixels.strides[0])
    if not bitmap:
        raise MemoryError(f"no bitmap of {size.width_px}x{size.height_px} px")
    area, flags = (0, 0, size.width_px, size.height_px, 0), raw.FPDF_ANNOT | raw.FPDF_REVERSE_BYTE_ORDER
    raw.FPDF_RenderPageBitmap(bitmap, page, *area, flags)
    if page.formenv:
        raw.FPDF_FFLDraw(page.formenv, bitmap, page, *area, flags)
    raw.FPDFBitmap_Destroy(bitmap)
    return pixels
