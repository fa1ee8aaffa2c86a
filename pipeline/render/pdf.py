"""PDF renderer on MuPDF: takes the bytes of a PDF and returns its pages, which are drawn one by one.

Only MuPDF's PDF parser is used, not those for its other formats. Scripts, actions, embedded files and references to other
files are not followed: JavaScript is never enabled, and nothing here reads the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import pymupdf
from pymupdf import mupdf

from pipeline.budget import ImageSize, RenderSettings, count_visual_tokens, fit_content, fit_page
from pipeline.errors import DocumentError
from pipeline.records import WORD_MARKS, Page, PageMeasure, Pixels, Word, WordMark
from pipeline.render.errors import ALLOCATION, MAX_WARNINGS, clean_text, convert_library_errors
from pipeline.render.fallback import OpenPages
from pipeline.render.images import pad_with_white
from pipeline.render.visibility import Drawn, collect_styles, mark_words

MAX_WORDS = 20_000
MAX_TEXT_CHARS = 200_000
SCAN_PIXELS = 500_000
"""A page scanned at 72 dpi."""
MAX_IMAGES = 50
STORE_PERCENT = 50
"""Share of MuPDF's cache of fonts and images, up to 256 MiB, that is left for the document's next page: what was used last. Without it the
next page costs 15 % more CPU time."""
INHERITED = ("Resources", "MediaBox", "CropBox", "Rotate")


class WarningCollector:
    """MuPDF's warnings and errors: the first 20 distinct lines, and the first line about a lack of memory, however late it comes."""

    def __init__(self) -> None:
        self.lines: dict[str, None] = {}
        self.memory_line = ""

    def record(self, text: str) -> None:
        try:
            line = clean_text(text)
            if len(self.lines) < MAX_WARNINGS:
                self.lines[line] = None
            if not self.memory_line and ALLOCATION.search(line):
                self.memory_line = line
        except MemoryError:  # MuPDF ignores exceptions of a callback, so the line would be lost
            self.memory_line = "there was no memory left to hear why"

    def install(self) -> None:
        """Receive MuPDF's messages from now on; its callbacks are global to the process."""
        mupdf.fz_set_warning_callback(self.record)
        mupdf.fz_set_error_callback(self.record)

    def take(self) -> tuple[tuple[str, ...], str]:
        """Return and forget the lines so far and the line about memory, "" if there is none."""
        mupdf.fz_flush_warnings()
        taken = tuple(self.lines), self.memory_line
        self.lines, self.memory_line = {}, ""
        return taken


def open_pdf(data: bytes, settings: RenderSettings) -> OpenPages:
    """Return the pages of a PDF. Raises DocumentError and MuPDF's errors."""
    collector = WarningCollector()
    collector.install()
    pdf = parse_pdf(data)
    unlock_pdf(pdf, settings.password)
    page_count, unreadable = count_pages(pdf, settings.max_pages)
    if not page_count:
        raise DocumentError("no_pages", "; ".join(("the PDF opens but has no pages", *collector.take()[0][-2:])))

    layers = LayeredDocument(data, settings) if settings.text_layer and has_layers(pdf) else None

    def draw(page_no: int) -> Page:
        assert data  # MuPDF reads these bytes without a copy: this reference keeps them alive
        try:
            if page_no in unreadable:
                reason = "; ".join(("the page tree has something else in its place", *collector.take()[0][:2]))
                raise DocumentError("broken", f"page {page_no} cannot be found: {reason}")
            return draw_pdf_page(pdf, page_no, settings, collector, layers)
        finally:
            collector.take()
            mupdf.fz_shrink_store(STORE_PERCENT)

    def measure(page_no: int) -> PageMeasure:
        assert data  # as above
        try:
            if page_no in unreadable:
                raise DocumentError("broken", f"page {page_no} cannot be found: the page tree has something else in its place")
            return measure_pdf_page(pdf, page_no, settings)
        finally:
            collector.take()

    return OpenPages(page_count, draw, measure=measure)


def parse_pdf(data: bytes) -> Any:
    """Return MuPDF's document of these bytes, which the caller must keep alive. Raises DocumentError, FzErrorBase."""
    try:
        return mupdf.pdf_open_document_with_stream(mupdf.fz_open_memory(mupdf.python_buffer_data(data), len(data)))
    except mupdf.FzErrorBase as error:
        if "encryption" in str(error):
            raise DocumentError("encrypted", f"the PDF is encrypted in a way that no password opens: {clean_text(str(error))}") from None
        raise


def unlock_pdf(pdf: Any, password: str | None) -> None:
    """Decrypt an encrypted PDF with its password, or with the empty one. Raises DocumentError if that does not open it."""
    if not mupdf.pdf_needs_password(pdf) or mupdf.pdf_authenticate_password(pdf, password or ""):
        return
    hint = "the password from `source.password_env` does not open it"
    if not password:
        hint = "it wants a password: name the environment variable that holds it as `source.password_env`"
    raise DocumentError("encrypted", f"the PDF is encrypted, and {hint}")


# ---- The page tree ------------------------------------------------------------------------------------------------


