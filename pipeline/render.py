"""A document's bytes and a pixel budget -> pages as the model sees them. Knows no path, no job and no model.

The only door to MuPDF and Pillow. What kind a document is, its content says, never its name. A PDF page is
rasterized once, by MuPDF, at its final size; an image is resampled once. Everything that cannot be read is a
DocumentError of a stable kind. It parses strangers' bytes in C libraries: `sandbox.py` runs it in a process of its
own, with limits that nothing in here could enforce.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import pymupdf
from PIL import Image
from pymupdf import mupdf

from pipeline.budget import RenderSettings, Size, fit, fit_pixels, place, visual_tokens
from pipeline.errors import DocumentError
from pipeline.records import Page, Pixels, Word

ASSUMED_DPI = 200.0
BAND_PIXELS = 4_000_000
REDUCE_ABOVE = 3
"""Before the one resampling, whole blocks of a much larger image are averaged, down to this many times the target:
Pillow's `reducing_gap`, where 3.0 is as good as none."""
ORIENTATION = 0x0112
PHOTOMETRIC = 0x0106
MAX_WORDS = 20_000
MAX_WARNINGS = 20
ALLOCATION = re.compile(r"\b[mc]alloc\b|\brealloc\b|out of memory|allocat\w+ .*failed|bad_alloc", re.IGNORECASE)
"""What a library says when it gets no memory."""


class Kind(StrEnum):
    """The kinds of document that can be read; each value is Pillow's name for it, but for PDF."""

    PDF = "PDF"
    PNG = "PNG"
    JPEG = "JPEG"
    TIFF = "TIFF"
    WEBP = "WEBP"
    GIF = "GIF"
    BMP = "BMP"


MAGIC = {
    Kind.PNG: re.compile(rb"\x89PNG\r\n\x1a\n"),
    Kind.JPEG: re.compile(rb"\xff\xd8\xff"),
    Kind.TIFF: re.compile(rb"II[*+]\0|MM\0[*+]"),
    Kind.WEBP: re.compile(rb"RIFF....WEBP", re.DOTALL),
    Kind.GIF: re.compile(rb"GIF8[79]a"),
    Kind.BMP: re.compile(rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL),
    Kind.PDF: re.compile(rb".{0,8192}?(%PDF-|\b\d+ \d+ obj\b)", re.DOTALL),
}
TURN = Image.Transpose
TURNED = (TURN.FLIP_LEFT_RIGHT, TURN.ROTATE_180, TURN.FLIP_TOP_BOTTOM, TURN.TRANSPOSE, TURN.ROTATE_270, TURN.TRANSVERSE, TURN.ROTATE_90)
TURNS = dict(enumerate(TURNED, 2))
"""EXIF orientation -> what sets the picture upright."""
SWAPPING = TURNED[3:]


@dataclass(frozen=True, eq=False)
class Opened:
    """A document that opened without an error."""

    kind: Kind
    page_count: int
    draw: Callable[[int], Page]
    """Draws the page of this 1-based number."""


def render(data: bytes, settings: RenderSettings, first_page: int = 1, last_page: int | None = None) -> Iterator[Page]:
    """Yield a document's pages, drawn one by one. Raises DocumentError."""
    opened = inspect(data, settings)
    for page_no in range(first_page, min(last_page or opened.page_count, opened.page_count) + 1):
        yield opened.draw(page_no)


def inspect(data: bytes, settings: RenderSettings) -> Opened:
    """Return the document, opened and within the job's limits, or raise DocumentError."""
    if not data:
        raise DocumentError("empty", "the file is empty (0 bytes)")
    if len(data) > settings.max_file_bytes:
        allowed = f"`limits.max_file_mib` allows {settings.max_file_bytes / 2**20:g} MiB"
        raise DocumentError("too_large", f"the file has {len(data)} bytes; {allowed}")
    kind = recognise(data)
    with foreign(f"the {kind} file cannot be opened"):
        page_count, draw = open_pdf(data, settings) if kind is Kind.PDF else open_image(data, kind, settings)
    if page_count < 1:
        raise DocumentError("no_pages", f"the {kind} file opens but has no pages")
    if page_count > settings.max_pages:
        raise DocumentError("too_many_pages", f"the document has {page_count} pages; `limits.max_pages` is {settings.max_pages}")

    def draw_page(page_no: int) -> Page:
        with foreign(f"page {page_no} of the {kind} file cannot be drawn"):
            return draw(page_no)

    return Opened(kind, page_count, draw_page)


