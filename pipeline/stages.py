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

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import prompt, schema
from pipeline.budget import RenderSettings
from pipeline.engines import Engine
from pipeline.errors import DocumentError, JobError
from pipeline.job import Job
from pipeline.records import Completion, Document, Failure, FinishReason, Page, Pixels, Request, Stage, Status
from pipeline.sandbox import Sandbox
from pipeline.source import read
from pipeline.validate import Validator
from pipeline.web import PUBLIC_ONLY, Access

Row = dict[str, Any]
Claim = Callable[[str, str, list[str]], dict[str, int]]
"""(doc_id, source, keys) -> the keys this source shall ask, not those done nor those of a twin file claimed before, each with the
number of its attempt, from 1."""


def request_key(identity: str, first_page: int, last_page: int, fingerprint: str) -> str:
    """Return a request's name: 32 hex digits of its document, pages and job."""
    return hashlib.sha256(f"{identity}\n{first_page}-{last_page}\n{fingerprint}".encode()).hexdigest()[:32]


def page_ranges(page_count: int, per_request: int) -> list[tuple[int, int]]:
    """Return the first and last page of each of a document's requests: (1, 4), (5, 8), (9, 9)."""
    return [(first, min(first + per_request - 1, page_count)) for first in range(1, page_count + 1, per_request)]


def document_keys(row: Row, per_request: int, fingerprint: str) -> dict[str, tuple[int, int]]:
    """Return the requests of a document of known page count: key -> pages.

    A document that could not be opened is one request for the pages 0 to 0, named from its bytes, or from its place and
    version where not even these could be read.
    """
    if not row["page_count"]:
        identity = row["doc_id"] or f"{row['source']}\n{row['size_bytes']}\n{row['version']}"
        return {request_key(identity, 0, 0, fingerprint): (0, 0)}
    return {request_key(row["doc_id"], *pages, fingerprint): pages for pages in page_ranges(row["page_count"], per_request)}


def failed(stage: Stage, error: DocumentError) -> Row:
    return {"status": str(Status.FAILED), "failure": asdict(Failure(stage, error.kind, error.message))}


class RenderStage:
    """Documents -> requests. Owns one sandboxed renderer, started at the first document."""

    def __init__(
        self, settings: RenderSettings, root: Path, per_request: int, fingerprint: str, claim: Claim, access: Access = PUBLIC_ONLY
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
            data = read(listed, self.root, self.settings.max_file_bytes, self.access)
            row["doc_id"] = hashlib.sha256(data).hexdigest()
            row["page_count"] = self.sandbox.open(data)
        except DocumentError as error:
            stage = Stage.RENDER if row["doc_id"] else Stage.SOURCE
            failure = failed(stage, error)
        keys = document_keys(row, self.per_request, self.fingerprint)
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
            pages = list(self.sandbox.pages(first_page, last_page))
        except DocumentError as error:
            return failed(Stage.RENDER, error)
        return {"pages": [described(page) for page in pages], "pixels": [page.pixels.tobytes() for page in pages]}

    def close(self) -> None:
        if "sandbox" in vars(self):
            self.sandbox.close()


def access(job: Job) -> Access:
    """Return how far URLs may lead."""
    return Access(job.sections.source.allow_private, job.sections.limits.download_s)


def render_settings(job: Job) -> RenderSettings:
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


def described(page: Page) -> Row:
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


def images(row: Row) -> list[Pixels]:
    """Return a request's page images from their bytes; copies, because torch warns of arrays that it cannot write to."""
    shapes = [(page["height_px"], page["width_px"], 3) for page in row["pages"]]
    return [np.frombuffer(data, np.uint8).reshape(shape).copy() for data, shape in zip(row["pixels"], shapes, strict=True)]


class AskStage:
    """Requests -> answers. Owns one engine; hundreds of requests are under way at once, batching is the engine's business."""

    def __init__(self, job: Job, engine: Engine) -> None:
        self.job, self.engine = job, engine
        self.schema_text = schema.compact(job.schema)
        self.validator = Validator(job.schema)

    async def __call__(self, rows: list[Row]) -> AsyncIterator[Row]:
        """Yield each row answered, in the order of the rows; those that ask nothing pass through."""
        asking = [asyncio.ensure_future(self.answer(row)) for row in rows]
        for answered in asking:
            yield await answered

    async def answer(self, row: Row) -> Row:
        """Return a row with its answer and without its pixels."""
        kept = {name: value for name, value in row.items() if name != "pixels"}
        if row["key"] is None:
            return kept
        kept |= {"model": self.engine.model, "engine": self.engine.name, "fingerprint": self.job.fingerprint}
        if row.get("failure"):
            return kept
        started, clock = datetime.now(UTC), time.monotonic()
        kept |= await self.ask(row)
        return kept | {"started_at": started, "elapsed_s": time.monotonic() - clock}

    async def ask(self, row: Row) -> Row:
        """Ask, check, and ask again with the errors, as often as the job allows.

        Pages of a split document are not checked against the whole schema here: what one part lacks another may have.
        """
        whole = row["last_page"] - row["first_page"] + 1 == row["page_count"] or self.job.sections.extract.per == "page"
        messages = prompt.build(self.job.system, images(row), row["first_page"], None if whole else row["page_count"])
        spent: Row = {"asks": 0, "prompt_tokens": 0, "completion_tokens": 0}
        before: Row = {}
        while True:
            try:
                completion = await self.engine.complete(Request(row["key"], messages, self.schema_text, self.job.sampling))
            except DocumentError as error:
                too_long = error.kind == "too_long"  # with the errors in it: the answer stays as it was
                return spent | (before if before and too_long else failed(Stage.GENERATE, error))
            spent["asks"] += 1
            spent["prompt_tokens"] += completion.usage.prompt_tokens
            spent["completion_tokens"] += completion.usage.completion_tokens
            errors = self.errors(completion, whole)
            if not errors or completion.finish_reason is FinishReason.LENGTH or spent["asks"] > self.job.sections.extract.re_asks:
                return spent | outcome(completion, errors)
            before = outcome(completion, errors)
            messages = prompt.correct(messages, completion.text, errors)

    def errors(self, completion: Completion, whole: bool) -> list[str]:
        """Return why an answer is not a valid record; nothing if it is."""
        try:
            value = schema.parse(completion.text)
        except ValueError as error:
            return [str(error)]
        return [str(violation) for violation in self.validator.errors(value)] if whole else []


def outcome(completion: Completion, errors: list[str]) -> Row:
    """Return the ledger's columns for the last answer."""
    row: Row = {
        "answer": completion.text,
        "finish_reason": str(completion.finish_reason),
        "errors": errors,
        "tokens": [asdict(token) for token in completion.tokens],
        "status": str(Status.INVALID if errors else Status.EXTRACTED),
        "failure": asdict(Failure(Stage.VALIDATE, "invalid", errors[0])) if errors else None,
    }
    if completion.finish_reason is FinishReason.LENGTH:
        limit = (
            f"the answer was cut after {completion.usage.completion_tokens} tokens; raise sampling.max_tokens or lower pages.per_request"
        )
        row |= {"status": str(Status.FAILED), "failure": asdict(Failure(Stage.GENERATE, "length", limit))}
    return row
