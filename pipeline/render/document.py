"""Document renderer: takes the bytes of a PDF or image and render settings, and returns pages at the size that the model reads.

The kind of a document is detected from its content, never from its name. A PDF page is rasterized once, by MuPDF (`pdf.py`), at
its final size; an image is decoded by Pillow (`images.py`) and resampled once. A PDF or TIFF on which these fail is tried by a second
renderer (`fallback.py`, `pdfium.py`, `tiff.py`). What cannot be read is a DocumentError with a stable kind. C libraries parse
untrusted bytes here, so `sandbox.py` runs this code in a child process with limits on time and memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from pipeline.budget import RenderSettings
from pipeline.errors import DocumentError
from pipeline.records import Page, PageMeasure
from pipeline.render.errors import convert_library_errors
from pipeline.render.fallback import OpenDocumentPages, SecondRenderer
from pipeline.render.images import DocumentKind, open_image
from pipeline.render.pdf import open_pdf
from pipeline.render.pdfium import open_pdf_with_pdfium
from pipeline.render.tiff import open_tiff

FILE_SIGNATURES = {
    DocumentKind.PNG: re.compile(rb"\x89PNG\r\n\x1a\n"),
    DocumentKind.JPEG: re.compile(rb"\xff\xd8\xff"),
    DocumentKind.TIFF: re.compile(rb"II[*+]\0|MM\0[*+]"),
    DocumentKind.WEBP: re.compile(rb"RIFF....WEBP", re.DOTALL),
    DocumentKind.GIF: re.compile(rb"GIF8[79]a"),
    DocumentKind.BMP: re.compile(rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL),
    DocumentKind.JPEG2000: re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"),
    DocumentKind.AVIF: re.compile(rb".{4}ftyp(avi[fs]|m[is]f1(.{4}){1,30}?avi[fs])", re.DOTALL),
    DocumentKind.HEIF: re.compile(rb".{4}ftyp(hei[cxms]|hev[cxms]|m[is]f1)", re.DOTALL),
    DocumentKind.PDF: re.compile(rb".{0,8192}?(%PDF-|\b\d+ \d+ obj\b)", re.DOTALL),
}
SECOND_RENDERERS: dict[DocumentKind, OpenDocumentPages] = {DocumentKind.PDF: open_pdf_with_pdfium, DocumentKind.TIFF: open_tiff}
ARCHIVE_SIGNATURES = (b"PK\3\4", b"\x1f\x8b", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
"""Archives and compressed files, DOCX and EPUB among them. They are refused first: an archive may contain an uncompressed PDF."""


@dataclass(frozen=True, eq=False)
class OpenDocument:
    """A document that was opened without an error."""

    kind: DocumentKind
    page_count: int
    draw: Callable[[int], Page]
    """Returns the page with this 1-based number. Raises DocumentError."""
    measure: Callable[[int], PageMeasure]
    """Returns the measures of this page. Raises DocumentError."""


def render_pages(data: bytes, settings: RenderSettings, first_page: int = 1, last_page: int | None = None) -> Iterator[Page]:
    """Yield the pages of a document in this range (1-based, last page included), drawn one by one. Raises DocumentError."""
    opened = open_document(data, settings)
    for page_no in range(first_page, min(last_page or opened.page_count, opened.page_count) + 1):
        yield opened.draw(page_no)


def open_document(data: bytes, settings: RenderSettings) -> OpenDocument:
    """Return the opened document. Raises DocumentError if it cannot be opened or exceeds a limit of the settings."""
    if not data:
        raise DocumentError("empty", "the file is empty (0 bytes)")
    if len(data) > settings.max_file_bytes:
        allowed = f"`limits.max_file_mib` allows {settings.max_file_bytes / 2**20:g} MiB"
        raise DocumentError("too_large", f"the file has {len(data)} bytes; {allowed}")
    kind = detect_kind(data)
    second = SecondRenderer(SECOND_RENDERERS[kind], data, settings) if kind in SECOND_RENDERERS else None
    try:
        with convert_library_errors(f"the {kind} file cannot be opened"):
            first = open_pdf(data, settings) if kind is DocumentKind.PDF else open_image(data, settings, kind)
    except DocumentError as error:
        if second is None:
            raise
        first, second = second.open_after(error), None
    page_count = first.page_count
    if second and not first.is_complete:
        with suppress(DocumentError):
            page_count = max(page_count, second.open().page_count)
    if page_count > settings.max_pages:
        raise DocumentError("too_many_pages", f"the document has {page_count} pages or more; `limits.max_pages` is {settings.max_pages}")

    def draw_page(page_no: int) -> Page:
        try:
            with convert_library_errors(f"page {page_no} of the {kind} file cannot be drawn"):
                return first.draw(page_no)
        except DocumentError as error:
            if second is None:
                raise
            return second.draw_after(error, page_no, page_count)

    def measure_page(page_no: int) -> PageMeasure:
        if first.measure is None:
            return measure_drawn_page(draw_page(page_no))
        with convert_library_errors(f"page {page_no} of the {kind} file cannot be measured"):
            return first.measure(page_no)

    return OpenDocument(kind, page_count, draw_page, measure_page)


def measure_drawn_page(page: Page) -> PageMeasure:
    height_px, width_px, _ = page.pixels.shape
    return PageMeasure(page.width_pt, page.height_pt, width_px, height_px, page.dpi, page.visual_tokens)


def detect_kind(data: bytes) -> DocumentKind:
    """Return the kind of a document by its first bytes; a PDF may have its header, or its first object, up to 8 kB later.

    Raises DocumentError if the kind is not supported.
    """
    if data.startswith(ARCHIVE_SIGNATURES):
        raise DocumentError("unrecognised", f"the file is an archive or compressed: unpack it; it begins with {data[:16]!r}")
    for kind, signature in FILE_SIGNATURES.items():
        if signature.match(data):
            return kind
    raise DocumentError("unrecognised", f"the content is none of {', '.join(DocumentKind)}: it begins with {data[:16]!r}")
