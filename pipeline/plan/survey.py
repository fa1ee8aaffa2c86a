"""Survey of a job's documents: each is read, hashed, opened and measured in a sandbox; a sample is looked at for small print."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

from pipeline.budget import PixelBudget, RenderSettings
from pipeline.errors import DocumentError
from pipeline.records import Document, Page, PageMeasure, SourceRow
from pipeline.render.sandbox import Sandbox
from pipeline.sources import read_document
from pipeline.stages.render import RenderPlan

READ_BUDGET = PixelBudget(max_pixels=256 * 784)
"""At which the text layer of a sampled page is read: of its pixels nothing is needed."""
SAMPLED_PAGES = 200
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
    """Height of an x in its smallest print, in pixels of the page image; of its first page with a text layer, if it was sampled."""


class DocumentSurvey:
    """Measures documents side by side, one sandboxed renderer for each thread."""

    def __init__(self, plan: RenderPlan, threads: int | None = None) -> None:
        self.plan, self.threads = plan, threads or max(1, len(os.sched_getaffinity(0)))
        self.local, self.sandboxes, self.lock = threading.local(), ExitStack(), threading.Lock()

    def measure_documents(self, documents: list[SourceRow], on_done: Callable[[int], None] = lambda done: None) -> list[MeasuredDocument]:
        """Return the documents measured, in their order. Raises RunError where no renderer starts."""
        every = max(1, len(documents) // SAMPLED_PAGES)
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
        smallest_px = self.find_smallest_print(data, pages[0]) if is_sampled and pages[0] else None
        return MeasuredDocument(document["source"], doc_id, size_bytes, pages, smallest_px=smallest_px)

    def find_smallest_print(self, data: bytes, measure: PageMeasure) -> float | None:
        """Return the height of an x in the smallest print of a document's first page at the job's budget; None without a text layer."""
        settings = replace(self.plan.read_settings(), text_layer=True, budget=READ_BUDGET)
        sandbox = self.get_sandbox("reading", settings)
        try:
            sandbox.open(data)
            (page,) = sandbox.draw_pages(1, 1)
        except DocumentError:
            return None
        height_pt = find_small_height(page)
        return None if height_pt is None else height_pt * measure.dpi / 72 * X_HEIGHT

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