def recognise(data: bytes) -> Kind:
    """Return the kind that the content begins like; in a PDF the marker may come later, or an object without one."""
    for kind, magic in MAGIC.items():
        if magic.match(data):
            return kind
    raise DocumentError("unrecognised", f"the content is none of {', '.join(Kind)}: it begins with {data[:16]!r}")


@contextmanager
def foreign(failed: str) -> Iterator[None]:
    """Turn whatever MuPDF or Pillow raises into a DocumentError.

    The one place that catches everything: what they raise comes from unrelated families (`FzErrorBase` is not even a
    RuntimeError, Pillow's readers raise eight classes, struct.error and AssertionError among them).
    """
    try:
        yield
    except DocumentError:
        raise
    except Exception as error:
        said = re.sub(r"<\S+ object at 0x\w+>", "it", " ".join(str(error).split()))
        reason = plain(f"{type(error).__name__}: {said[:300]}")
        if isinstance(error, MemoryError) or ALLOCATION.search(reason):
            raise DocumentError("memory", f"{failed} within `limits.memory_mib`: {reason}") from None
        raise DocumentError("broken", f"{failed}: {reason}") from None


def plain(text: str) -> str:
    """Return foreign text as what UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


# ---- PDF ----------------------------------------------------------------------------------------------------------


def open_pdf(data: bytes, settings: RenderSettings) -> tuple[int, Callable[[int], Page]]:
    """Return a PDF's page count and what draws a page. Only MuPDF's PDF parser is asked, whatever else the bytes look like."""
    pymupdf.TOOLS.mupdf_display_errors(False)
    pymupdf.TOOLS.mupdf_display_warnings(False)
    pymupdf.TOOLS.reset_mupdf_warnings()
    stream = mupdf.fz_open_buffer(mupdf.fz_new_buffer_from_copied_data(data))
    pdf = mupdf.pdf_open_document_with_stream(stream)
    if mupdf.pdf_needs_password(pdf) and not mupdf.pdf_authenticate_password(pdf, settings.password or ""):
        hint = "the password from `source.password_env` does not open it"
        if not settings.password:
            hint = "it wants a password: name the environment variable that holds it as `source.password_env`"
        raise DocumentError("encrypted", f"the PDF is encrypted, and {hint}")
    return mupdf.pdf_count_pages(pdf), lambda page_no: draw_pdf_page(pdf, page_no, settings)


def draw_pdf_page(pdf: Any, page_no: int, settings: RenderSettings) -> Page:
    """Return a page as it would be printed: crop box and rotation applied, annotations and form fields drawn."""
    page = mupdf.pdf_load_page(pdf, page_no - 1).super()
    box = mupdf.fz_bound_page(page)
    width_pt, height_pt = box.x1 - box.x0, box.y1 - box.y0
    if not (0 < width_pt < math.inf and 0 < height_pt < math.inf):
        raise DocumentError("broken", f"page {page_no} measures {width_pt} x {height_pt} pt")
    canvas = fit(width_pt, height_pt, settings.dpi, settings.budget)
    inner = place(width_pt, height_pt, canvas)
    drawing = mupdf.fz_new_display_list_from_page(page)
    pixels = on_white(paint(drawing, box, inner), canvas)
    words = tuple(read_words(drawing, box))
    complaints = read_warnings()
    if lacking := [complaint for complaint in complaints if ALLOCATION.search(complaint)]:
        # MuPDF leaves out what it has no memory for and goes on: the page would lack its scan without a word.
        raise DocumentError("memory", f"page {page_no} cannot be drawn within `limits.memory_mib`: {lacking[0]}")
    dpi = 72 * math.sqrt(inner.width_px * inner.height_px / (width_pt * height_pt))
    return Page(page_no, pixels, dpi, width_pt, height_pt, visual_tokens(canvas), words, complaints)


def paint(drawing: Any, box: Any, size: Size) -> Pixels:
    """Return what a display list draws inside `box`, at exactly this size.

    `get_pixmap` would round the scaled box and may come out one pixel larger; a pixmap made first cannot.
    """
    across, down = size.width_px / (box.x1 - box.x0), size.height_px / (box.y1 - box.y0)
    area = mupdf.FzIrect(0, 0, size.width_px, size.height_px)
    pixmap = mupdf.fz_new_pixmap_with_bbox(mupdf.FzColorspace(mupdf.FzColorspace.Fixed_RGB), area, mupdf.FzSeparations(), 0)
    mupdf.fz_clear_pixmap_with_value(pixmap, 0xFF)
    matrix = mupdf.fz_make_matrix(across, 0, 0, down, -box.x0 * across, -box.y0 * down)
    device = mupdf.fz_new_draw_device(matrix, pixmap)
    everywhere = mupdf.FzRect(mupdf.FzRect.Fixed_INFINITE)
    mupdf.fz_run_display_list(drawing, device, mupdf.FzMatrix(), everywhere, mupdf.FzCookie())
    mupdf.fz_close_device(device)
    held = pymupdf.Pixmap("raw", pixmap)
    return np.frombuffer(held.samples_mv, np.uint8).reshape(size.height_px, size.width_px, 3).copy()


def read_words(drawing: Any, box: Any) -> Iterator[Word]:
    """Yield the words of the text layer that stand on the visible page, from its top left corner."""
    options = mupdf.FzStextOptions()
    options.flags = pymupdf.TEXT_PRESERVE_LIGATURES | pymupdf.TEXT_PRESERVE_WHITESPACE
    found = pymupdf.TextPage(mupdf.FzStextPage(drawing, options)).extractWORDS()
    for x0, y0, x1, y1, text, *_ in found[:MAX_WORDS]:
        if x0 < box.x1 and x1 > box.x0 and y0 < box.y1 and y1 > box.y0:
            yield Word(plain(text), x0 - box.x0, y0 - box.y0, x1 - box.x0, y1 - box.y0)


def read_warnings() -> tuple[str, ...]:
    """Return what MuPDF complained of since it was last asked."""
    lines = dict.fromkeys(plain(line[:300]) for line in pymupdf.TOOLS.mupdf_warnings().splitlines())
    return tuple(lines)[:MAX_WARNINGS]


# ---- Images -------------------------------------------------------------------------------------------------------


def open_image(data: bytes, kind: Kind, settings: RenderSettings) -> tuple[int, Callable[[int], Page]]:
    """Return an image's page count and what draws a page. Frames are pages in a TIFF; of an animation only the first is read."""
    # Pillow's own bomb check warns at 89 and raises at 179 megapixels; `max_image_pixels` stands in its place.
    Image.MAX_IMAGE_PIXELS = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=[kind])
        page_count = getattr(image, "n_frames", 1) if kind is Kind.TIFF else 1

    def draw(page_no: int) -> Page:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            image.seek(page_no - 1)
            page = draw_image(image, page_no, settings)
        texts = dict.fromkeys(plain(str(warning.message)[:300]) for warning in caught)
        return replace(page, warnings=(*page.warnings, *texts)[:MAX_WARNINGS])

    return page_count, draw


