"""Batch-shaped steps of the ask pass: documents -> requests with their pages, requests -> answers.

The only place where an exception becomes a `Failure` in a row: one document that cannot be read, one page that cannot be
drawn, one request that cannot be answered costs itself and nothing else. Knows neither Ray nor Parquet.

A row's journey, for a document of 5 pages and requests of up to 4:

    {source: "a.pdf", size_bytes: …, version: …}
      -> {…, doc_id: "9f…", page_count: 5, key: "c1…", first_page: 1, last_page: 4, pages: [4 sizes], pixels: [4 × bytes]}
         {…, doc_id: "9f…", page_count: 5, key: "07…", first_page: 5, last_page: 5, pages: [1 size], pixels: [bytes]}
      -> {…, key: "c1…", status: "extracted", answer: '{"total":…', tokens: […], …}
         {…, key: "07…", status: "failed", failure: {stage: "generate", kind: "length", …}, …}
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from pipeline.budget import RenderSettings
from pipeline.errors import DocumentError, JobError
from pipeline.job import Job
from pipeline.records import Document, Page, Stage
from pipeline.render.sandbox import Sandbox
from pipeline.sources import read_document
from pipeline.sources.http import PUBLIC_ONLY, DownloadPolicy
from pipeline.stages.requests import Row, compute_document_keys, make_failed_row

ClaimRequests = Callable[[str, str, list[str]], dict[str, int]]
"""(doc_id, source, keys) -> the keys this source shall ask, not those done nor those of a twin file claimed before, each with the
number of its attempt, from 1."""


class RenderStage:
    """Documents -> requests. Owns one sandboxed renderer, started at the first document."""

    def __init__(
        self,
        settings: RenderSettings,
        root: Path,
        per_request: int,
        fingerprint: str,
        claim: ClaimRequests,
        access: DownloadPolicy = PUBLIC_ONLY,
    ) -> None:
        self.settings, self.root, self.per_request = settings, root, per_request
        self.fingerprint, self.claim, self.access = fingerprint, claim, access

    @cached_property
    def sandbox(self) -> Sandbox:
        return Sandbox(self.settings)

    def __call__(self, document: Row) -> Iterator[Row]:
        """Yield a document's requests, page images and all, one at a time.

        A document whose requests are all done or claimed by a twin of the same bytes yields one row without a key, which
        says what it is and asks nothing.
        """
        row: Row = {**document, "doc_id": None, "page_count": 0}
        failure: Row = {}
        try:
            listed = Document(document["source"], document["size_bytes"], document["version"])
            data = read_document(listed, self.root, self.settings.max_file_bytes, self.access)
            row["doc_id"] = hashlib.sha256(data).hexdigest()
            row["page_count"] = self.sandbox.open(data)
        except DocumentError as error:
            stage = Stage.RENDER if row["doc_id"] else Stage.SOURCE
            failure = make_failed_row(stage, error)
        keys = compute_document_keys(row, self.per_request, self.fingerprint)
        wanted = self.claim(row["doc_id"] or f"unread {row['source']}", row["source"], list(keys))
        if not wanted:
            yield {**row, "key": None}
        for key, attempt in wanted.items():
            first_page, last_page = keys[key]
            request = {**row, "key": key, "attempt": attempt, "first_page": first_page, "last_page": last_page}
            yield {**request, **(failure or self.draw(first_page, last_page))}

    def draw(self, first_page: int, last_page: int) -> Row:
        """Return the page images of one request, or why there are none."""
        try:
            pages = list(self.sandbox.draw_pages(first_page, last_page))
        except DocumentError as error:
            return make_failed_row(Stage.RENDER, error)
        return {"pages": [describe_page(page) for page in pages], "pixels": [page.pixels.tobytes() for page in pages]}

    def close(self) -> None:
        if "sandbox" in vars(self):
            self.sandbox.close()


def make_download_policy(job: Job) -> DownloadPolicy:
    """Return how far URLs may lead."""
    return DownloadPolicy(job.sections.source.allow_private, job.sections.limits.download_s)


def make_render_settings(job: Job) -> RenderSettings:
    """Return how documents are rendered; the password comes from the environment variable that the job names."""
    limits, name = job.sections.limits, job.sections.source.password_env
    if name and name not in os.environ:
        raise JobError(f"{job.file}: source.password_env names the environment variable {name}, which is not set")
    return RenderSettings(
        budget=job.sections.pages.budget,
        dpi=job.sections.pages.dpi,
        password=os.environ[name] if name else None,
        max_pages=limits.max_pages,
        max_file_bytes=limits.max_file_mib * 2**20,
        max_image_pixels=limits.max_image_megapixels * 10**6,
        timeout_s=limits.timeout_s,
        memory_bytes=limits.memory_mib * 2**20,
    )


def describe_page(page: Page) -> Row:
    """Return what the ledger keeps of a page."""
    height_px, width_px, _ = page.pixels.shape
    return {
        "page_no": page.page_no,
        "width_px": width_px,
        "height_px": height_px,
        "dpi": page.dpi,
        "visual_tokens": page.visual_tokens,
        "warnings": list(page.warnings),
    }
