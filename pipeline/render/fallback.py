"""Second renderers: what a first renderer has opened, and the one that is tried for a document or a page on which the first fails.

MuPDF is followed by PDFium, and for TIFFs Pillow by tifffile. A second renderer is loaded and opened at the first failure, once
per document. It draws no page that the first can draw, and it numbers pages as the first does or is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.budget import RenderSettings
from pipeline.errors import DocumentError
from pipeline.records import Page, PageMeasure
from pipeline.render.errors import convert_library_errors

WHITE = 0xFF
UNREADABLE = ("broken", "no_pages", "encrypted")
"""Kinds of failures at which another renderer may read the document. The others are limits of the job."""


@dataclass(frozen=True, eq=False)
class OpenPages:
    """The pages of a document, as one renderer has opened it."""

    page_count: int
    draw: Callable[[int], Page]
    """Returns the page with this 1-based number. Raises DocumentError and the library's errors."""
    is_complete: bool = True
    """False if the last page that was counted could not be read, so that more may follow it."""
    measure: Callable[[int], PageMeasure] | None = None
    """Returns the measures of a page, which is not drawn for that. None where only drawing tells."""


OpenDocumentPages = Callable[[bytes, RenderSettings], OpenPages]


class SecondRenderer:
    """The second renderer of one document."""

    def __init__(self, open_pages: OpenDocumentPages, data: bytes, settings: RenderSettings) -> None:
        self.open_pages, self.data, self.settings = open_pages, data, settings
        self.outcome: OpenPages | DocumentError | None = None

    def open(self) -> OpenPages:
        """Return the opened document. Raises DocumentError, each time the same."""
        if self.outcome is None:
            try:
                with convert_library_errors("another renderer cannot open it either"):
                    self.outcome = self.open_pages(self.data, self.settings)
            except DocumentError as error:
                self.outcome = error
        if isinstance(self.outcome, DocumentError):
            raise self.outcome
        return self.outcome

    def open_after(self, failure: DocumentError) -> OpenPages:
        """Return the document that the first renderer could not open. Raises DocumentError."""
        if failure.kind not in UNREADABLE:
            raise failure
        try:
            return self.open()
        except DocumentError as error:
            raise choose_failure(failure, error) from None

    def draw_after(self, failure: DocumentError, page_no: int, page_count: int) -> Page:
        """Return a page that the first renderer could not draw, if both count `page_count` pages. Raises DocumentError.

        A white page is none: a renderer that skips what it cannot read would hide the failure.
        """
        opened = self.open_after(failure)
        if opened.page_count != page_count:
            raise failure
        try:
            with convert_library_errors("another renderer cannot draw it either"):
                page = opened.draw(page_no)
        except DocumentError as error:
            raise choose_failure(failure, error) from None
        if page.pixels.min() == WHITE:
            raise failure
        return page


def choose_failure(first: DocumentError, second: DocumentError) -> DocumentError:
    """Return which of two renderers' failures to report: the first's, unless the second's is a limit or a missing package."""
    if second.kind in UNREADABLE:
        return first
    return DocumentError(second.kind, f"{first.message}; {second.message}")
