"""Render stage: documents -> requests with their page images."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, cast

from pipeline.budget import RenderSettings
from pipeline.errors import DocumentError, JobError, RunError
from pipeline.evidence.text_layer import pack_words
from pipeline.job import DEMO_MARK, Job
from pipeline.records import Document, FailureRow, LedgerRow, Page, PageFacts, PageFailureRow, RequestRow, SourceRow, Stage
from pipeline.render.quality import measure_quality
from pipeline.render.sandbox import Sandbox
from pipeline.sources import read_document
from pipeline.sources.http import DownloadPolicy
from pipeline.stages.requests import compute_document_keys, make_failed_row

DEMO_REFUSAL = "the demonstration model reads only its own samples; a GPU, model.engine: openai or model.without_gpu: cpu reads this"
READ_AHEAD = 2
"""Documents that are read while another is drawn: a download takes as long as drawing a few pages."""
DRAWN_UNCLAIMED = 4
"""Requests of a document that are drawn, at most, while it is not known yet whether they are wanted: so the claims of many documents go
together, and the rare document that is not wanted costs some pages."""
ClaimRequests = Callable[[SourceRow, list[str]], "Future[dict[str, int]]"]
"""(document, keys) -> the keys that this document shall ask, each with the number of its attempt, from 1: not those that are done, nor
those that another file with the same bytes has claimed."""


class DrawnRequest(NamedTuple):
    """A request with its page images. It is asked if the claim of its document has its key."""

    row: RequestRow
    """Without its attempt."""
    claimed: Future[dict[str, int]]


@dataclass(frozen=True)
class RenderPlan:
    """What a render task needs to know of a job. Tasks with equal plans share a renderer within a worker process."""

    settings: RenderSettings
    policy: DownloadPolicy
    root: Path
    """Folder to which relative sources belong."""
    per_request: int
    fingerprint: str
    job: str
    """The job's name."""
    only_samples: bool = False
    """Whether the demonstration model answers in place of the job's own: it is asked about its samples alone."""
    password_env: str | None = None
    """Name of the environment variable that holds the password of encrypted PDFs. The password itself is in no plan."""

    @classmethod
    def of_job(cls, job: Job) -> RenderPlan:
        """Return a job's plan. Raises JobError where this machine's environment lacks the password that the job names."""
        password = job.sections.source.password_env
        if password and password not in os.environ:
            raise JobError(
                f"{job.file}: source.password_env names the environment variable {password}, which is not set",
                job.file,
                "source.password_env",
            )
        policy = DownloadPolicy(job.sections.source.allow_private, job.sections.limits.download_s)
        folder, name = job.file.parent, job.sections.name
        return cls(make_render_settings(job), policy, folder, job.pages_per_request, job.fingerprint, name, password_env=password)

    def read_settings(self) -> RenderSettings:
        """Return the settings with the password, which is read from this machine's environment. Raises RunError where it is not set."""
        if not self.password_env:
            return self.settings
        if self.password_env not in os.environ:
            raise RunError(
                f"source.password_env names the environment variable {self.password_env}, which is not set on {socket.gethostname()}: "
                "set it on every machine before Ray starts there, and run the same command again"
            )
        return replace(self.settings, password=os.environ[self.password_env])


def make_render_settings(job: Job) -> RenderSettings:
    """Return how documents are rendered, without the password."""
    limits = job.sections.limits
    return RenderSettings(
        budget=job.budget,
        dpi=job.sections.pages.dpi,
        max_pages=limits.max_pages,
        max_file_bytes=limits.max_file_mib * 2**20,
        max_image_pixels=limits.max_image_megapixels * 10**6,
        timeout_s=limits.timeout_s,
        memory_bytes=limits.memory_mib * 2**20,
        text_layer=job.sections.evidence.text == "on",
    )


