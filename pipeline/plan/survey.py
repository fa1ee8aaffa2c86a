"""Survey of a job's documents: each is read, hashed, opened and measured in a sandbox; a sample is looked at for small print."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from pipeline.budget import PixelBudget, RenderSettings
from pipeline.errors import DocumentError
from pipeline.plan.answers import LineFacts, describe_lines
from pipeline.records import Document, Page, PageMeasure, SourceRow
from pipeline.render.sandbox import Sandbox
from pipeline.sources import read_document
from pipeline.stages.render import RenderPlan

READ_BUDGET = PixelBudget(max_pixels=256 * 784)
"""At which the text layer of a sampled page is read: of its pixels nothing is needed."""
SAMPLED_DOCUMENTS = 200
SAMPLED_PAGES = 4
"""The first pages of a sampled document that are looked at."""
NO_PIXELS = np.zeros((0, 0, 3), np.uint8)
X_HEIGHT = 0.4
"""Height of an x as a share of a word's box, which reaches from ascent to descent: 1.2 of the font's size, an x about half of that."""
MIN_X_HEIGHT_PX = 8.0
"""Below this, print is too small to be read reliably."""


@dataclass(frozen=True)
class MeasuredDocument:
    """A document, opened and not drawn."""

    source: str
    doc_id: str | None
    size_bytes: int
    pages: tuple[PageMeasure | None, ...]
    """None for a page that cannot be measured."""
    failure: str | None = None
    """`stage/kind` of what keeps it from being opened."""
    smallest_px: float | None = None
    """Height of an x in its smallest print, in pixels of the page image; of its first page, if it was sampled and has a text layer."""
    lines: tuple[tuple[LineFacts, ...], ...] = ()
    """Of its first pages, if it was sampled; none of a page without a text layer."""


class DocumentSurvey:
    """Measures documents side by side, one sandboxed renderer for each thread."""

    def __init__(self, plan: RenderPlan, threads: int | None = None) -> None:
        self.plan, self.threads = plan, threads or max(1, len(os.sched_getaffinity(0)))
        self.local, self.sandboxes, self.lock = threading.local(), ExitStack(), threading.Lock()

    def measure_documents(self, documents: list[SourceRow], on_done: Callable[[int], None] = lambda done: None) -> list[MeasuredDocument]:
        """Return the documents measured, in their order. Raises RunError where no renderer starts."""
        every = max(1, len(documents) // SAMPLED_DOCUMENTS)
        with self.sandboxes, ThreadPoolExecutor(self.threads, "survey") as pool:
            tasks = ((document, index % every == 0) for index, document in enumerate(documents))
            return list(count_done(pool.map(lambda task: self.measure_document(*task), tasks), on_done))

    def measure_document(self, document: SourceRow, is_sampled: bool) -> MeasuredDocument:
        """Return one document measured."""
        listed = Document(document["source"], cast(int, document["size_bytes"]), document["version"], document.get("full_url"))
        size_bytes = max(0, document["size_bytes"] or 0)
        try:
            data = read_document(listed, self.plan.root, self.plan.settings.max_file_bytes, self.plan.policy)
        except DocumentError as error:
            return MeasuredDocument(document["source"], None, size_bytes, (), f"source/{error.kind}")
        doc_id, size_bytes, sandbox = hashlib.sha256(data).hexdigest(), len(data), self.get_sandbox("measuring", self.plan.read_settings())
        try:
            page_count = sandbox.open(data)
        except DocumentError as error:
            return MeasuredDocument(document["source"], doc_id, size_bytes, (), f"render/{error.kind}")
        pages = tuple(measure_or_none(sandbox, page_no) for page_no in range(1, page_count + 1))
        read = self.read_first_pages(data) if is_sampled else []
        smallest_px = None
        if read and pages[0] and (height_pt := find_small_height(read[0])) is not None:
            smallest_px = height_pt * pages[0].dpi / 72 * X_HEIGHT
        lines = tuple(describe_lines(page.words) for page in read)
        return MeasuredDocument(document["source"], doc_id, size_bytes, pages, smallest_px=smallest_px, lines=lines)

    def read_first_pages(self, data: bytes) -> list[Page]:
        """Return the first pages of a document with the words of their text layers, up to one that cannot be drawn."""
        sandbox = self.get_sandbox("reading", replace(self.plan.read_settings(), text_layer=True, budget=READ_BUDGET))
        read: list[Page] = []
        with suppress(DocumentError):
            sandbox.open(data)
            for page in sandbox.draw_pages(1, SAMPLED_PAGES):
                read.append(replace(page, pixels=NO_PIXELS))
        return read

    def get_sandbox(self, purpose: str, settings: RenderSettings) -> Sandbox:
        """Return this thread's sandbox for a purpose."""
        found = cast(Sandbox | None, getattr(self.local, purpose, None))
        if found is None:
            found = Sandbox(settings)
            setattr(self.local, purpose, found)
            with self.lock:
                self.sandboxes.callback(found.close)
        return found


def measure_or_none(sandbox: Sandbox, page_no: int) -> PageMeasure | None:
    try:
        return sandbox.measure_page(page_no)
    except DocumentError:
        return None


def find_small_height(page: Page) -> float | None:
    """Return the height in points under which a twentieth of a page's words are; None where it has fewer than 20 words."""
    heights = sorted(word.y1_pt - word.y0_pt for word in page.words if word.y1_pt > word.y0_pt)
    return heights[len(heights) // 20] if len(heights) >= 20 else None


def count_done(found: Iterator[Any], on_done: Callable[[int], None]) -> Iterator[Any]:
    """Yield what is found, and say how many there are so far."""
    for number, one in enumerate(found, 1):
        on_done(number)
        yield one
