"""A PDF's bytes -> its pages, by MuPDF. Knows no other format, whatever else MuPDF could open.

Scripts, actions, embedded files and references to other files are neither run nor followed: MuPDF's JavaScript is never
switched on, and nothing here asks for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import pymupdf
from pymupdf import mupdf

from pipeline.budget import ImageSize, RenderSettings, count_visual_tokens, fit_content, fit_page
from pipeline.errors import DocumentError
from pipeline.records import Page, Pixels, Word
from pipeline.render.errors import ALLOCATION, MAX_WARNINGS, clean_text, convert_library_errors
from pipeline.render.images import pad_with_white

MAX_WORDS = 20_000
MAX_TEXT_CHARS = 200_000
INHERITED = ("Resources", "MediaBox", "CropBox", "Rotate")


class WarningCollector:
    """What MuPDF complains of: the first twenty different lines, and the first that speaks of memory, however many there are."""

    def __init__(self) -> None:
        self.lines: dict[str, None] = {}
        self.lacking = ""

    def hear(self, text: str) -> None:
        try:
            line = clean_text(text)
            if len(self.lines) < MAX_WARNINGS:
                self.lines[line] = None
            if not self.lacking and ALLOCATION.search(line):
                self.lacking = line
        except MemoryError:  # MuPDF would swallow it, and the complaint with it
            self.lacking = "there was no memory left to hear why"

    def listen(self) -> None:
        """Take MuPDF's messages, which are one process's, from now on."""
        mupdf.fz_set_warning_callback(self.hear)
        mupdf.fz_set_error_callback(self.hear)

    def take(self) -> tuple[tuple[str, ...], str]:
        """Return the lines and the one that speaks of memory since this was last asked."""
        mupdf.fz_flush_warnings()
        taken = tuple(self.lines), self.lacking
        self.lines, self.lacking = {}, ""
        return taken


def open_pdf(data: bytes, settings: RenderSettings) -> tuple[int, Callable[[int], Page]]:
    """Return a PDF's page count and what draws a page. Only MuPDF's PDF parser is asked, whatever else the bytes look like."""
    complaints = WarningCollector()
    complaints.listen()
    pdf = parse_pdf(data)
    unlock_pdf(pdf, settings.password)
    page_count, unreadable = count_pages(pdf, settings.max_pages)
    if not page_count:
        said = "; ".join(("the PDF opens but has no pages", *complaints.take()[0][-2:]))
        raise DocumentError("no_pages", said)

    def draw(page_no: int) -> Page:
        assert data  # MuPDF reads these very bytes: they live as long as what draws
        try:
            if page_no in unreadable:
                said = "; ".join(("the page tree has something else in its place", *complaints.take()[0][:2]))
                raise DocumentError("broken", f"page {page_no} cannot be found: {said}")
            return draw_pdf_page(pdf, page_no, settings, complaints)
        finally:
            complaints.take()
            mupdf.fz_empty_store()  # fonts and images are kept for the next page otherwise, up to 256 MiB

    return page_count, draw


def parse_pdf(data: bytes) -> Any:
    """Return MuPDF's document of these bytes, which must outlive it."""
    try:
        return mupdf.pdf_open_document_with_stream(mupdf.fz_open_memory(mupdf.python_buffer_data(data), len(data)))
    except mupdf.FzErrorBase as error:
        if "encryption" in str(error):
            raise DocumentError("encrypted", f"the PDF is encrypted in a way that no password opens: {clean_text(str(error))}") from None
        raise


def unlock_pdf(pdf: Any, password: str | None) -> None:
    """Give an encrypted PDF its password; the empty one is tried by itself."""
    if not mupdf.pdf_needs_password(pdf) or mupdf.pdf_authenticate_password(pdf, password or ""):
        return
    hint = "the password from `source.password_env` does not open it"
    if not password:
        hint = "it wants a password: name the environment variable that holds it as `source.password_env`"
    raise DocumentError("encrypted", f"the PDF is encrypted, and {hint}")


# ---- The page tree ------------------------------------------------------------------------------------------------


def count_pages(pdf: Any, most: int) -> tuple[int, set[int]]:
    """Return how many pages there are, and the numbers of those that are none.

    MuPDF believes the tree's /Count: where that lies, pages would be missing without a word, or the document refused.
    What the tree holds is counted here; a tree that MuPDF would read otherwise is replaced by a flat one.
    """
    leaves = list(islice(walk_page_tree(pdf), most + 1))
    if not leaves or not all(mupdf.pdf_is_dict(page) for page, _ in leaves):
        with suppress(mupdf.FzErrorBase):  # MuPDF finds lost objects once per document, and so far had no reason to look
            mupdf.pdf_repair_xref(pdf)
        leaves = list(islice(walk_page_tree(pdf), most + 1))
    try:
        stated = mupdf.pdf_count_pages(pdf)
    except mupdf.FzErrorBase:
        stated = -1
    if len(leaves) > most:
        return max(stated, len(leaves)), set()
    unreadable = {page_no for page_no, (page, _) in enumerate(leaves, 1) if not mupdf.pdf_is_dict(page)}
    if leaves and (stated != len(leaves) or unreadable):
        flatten_page_tree(pdf, leaves)
    return len(leaves), unreadable