class RenderStage:
    """Documents -> requests. Owns one sandboxed renderer, started at the first document, that several threads use in turns."""

    def __init__(self, plan: RenderPlan, claim: ClaimRequests) -> None:
        self.plan, self.claim, self.turn = plan, claim, threading.Lock()

    @cached_property
    def sandbox(self) -> Sandbox:
        return Sandbox(self.plan.read_settings())

    def render_documents(self, documents: Iterable[SourceRow]) -> Iterator[DrawnRequest]:
        """Yield the requests of documents, in their order; the next documents are read while one is drawn.

        At most `READ_AHEAD` documents of `limits.max_file_mib` are held in memory beside the one that is drawn. While one is awaited,
        documents of another thread are drawn.
        """
        reading: deque[tuple[SourceRow, Future[bytes]]] = deque()
        pool = ThreadPoolExecutor(READ_AHEAD, "read-ahead")
        try:
            for document in documents:
                reading.append((document, pool.submit(self.read_bytes, document)))
                if len(reading) > READ_AHEAD:
                    yield from self.render_document(*reading.popleft())
            while reading:
                yield from self.render_document(*reading.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def read_bytes(self, document: SourceRow) -> bytes:
        """Return the bytes of a document. Raises DocumentError."""
        listed = Document(document["source"], document["size_bytes"], document["version"], document.get("full_url"))
        return read_document(listed, self.plan.root, self.plan.settings.max_file_bytes, self.plan.policy)

    def render_document(self, document: SourceRow, reading: Future[bytes]) -> Iterator[DrawnRequest]:
        """Yield the requests of a document, with their page images, one at a time: those that it shall ask as far as that is known."""
        wait([reading])
        with self.turn:
            yield from self.draw_document(document, reading)

    def draw_document(self, document: SourceRow, reading: Future[bytes]) -> Iterator[DrawnRequest]:
        """Yield the requests of a document that is read, or could not be."""
        row: SourceRow = {**document, "doc_id": None, "page_count": 0}
        failure: LedgerRow | None = None
        try:
            data = reading.result()
            row["doc_id"] = hashlib.sha256(data).hexdigest()
            row["page_count"] = self.sandbox.open(data)
            if self.plan.only_samples and DEMO_MARK not in data:
                failure = make_failed_row(Stage.GENERATE, DocumentError("demo", DEMO_REFUSAL))
        except Exception as error:  # any: what a document's bytes make a library raise has no common class
            failure = make_failed_row(Stage.RENDER if row["doc_id"] else Stage.SOURCE, error)
        keys = compute_document_keys(row, self.plan.per_request, self.plan.fingerprint)
        claimed = self.claim(row, list(keys))
        if len(keys) > DRAWN_UNCLAIMED:
            claimed.result()
        for key, (first_page, last_page) in keys.items():
            if claimed.done() and key not in claimed.result():
                continue
            request: RequestRow = {"key": key, "first_page": first_page, "last_page": last_page}
            drawn = failure or self.draw_request(first_page, last_page)
            columns: dict[str, object] = {**row, **request, **drawn}
            yield DrawnRequest(cast(RequestRow, columns), claimed)

    def draw_request(self, first_page: int, last_page: int) -> RequestRow:
        """Return the page images of one request; it fails if no page can be drawn, and else goes on without those that cannot."""
        pages: list[Page] = []
        failed: LedgerRow = {}
        failures: list[PageFailureRow] = []
        for page_no in range(first_page, last_page + 1):
            try:
                pages += self.sandbox.draw_pages(page_no, page_no)
            except Exception as error:  # any, as above
                row = make_failed_row(Stage.RENDER, error)
                failed, failure = failed or row, cast(FailureRow, row["failure"])
                failures.append({"page": page_no, "kind": failure["kind"], "message": failure["message"]})
        if not pages:
            return cast(RequestRow, {**failed, "page_failures": failures})
        return {
            "pages": [{**describe_page(page), "text_layer": pack_words(page)} for page in pages],
            "pixels": [page.pixels for page in pages],
            "page_failures": failures,
        }

    def close(self) -> None:
        """End the renderer."""
        if "sandbox" in vars(self):
            self.sandbox.close()


def describe_page(page: Page) -> PageFacts:
    """Return what the ledger keeps of a page beside its words."""
    height_px, width_px, _ = page.pixels.shape
    return {
        "page_no": page.page_no,
        "width_px": width_px,
        "height_px": height_px,
        "dpi": page.dpi,
        "visual_tokens": page.visual_tokens,
        "warnings": list(page.warnings),
        "renderer": page.renderer or None,
        "quality": measure_quality(page.pixels),
    }
