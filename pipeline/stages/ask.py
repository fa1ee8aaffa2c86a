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
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import UTC, datetime

import numpy as np

from pipeline import schema
from pipeline.engines import Engine
from pipeline.errors import DocumentError
from pipeline.job import Job
from pipeline.records import Completion, Failure, FinishReason, Pixels, Request, Stage, Status
from pipeline.schema import prompt
from pipeline.schema.validate import Validator
from pipeline.stages.requests import Row, make_failed_row


def decode_images(row: Row) -> list[Pixels]:
    """Return a request's page images from their bytes; copies, because torch warns of arrays that it cannot write to."""
    shapes = [(page["height_px"], page["width_px"], 3) for page in row["pages"]]
    return [np.frombuffer(data, np.uint8).reshape(shape).copy() for data, shape in zip(row["pixels"], shapes, strict=True)]


class AskStage:
    """Requests -> answers. Owns one engine; hundreds of requests are under way at once, batching is the engine's business."""

    def __init__(self, job: Job, engine: Engine) -> None:
        self.job, self.engine = job, engine
        self.schema_text = schema.dump_compact_schema(job.schema)
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
        messages = prompt.build_messages(
            self.job.system_message, decode_images(row), row["first_page"], None if whole else row["page_count"]
        )
        spent: Row = {"asks": 0, "prompt_tokens": 0, "completion_tokens": 0}
        before: Row = {}
        while True:
            try:
                completion = await self.engine.complete(Request(row["key"], messages, self.schema_text, self.job.sampling))
            except DocumentError as error:
                too_long = error.kind == "too_long"  # with the errors in it: the answer stays as it was
                return spent | (before if before and too_long else make_failed_row(Stage.GENERATE, error))
            spent["asks"] += 1
            spent["prompt_tokens"] += completion.usage.prompt_tokens
            spent["completion_tokens"] += completion.usage.completion_tokens
            errors = self.errors(completion, whole)
            if not errors or completion.finish_reason is FinishReason.LENGTH or spent["asks"] > self.job.sections.extract.re_asks:
                return spent | make_outcome_row(completion, errors)
            before = make_outcome_row(completion, errors)
            messages = prompt.build_correction(messages, completion.text, errors)

    def errors(self, completion: Completion, whole: bool) -> list[str]:
        """Return why an answer is not a valid record; nothing if it is."""
        try:
            value = schema.parse_json(completion.text)
        except ValueError as error:
            return [str(error)]
        return [str(violation) for violation in self.validator.find_violations(value)] if whole else []


def make_outcome_row(completion: Completion, errors: list[str]) -> Row:
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