def count_pages(pdf: Any, most: int) -> tuple[int, set[int]]:
    """Return the number of pages, and the numbers of those whose leaf in the page tree is not a page.

    MuPDF trusts the tree's /Count: if it is wrong, pages are silently missing or the document is refused. So the leaves of
    the tree are counted here, and a tree that MuPDF would read differently is replaced by a flat one.
    """
    leaves = list(islice(walk_page_tree(pdf), most + 1))
    if not leaves or not all(mupdf.pdf_is_dict(page) for page, _ in leaves):
        with suppress(mupdf.FzErrorBase):  # MuPDF searches for lost objects once per document, and has not done so yet
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
    """Yield the leaves of the page tree in order, each with the entries it inherits.

    A branch that occurs again, in a cycle for example, is skipped.
    """
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
            children = map(partial(mupdf.pdf_array_get, kids), range(mupdf.pdf_array_len(kids)))
            trail.append((children, inherited | own))


def flatten_page_tree(pdf: Any, leaves: list[tuple[Any, dict[str, Any]]]) -> None:
    """Replace the document's page tree by one of a single level with these leaves."""
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


def draw_pdf_page(
    pdf: Any, page_no: int, settings: RenderSettings, collector: WarningCollector, layers: LayeredDocument | None = None
) -> Page:
    """Return a page as it would be printed: crop box and rotation applied, annotations and form fields drawn, layers that are off left out.

    Raises DocumentError, also if MuPDF lacked memory for a part of the page.
    """
    page = mupdf.pdf_load_page(pdf, page_no - 1).super()
    box = mupdf.fz_bound_page(page)
    width_pt, height_pt = box.x1 - box.x0, box.y1 - box.y0
    if not (0 < width_pt < math.inf and 0 < height_pt < math.inf):
        raise DocumentError("broken", f"page {page_no} measures {width_pt} x {height_pt} pt")
    canvas = fit_page(width_pt, height_pt, settings.dpi, settings.budget)
    inner = fit_content(width_pt, height_pt, canvas)
    drawing = mupdf.fz_new_display_list_from_page(page)
    pixels = pad_with_white(paint_page(drawing, box, inner), canvas)
    scale = inner.width_px / width_pt, inner.height_px / height_pt
    words, notes = read_text(page, box, pixels, scale) if settings.text_layer else ((), ())
    if layers:
        words += layers.find_hidden_words(page_no, words)
    warnings, memory_line = collector.take()
    if memory_line:
        # MuPDF skips what it has no memory for and goes on: a scanned page would silently be blank.
        raise DocumentError("memory", f"page {page_no} cannot be drawn within `limits.memory_mib`: {memory_line}")
    dpi = 72 * math.sqrt(inner.width_px * inner.height_px / (width_pt * height_pt))
    tokens = count_visual_tokens(canvas, settings.budget.cell_px)
    return Page(page_no, pixels, dpi, width_pt, height_pt, tokens, words, (*notes, *warnings)[:MAX_WARNINGS])


def measure_pdf_page(pdf: Any, page_no: int, settings: RenderSettings) -> PageMeasure:
    """Return a page's measures as `draw_pdf_page` would draw it; its content is not read. Raises DocumentError."""
    box = mupdf.fz_bound_page(mupdf.pdf_load_page(pdf, page_no - 1).super())
    width_pt, height_pt = box.x1 - box.x0, box.y1 - box.y0
    if not (0 < width_pt < math.inf and 0 < height_pt < math.inf):
        raise DocumentError("broken", f"page {page_no} measures {width_pt} x {height_pt} pt")
    canvas = fit_page(width_pt, height_pt, settings.dpi, settings.budget)
    inner = fit_content(width_pt, height_pt, canvas)
    dpi = 72 * math.sqrt(inner.width_px * inner.height_px / (width_pt * height_pt))
    return PageMeasure(width_pt, height_pt, canvas.width_px, canvas.height_px, dpi, count_visual_tokens(canvas))