def walk_page_tree(pdf: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the page tree's leaves in order, each with what it inherits. A branch that comes again, in a circle too, is left out."""
    root = mupdf.pdf_dict_gets(mupdf.pdf_dict_gets(mupdf.pdf_trailer(pdf), "Root"), "Pages")
    if not mupdf.pdf_is_dict(root):
        return
    trail: list[tuple[Iterator[Any], dict[str, Any]]] = [(iter([root]), {})]
    entered: set[int] = set()
    while trail:
        siblings, inherited = trail[-1]
        node = next(siblings, None)
        if node is None:
            trail.pop()
            continue
        kind, kids = (mupdf.pdf_dict_gets(node, name) for name in ("Type", "Kids"))
        if mupdf.pdf_to_name(kind) == "Page" or not (mupdf.pdf_is_array(kids) or mupdf.pdf_to_name(kind) == "Pages"):
            yield node, inherited
        elif (number := mupdf.pdf_to_num(node)) not in entered:
            entered |= {number} - {0}
            own = {name: value for name in INHERITED if not mupdf.pdf_is_null(value := mupdf.pdf_dict_gets(node, name))}
            trail.append((list_page_children(kids), inherited | own))


def list_page_children(kids: Any) -> Iterator[Any]:
    return (mupdf.pdf_array_get(kids, index) for index in range(mupdf.pdf_array_len(kids)))


def flatten_page_tree(pdf: Any, leaves: list[tuple[Any, dict[str, Any]]]) -> None:
    """Put a tree of one level, made of these leaves, in the place of the document's."""
    tree, kids = mupdf.pdf_add_new_dict(pdf, 3), mupdf.pdf_new_array(pdf, len(leaves))
    for page, inherited in leaves:
        if not mupdf.pdf_is_dict(page):
            page, inherited = mupdf.pdf_new_dict(pdf, 2), {}
        for name, value in inherited.items():
            if mupdf.pdf_is_null(mupdf.pdf_dict_gets(page, name)):
                mupdf.pdf_dict_puts(page, name, value)
        mupdf.pdf_dict_puts(page, "Type", mupdf.pdf_new_name("Page"))
        mupdf.pdf_dict_puts(page, "Parent", tree)
        mupdf.pdf_array_push(kids, page if mupdf.pdf_to_num(page) else mupdf.pdf_add_object(pdf, page))
    for name, value in (("Type", mupdf.pdf_new_name("Pages")), ("Kids", kids), ("Count", mupdf.pdf_new_int(len(leaves)))):
        mupdf.pdf_dict_puts(tree, name, value)
    mupdf.pdf_dict_puts(mupdf.pdf_dict_gets(mupdf.pdf_trailer(pdf), "Root"), "Pages", tree)


# ---- A page -------------------------------------------------------------------------------------------------------


def draw_pdf_page(pdf: Any, page_no: int, settings: RenderSettings, complaints: WarningCollector) -> Page:
    """Return a page as it would be printed: crop box and rotation applied, annotations and form fields drawn."""
    page = mupdf.pdf_load_page(pdf, page_no - 1).super()
    box = mupdf.fz_bound_page(page)
    width_pt, height_pt = box.x1 - box.x0, box.y1 - box.y0
    if not (0 < width_pt < math.inf and 0 < height_pt < math.inf):
        raise DocumentError("broken", f"page {page_no} measures {width_pt} x {height_pt} pt")
    canvas = fit_page(width_pt, height_pt, settings.dpi, settings.budget)
    inner = fit_content(width_pt, height_pt, canvas)
    drawing = mupdf.fz_new_display_list_from_page(page)
    pixels = pad_with_white(paint_page(drawing, box, inner), canvas)
    words, notes = read_text(drawing, box)
    warnings, lacking = complaints.take()
    if lacking:
        # MuPDF leaves out what it has no memory for and goes on: the page would lack its scan without a word.
        raise DocumentError("memory", f"page {page_no} cannot be drawn within `limits.memory_mib`: {lacking}")
    dpi = 72 * math.sqrt(inner.width_px * inner.height_px / (width_pt * height_pt))
    return Page(page_no, pixels, dpi, width_pt, height_pt, count_visual_tokens(canvas), words, (*notes, *warnings)[:MAX_WARNINGS])


def paint_page(drawing: Any, box: Any, size: ImageSize) -> Pixels:
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


def read_text(drawing: Any, box: Any) -> tuple[tuple[Word, ...], tuple[str, ...]]:
    """Return the words of the visible page, and notes. A text layer that cannot be read costs no page: the model sees pixels."""
    try:
        with convert_library_errors("the text layer cannot be read"):
            return read_words(drawing, box)
    except DocumentError as error:
        return (), (error.message,)


def read_words(drawing: Any, box: Any) -> tuple[tuple[Word, ...], tuple[str, ...]]:
    """Return the words of the text layer that stand on the visible page, from its top left corner, and whether some were left out."""
    options = mupdf.FzStextOptions()
    options.flags = pymupdf.TEXT_PRESERVE_LIGATURES | pymupdf.TEXT_PRESERVE_WHITESPACE
    found = pymupdf.TextPage(mupdf.FzStextPage(drawing, options)).extractWORDS()
    words: list[Word] = []
    chars = 0
    for x0, y0, x1, y1, text, *_ in found:
        if not (-math.inf < x0 < box.x1 and box.x0 < x1 < math.inf and -math.inf < y0 < box.y1 and box.y0 < y1 < math.inf):
            continue
        chars += len(text)
        if len(words) >= MAX_WORDS or chars > MAX_TEXT_CHARS:
            return tuple(words), (f"of the text layer only the first {len(words)} words are kept",)
        words.append(Word(clean_text(text, MAX_TEXT_CHARS), x0 - box.x0, y0 - box.y0, x1 - box.x0, y1 - box.y0))
    return tuple(words), ()