def draw_image(image: Image.Image, page_no: int, settings: RenderSettings) -> Page:
    """Return an image as a page: upright, RGB on white, resampled once."""
    # 1) what it measures, upright, in its own pixels and on paper
    if image.width * image.height > settings.max_image_pixels:
        allowed = f"`limits.max_image_megapixels` allows {settings.max_image_pixels / 1e6:g} megapixels"
        raise DocumentError("too_large", f"the image has {image.width}x{image.height} px; {allowed}")
    x_dpi, y_dpi = stated_dpi(image)
    turn = orient(image)
    turned = turn in SWAPPING
    if turned:
        x_dpi, y_dpi = y_dpi, x_dpi
    if image.format == Kind.TIFF:
        image.load()
        turn, turned = None, False
    upright = image.size[::-1] if turned else image.size
    # 2) its place on the canvas
    width_px, height_px = square(*upright, x_dpi, y_dpi)
    canvas = fit_pixels(width_px, height_px, settings.budget)
    inner = place(width_px, height_px, canvas)
    # 3) its pixels
    target = (inner.height_px, inner.width_px) if turned else (inner.width_px, inner.height_px)
    small = resample(image, target)
    pixels = on_white(np.asarray(small if turn is None else small.transpose(turn)), canvas)
    # 4) the page
    width_pt, height_pt = upright[0] / x_dpi * 72, upright[1] / y_dpi * 72
    dpi = 72 * math.sqrt(inner.width_px * inner.height_px / (width_pt * height_pt))
    animated = image.format in (Kind.GIF, Kind.WEBP, Kind.PNG) and getattr(image, "is_animated", False)
    notes = ("an animation: only its first frame is read",) if animated else ()
    return Page(page_no, pixels, dpi, width_pt, height_pt, visual_tokens(canvas), (), notes)