def paint_page(drawing: Any, box: Any, size: ImageSize) -> Pixels:
    """Return the pixels of a display list inside `box`, at exactly this size.

    `get_pixmap` rounds the scaled box and may return one pixel more; a pixmap that is allocated first cannot.
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
    wrapper = pymupdf.Pixmap("raw", pixmap)
    return np.frombuffer(wrapper.samples_mv, np.uint8).reshape(size.height_px, size.width_px, 3).copy()


def read_text(page: Any, box: Any, pixels: Pixels, scale: tuple[float, float]) -> tuple[tuple[Word, ...], tuple[str, ...]]:
    """Return the words of a page, and notes. An unreadable text layer is a note and no error: the model reads pixels."""
    try:
        with convert_library_errors("the text layer cannot be read"):
            return read_words(page, box, pixels, scale)
    except DocumentError as error:
        return (), (error.message,)


def read_words(page: Any, box: Any, pixels: Pixels, scale: tuple[float, float]) -> tuple[tuple[Word, ...], tuple[str, ...]]:
    """Return the words of the text layer, relative to the page's top left corner, each with its mark, and a note if some are left out.

    `scale` is in pixels per point.
    """
    text_page = pymupdf.TextPage(extract_text(page))
    found: list[Any] = []
    chars = 0
    for word in text_page.extractWORDS():
        if not all(map(math.isfinite, word[:4])):
            continue
        chars += len(word[4])
        if len(found) >= MAX_WORDS or chars > MAX_TEXT_CHARS:
            break
        found.append(word)
    else:
        chars = 0
    styles = collect_styles(found, text_page.extractDICT()["blocks"], mupdf.FZ_STEXT_FILLED | mupdf.FZ_STEXT_STROKED)
    boxes, page_box = np.array([word[:4] for word in found], np.float64).reshape(-1, 4), (box.x0, box.y0, box.x1, box.y1)
    texts = [clean_text(word[4], MAX_TEXT_CHARS) for word in found]
    marks = mark_words(texts, boxes, styles, page_box, pixels, scale, lambda: list_drawn(page), has_large_image(page))
    corners = (boxes - (box.x0, box.y0, box.x0, box.y0)).tolist()
    words = tuple(
        Word(text, x0, y0, x1, y1, WORD_MARKS[mark]) for text, (x0, y0, x1, y1), mark in zip(texts, corners, marks.tolist(), strict=True)
    )
    return words, (f"of the text layer only the first {len(words)} words are kept",) if chars else ()


def has_layers(pdf: Any) -> bool:
    """Say whether a PDF has optional content."""
    return bool(mupdf.pdf_is_dict(mupdf.pdf_dict_gets(mupdf.pdf_dict_gets(mupdf.pdf_trailer(pdf), "Root"), "OCProperties")))


class LayeredDocument:
    """A PDF with optional content, opened a second time with all of its layers on, when the words of a page are first asked for."""

    def __init__(self, data: bytes, settings: RenderSettings) -> None:
        self.data, self.settings = data, settings

    @cached_property
    def pdf(self) -> Any:
        """The document without its list of layers: MuPDF then shows all of them."""
        pdf = parse_pdf(self.data)
        unlock_pdf(pdf, self.settings.password)
        mupdf.pdf_dict_dels(mupdf.pdf_dict_gets(mupdf.pdf_trailer(pdf), "Root"), "OCProperties")
        count_pages(pdf, self.settings.max_pages)
        return pdf

    def find_hidden_words(self, page_no: int, shown: Sequence[Word]) -> tuple[Word, ...]:
        """Return the words of a page that are not among those shown; none where the second opening fails."""
        known = {(word.text, round(word.x0_pt), round(word.y0_pt)) for word in shown}
        try:
            with convert_library_errors("the layers cannot be read"):
                page = mupdf.pdf_load_page(self.pdf, page_no - 1).super()
                box = mupdf.fz_bound_page(page)
                found = pymupdf.TextPage(extract_text(page)).extractWORDS()
        except DocumentError:
            return ()
        words = [
            Word(clean_text(text, MAX_TEXT_CHARS), x0 - box.x0, y0 - box.y0, x1 - box.x0, y1 - box.y0, WordMark.LAYER_OFF)
            for x0, y0, x1, y1, text, *_ in found[: MAX_WORDS - len(shown)]
            if all(map(math.isfinite, (x0, y0, x1, y1)))
        ]
        return tuple(word for word in words if (word.text, round(word.x0_pt), round(word.y0_pt)) not in known)


def extract_text(page: Any) -> Any:
    """Return MuPDF's structured text of a page, also of what is outside of it or clipped away; a display list leaves that out."""
    everywhere = mupdf.FzRect(mupdf.FzRect.Fixed_INFINITE)
    options = mupdf.FzStextOptions()
    options.flags = pymupdf.TEXT_PRESERVE_LIGATURES | pymupdf.TEXT_PRESERVE_WHITESPACE
    text = mupdf.FzStextPage(everywhere)
    device = mupdf.fz_new_stext_device(text, options)
    mupdf.fz_run_page(page, device, mupdf.FzMatrix(), mupdf.FzCookie())
    mupdf.fz_close_device(device)
    return text


def has_large_image(page: Any) -> bool:
    """Say whether a page's resources have an image of at least `SCAN_PIXELS`."""
    leaf = mupdf.pdf_page_from_fz_page(page)
    images = mupdf.pdf_dict_gets(mupdf.pdf_page_resources(leaf), "XObject")
    for at in range(min(mupdf.pdf_dict_len(images), MAX_IMAGES)):
        image = mupdf.pdf_dict_get_val(images, at)
        size = [mupdf.pdf_to_int(mupdf.pdf_dict_gets(image, name)) for name in ("Width", "Height")]
        if size[0] * size[1] >= SCAN_PIXELS:
            return True
    return False


def list_drawn(page: Any) -> list[Drawn]:
    """Return everything that a page draws, in order: the kind, and the box in points."""
    found: list[Drawn] = []
    device = pymupdf.JM_new_bbox_device(found, False)
    mupdf.fz_run_page(page, device, mupdf.FzMatrix(), mupdf.FzCookie())
    mupdf.fz_close_device(device)
    return found
