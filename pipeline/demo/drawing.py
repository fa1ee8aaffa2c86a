"""Drawing of sheets: makes PDF pages, rasterized pages and simulated scans of them.

The fonts are the standard fourteen of PDF, which are not embedded, so a page is about one kilobyte.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence

import numpy as np
import pymupdf
from PIL import Image, ImageFilter

from pipeline.demo.sheets import DPI, HEIGHT_PX, WIDTH_PX, Sheet
from pipeline.job import DEMO_MARK
from pipeline.records import Pixels

PT_PER_PX = 72 / DPI


def draw_pdf(sheets: Sequence[Sheet]) -> bytes:
    """Return a PDF with one page per sheet and the mark of a sample; the same sheets give the same bytes."""
    document = open_sheets(sheets)
    document.set_metadata({"subject": DEMO_MARK.decode()})
    return bytes(document.tobytes(garbage=3, deflate=True, no_new_id=True))


def open_sheets(sheets: Sequence[Sheet]) -> pymupdf.Document:
    """Return an open PDF document with one page per sheet."""
    document = pymupdf.open()
    for sheet in sheets:
        page = document.new_page(width=WIDTH_PX * PT_PER_PX, height=HEIGHT_PX * PT_PER_PX)
        for font in sorted({run.font for run in sheet.runs}):
            page.insert_font(fontname=font)
        stream = document.get_new_xref()
        document.update_object(stream, "<<>>")
        document.update_stream(stream, build_content_stream(sheet))
        page.set_contents(stream)
    return document


def build_content_stream(sheet: Sheet) -> bytes:
    """Return the page's content stream (PDF 32000-1, 9.4): one text object per run, one stroke per rule."""
    lines = [f"{PT_PER_PX:.6f} 0 0 {PT_PER_PX:.6f} 0 0 cm".encode()]
    for run in sheet.runs:
        text = run.text.encode("cp1252").hex()
        lines.append(f"BT /{run.font} {run.size_px:.3f} Tf {run.x_px:.3f} {HEIGHT_PX - run.y_px:.3f} Td <{text}> Tj ET".encode())
    lines += [f"{r.x0_px:.2f} {HEIGHT_PX - r.y0_px:.2f} m {r.x1_px:.2f} {HEIGHT_PX - r.y1_px:.2f} l S".encode() for r in sheet.rules]
    return b"\n".join(lines)


def rasterize_sheet(sheet: Sheet) -> Pixels:
    """Return the page as MuPDF rasterizes it at 200 dpi: (448, 448, 3) uint8."""
    document = open_sheets([sheet])
    image = document[0].get_pixmap(matrix=pymupdf.Matrix(DPI / 72, DPI / 72), alpha=False)
    return np.frombuffer(image.samples, np.uint8).reshape(image.height, image.width, 3)


def simulate_scan(page: Pixels, rng: random.Random) -> tuple[Pixels, float]:
    """Return the page as a poor scan, and the angle of its rotation in degrees counter-clockwise.

    Adds a slight rotation, grey paper, blur, noise and JPEG artefacts, all weak enough for a person to read the page.
    """
    angle = rng.uniform(-0.5, 0.5)
    paper = rng.randint(225, 255)
    image = Image.fromarray(page).rotate(angle, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.6)))
    noise = np.random.default_rng(rng.randrange(2**32)).standard_normal(page.shape[:2], np.float32) * rng.uniform(0, 9)
    ink = rng.uniform(0, 60)
    grey = ink + np.asarray(image, np.float32)[..., 1] * ((paper - ink) / 255) + noise
    encoded = encode_scan_jpeg(np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, 2), rng.randint(55, 92))
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")), angle


def encode_scan_jpeg(page: Pixels, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(page).save(buffer, "JPEG", quality=quality, dpi=(DPI, DPI), comment=DEMO_MARK)
    return buffer.getvalue()