def orient(image: Image.Image) -> Image.Transpose | None:
    """Return what sets an image upright, by its EXIF orientation. Pillow turns a TIFF itself, when it is loaded."""
    tags = getattr(image, "tag_v2", None) or image.getexif()
    return TURNS.get(tags.get(ORIENTATION, 1))


def stated_dpi(image: Image.Image) -> tuple[float, float]:
    """Return the dpi that an image states of itself, else the assumed one."""
    try:
        x_dpi, y_dpi = (float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return ASSUMED_DPI, ASSUMED_DPI
    believable = all(20 <= value <= 10_000 for value in (x_dpi, y_dpi)) and 1 / 3 <= x_dpi / y_dpi <= 3
    return (x_dpi, y_dpi) if believable else (ASSUMED_DPI, ASSUMED_DPI)


def square(width_px: int, height_px: int, x_dpi: float, y_dpi: float) -> tuple[int, int]:
    """Return the natural size in square pixels: a fax of 204x98 dpi has half the rows it should."""
    finest = max(x_dpi, y_dpi)
    return round(width_px * finest / x_dpi), round(height_px * finest / y_dpi)


def resample(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """Return the image in RGB at this size, in the filter that Qwen's own processor uses.

    Large ones never exist in RGB at full size: a JPEG is decoded at 1/2, 1/4 or 1/8, others are converted and
    averaged band by band.
    """
    width, height = map(float, image.size)
    if image.format == Kind.JPEG and (drafted := image.draft(None, (2 * target[0], 2 * target[1]))):
        *_, width, height = drafted[1]
    block = int(max(1, min(width / target[0], height / target[1]) // REDUCE_ABOVE))
    lightness = levels(image)
    reduced = Image.new("RGB", (math.ceil(image.width / block), math.ceil(image.height / block)))
    for top, band in bands(image, block):
        reduced.paste(to_rgb(band, lightness).reduce(block), (0, top // block))
    return reduced.resize(target, Image.Resampling.BICUBIC, box=(0, 0, width / block, height / block))


def bands(image: Image.Image, block: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """Yield an image in bands of a few million pixels, each with its top row, a multiple of `block`."""
    rows = block * max(1, BAND_PIXELS // (image.width * block))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def to_rgb(band: Image.Image, lightness: tuple[float, float] | None) -> Image.Image:
    """Return a band in RGB: deep greys scaled to 0..255, transparency on white."""
    if lightness is not None:
        black, white = lightness
        values = np.nan_to_num(np.asarray(band, np.float64), nan=white)
        scaled = np.clip((values - black) / (white - black), 0, 1) * 255
        return Image.fromarray(np.round(scaled).astype(np.uint8)).convert("RGB")
    if band.has_transparency_data:
        inked = band.convert("RGBA")
        page = Image.new("RGB", band.size, "white")
        page.paste(inked, mask=inked.getchannel("A"))
        return page
    return band.getchannel("L").convert("RGB") if band.mode == "LAB" else band.convert("RGB")


def levels(image: Image.Image) -> tuple[float, float] | None:
    """Return the values of black and white in an image of more than 8 bits a pixel, None for all others.

    Pillow's own conversion clips at 255, which turns a 16-bit scan pure white. White is the largest value of the
    smallest depth that holds all pixels, because 12-bit scans come in 16-bit files.
    """
    if not image.mode.startswith(("I", "F")):
        return None
    low, high = 0.0, 0.0
    for _, band in bands(image):
        values = np.asarray(band, np.float64)
        low = min(low, np.min(values, where=np.isfinite(values), initial=low))
        high = max(high, np.max(values, where=np.isfinite(values), initial=high))
    white = next((float(largest) for largest in (1, 255, 1023, 4095, 16383, 65535) if high <= largest), high)
    inverted = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0
    return (white, low) if inverted else (low, white)


def on_white(pixels: Pixels, canvas: Size) -> Pixels:
    """Return pixels at the top left of a white canvas, or themselves where they fill it."""
    if pixels.shape[:2] == (canvas.height_px, canvas.width_px):
        return pixels
    page = np.full((canvas.height_px, canvas.width_px, 3), 0xFF, np.uint8)
    page[: pixels.shape[0], : pixels.shape[1]] = pixels
    return page


def png(pixels: Pixels) -> bytes:
    """Return a page image as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
