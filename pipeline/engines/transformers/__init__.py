"""Requests -> answers by a checkpoint in this process. Knows no schema, no page and no Ray.

Requests wait until the engine's own thread takes them into the batch: as many as fit, those nearest in length to the
oldest one, so that little is padded. A row leaves when its answer ends, and its place is filled while the others go on.

    waiting  7 6 5        batch  | 1 |   | 3 | 4 |        2 has ended; 5 takes its place once a quarter is free
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

import torch

from pipeline.engines import checkpoint
from pipeline.engines.completion import build_completion, check_token_length, convert_request_error
from pipeline.engines.encoding import EncodedPrompt
from pipeline.engines.transformers import load
from pipeline.engines.transformers.batch import Batch, BatchRow
from pipeline.engines.transformers.generate import run_step
from pipeline.errors import DocumentError, EngineDead, JobError
from pipeline.records import Completion, FinishReason, Request

GATHER_S = 0.02
"""How long an idle engine lets requests gather after the first: little beside the seconds of a batch."""
MAX_PREFILL_TOKENS = 16_384
"""Most prompt tokens, padding included, that one pass takes in: what attention and vision need beside them grows with it."""


@dataclass(eq=False)
class PendingRequest:
    """A request that waits or is being answered."""

    request: Request
    prompt: EncodedPrompt
    answer: Future[Completion] = field(default_factory=Future)

    def settle(self, outcome: Completion | Exception) -> None:
        """Hand the outcome over, unless whoever asked has gone."""
        with suppress(InvalidStateError):
            if isinstance(outcome, Exception):
                self.answer.set_exception(outcome)
            else:
                self.answer.set_result(outcome)


class TransformersEngine:
    """Qwen2.5-VL or Qwen2-VL by transformers, AWQ or not."""

    name = "transformers"

    def __init__(
        self, model: str, *, revision: str | None = None, dtype: str = "auto", batch_size: int = 8, threads: int | None = None,
        device: str | None = None, max_model_len: int | None = None, max_request_tokens: int | None = None,
        rope_scaling: dict[str, Any] | None = None, lora: str | None = None, keep_int4: bool = False,
    ) -> None:  # fmt: skip
        """Load a checkpoint (hub id or folder) and start the thread that answers.

        `threads` is how many cores this engine owns: more threads than cores make every small operation wait for the scheduler.
        Raises JobError for a checkpoint that cannot be used.
        """
        self.model = model
        self._threads = threads or torch.get_num_threads()
        torch.set_num_threads(self._threads)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = load.load_checkpoint(model, revision, dtype, place, self._threads, rope_scaling, lora, keep_int4)
        self.max_model_len = max_model_len or checkpoint.count_context_tokens(self._model.network.config)
        self.max_request_tokens = max_request_tokens
        self._limit = batch_size
        self._news = Condition()
        self._waiting: list[PendingRequest] = []
        self._asked: dict[BatchRow, PendingRequest] = {}
        self._over: str | None = None
        self._thread = Thread(target=self._serve, name="transformers-engine", daemon=True)
        self._thread.start()

    async def complete(self, request: Request) -> Completion:
        """Return the answer to one request; from any event loop."""
        asked = await asyncio.to_thread(self._prepare, request)
        with self._news:
            self._check()
            self._waiting.append(asked)
            self._news.notify()
        return await asyncio.wrap_future(asked.answer)

    def close(self) -> None:
        """Release the model. Requests still waiting fail with EngineDead."""
        self._end("the engine was closed")
        self._thread.join()
        vars(self).pop("_model", None)

    def _check(self) -> None:
        """Raise EngineDead when no more requests are answered."""
        if self._over is not None:
            raise EngineDead(self._over)

    def _prepare(self, request: Request) -> PendingRequest:
        """Return a request as the model takes it, refusing what cannot be answered."""
        self._check()
        try:
            prompt = self._model.encoder.encode(request.messages)
            check_token_length(len(prompt.ids), request.sampling.max_tokens, self.max_model_len, self.max_request_tokens)
            self._model.vocabulary.start_constraint(request.schema)
        except JobError as error:
            raise DocumentError("schema", str(error)) from None
        except Exception as error:  # any: a template or a tokenizer may stumble over this request's text
            raise convert_request_error(error) from None
        return PendingRequest(request, prompt)

    # What follows runs in the engine's thread.

    def _serve(self) -> None:
        """Answer until closed. Whatever ends this thread is told to everyone who waits."""
        torch.set_num_threads(self._threads)
        batch = Batch([])
        try:
            while self._over is None:
                try:
                    batch = self._turn(batch)
                except torch.OutOfMemoryError:  # beside a pass: while rows joined or left
                    batch = self._again(list(self._asked))
        except BaseException as error:  # nobody else would learn of it
            self._end(f"the engine's thread ended: {type(error).__name__}: {error}")
        for asked in [*self._asked.values(), *self._waiting]:
            asked.settle(EngineDead(str(self._over)))

    def _turn(self, batch: Batch) -> Batch:
        """Let requests in and move every row on by one pass."""
        fresh = self._advance(Batch(self._admit(len(batch))), beside=len(batch))
        batch = join_batches(self._advance(batch, beside=len(fresh)), fresh)
        batch.compact()
        return batch

    def _end(self, reason: str) -> None:
        """Take no more requests."""
        with self._news:
            self._over = self._over or reason
            self._news.notify_all()

    def _admit(self, busy: int) -> list[BatchRow]:
        """Return the rows that join now; waits only while there is nothing else to do."""
        with self._news:
            if not busy:
                self._news.wait_for(lambda: self._waiting or self._over)
                self._news.wait_for(lambda: len(self._waiting) >= self._limit or self._over, timeout=GATHER_S)
            free = self._limit - busy
            if self._over or free < 1 or (busy and free < self._limit // 4):
                return []
            chosen = select_nearest([asked for asked in self._waiting if not asked.answer.cancelled()], free)
            self._waiting = [asked for asked in self._waiting if asked not in chosen and not asked.answer.cancelled()]
        return [row for asked in chosen if (row := self._row(asked))]

    def _row(self, asked: PendingRequest) -> BatchRow | None:
        """Return the row that answers a request; None when it failed at once."""
        sampling = asked.request.sampling
        try:
            constraint = self._model.vocabulary.start_constraint(asked.request.schema)
            row = BatchRow(asked.prompt, sampling, constraint, min(sampling.max_tokens, self.max_model_len - len(asked.prompt.ids)))
        except DocumentError as error:
            asked.settle(error)
            return None
        self._asked[row] = asked
        return row

    def _advance(self, batch: Batch, beside: int) -> Batch:
        """Run one pass over a batch and return the rows that go on. `beside` other rows hold memory as well."""
        if not batch.rows:
            return batch
        try:
            run_step(self._model, batch)
        except Exception as error:  # any: one request's fault must stay its own
            full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # a GPU's word and a CPU's
            return self._shrink(batch, beside, error) if full else self._isolate(batch, beside, error)
        return self._settle(batch)

    def _shrink(self, batch: Batch, beside: int, error: Exception) -> Batch:
        """Ask a batch that found no memory again, half as many at a time; a request that fails alone fails."""
        if len(batch) + beside == 1:
            row = batch.rows[0]
            row.ended = DocumentError("memory", f"no memory on {self._model.device} for {len(row.prompt.ids)} prompt tokens: {error}")
            return self._settle(batch)
        return self._again(batch.rows)

    def _again(self, rows: list[BatchRow]) -> Batch:
        """Put requests back in front of those that wait, to be begun again, and return the empty batch they leave."""
        self._limit = max(1, min(self._limit, len(self._asked) // 2))
        with self._news:
            self._waiting = [self._asked.pop(row) for row in rows] + self._waiting
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return Batch([])

    def _isolate(self, batch: Batch, beside: int, error: Exception) -> Batch:
        """Find the request that a pass failed on by halves, and fail it alone."""
        if isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error):
            raise error
        if len(batch) == 1:
            batch.rows[0].ended = convert_request_error(error)
            return self._settle(batch)
        half = len(batch) // 2
        parts = batch.keep(range(half)), batch.keep(range(half, len(batch)))
        first = self._advance(parts[0], beside + len(parts[1]))
        return join_batches(first, self._advance(parts[1], beside + len(first)))

    def _settle(self, batch: Batch) -> Batch:
        """Answer finished rows and return the others."""
        going = [at for at, row in enumerate(batch.rows) if not row.finished and not self._asked[row].answer.cancelled()]
        for row in batch.rows:
            if row.finished or self._asked[row].answer.cancelled():
                self._asked.pop(row).settle(row.ended if isinstance(row.ended, DocumentError) else self._completion(row))
        if len(going) == len(batch):
            return batch
        return batch.keep(going) if going else Batch([])

    def _completion(self, row: BatchRow) -> Completion:
        """Return a finished row as an answer."""
        reason = row.ended if isinstance(row.ended, FinishReason) else FinishReason.LENGTH
        return build_completion(row.tokens, row.logprobs, reason, len(row.prompt.ids), self._model.vocabulary.decode_token)


def join_batches(one: Batch, other: Batch) -> Batch:
    """Return one batch of both's rows."""
    if not one.rows or not other.rows:
        return one if one.rows else other
    return one.join(other)


def select_nearest(waiting: Sequence[PendingRequest], count: int) -> list[PendingRequest]:
    """Return the oldest request and those nearest to it in length, as many as one pass takes in."""
    if not waiting:
        return []
    length = len(waiting[0].prompt.ids)
    near = sorted(waiting, key=lambda asked: abs(len(asked.prompt.ids) - length))[:count]
    longest = 0
    for at, asked in enumerate(near):
        longest = max(longest, len(asked.prompt.ids))
        if at and longest * (at + 1) > MAX_PREFILL_TOKENS:
            return near[:at]
    return near
