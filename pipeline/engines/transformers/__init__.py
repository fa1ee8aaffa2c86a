"""Engine `transformers`: requests with page images come in, completions with a log-probability for each token go out.
A checkpoint in this process answers them in one continuous batch; a request that cannot be answered raises DocumentError.

The engine's thread takes waiting requests into the batch: the oldest and those nearest to it in length, so that little is padded. A
row leaves the batch when its answer ends, and is replaced while the others go on:

    waiting  7 6 5        batch  | 1 |   | 3 | 4 |        2 has ended; 5 replaces it once a quarter of the batch is free
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
from pipeline.engines.completion import TokenClock, build_completion, check_token_length, convert_request_error
from pipeline.engines.encoding import EncodedPrompt
from pipeline.engines.transformers import load
from pipeline.engines.transformers.batch import Batch, BatchRow
from pipeline.engines.transformers.generate import run_step
from pipeline.errors import DocumentError, EngineDead, JobError
from pipeline.records import Completion, FinishReason, Request

GATHER_S = 0.02
"""How long an idle engine waits after the first request for others to join its batch, which then takes seconds."""
MAX_PREFILL_TOKENS = 16_384
"""Most prompt tokens, padding included, in one forward pass: the memory of attention and vision tower grows with them."""


@dataclass(eq=False)
class PendingRequest:
    """A request that waits or is in the batch."""

    request: Request
    prompt: EncodedPrompt
    future: Future[Completion] = field(default_factory=Future)

    def set_outcome(self, outcome: Completion | Exception) -> None:
        """Set the future's result or exception, unless the caller has cancelled it."""
        with suppress(InvalidStateError):
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)


class TransformersEngine:
    """Qwen2.5-VL or Qwen2-VL in transformers, with AWQ or unquantized weights."""

    name = "transformers"

    def __init__(
        self, model: str, *, revision: str | None = None, dtype: str = "auto", batch_size: int = 8, threads: int | None = None,
        device: str | None = None, max_model_len: int | None = None, max_request_tokens: int | None = None,
        rope_scaling: dict[str, Any] | None = None, lora: str | None = None, keep_int4: bool = False,
    ) -> None:  # fmt: skip
        """Load a checkpoint (hub id or folder) and start the engine's thread.

        `threads` is the number of cores for this engine: with more threads than cores every small operation waits for the scheduler.
        Raises JobError for a checkpoint that cannot be used.
        """
        self.model = model
        self._threads = threads or torch.get_num_threads()
        torch.set_num_threads(self._threads)
        on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = load.load_checkpoint(model, revision, dtype, on, self._threads, rope_scaling, lora, keep_int4)
        self.max_model_len = max_model_len or checkpoint.count_context_tokens(self._model.network.config)
        self.max_request_tokens = max_request_tokens
        self._batch_size = batch_size
        self._changed, self._clock = Condition(), TokenClock()
        self._waiting: list[PendingRequest] = []
        self._active: dict[BatchRow, PendingRequest] = {}
        self._stopped: str | None = None
        self._thread = Thread(target=self._serve, name="transformers-engine", daemon=True)
        self._thread.start()

    async def complete(self, request: Request) -> Completion:
        """Return the answer to one request; from any event loop."""
        pending = await asyncio.to_thread(self._prepare, request)
        with self._clock.count_request():
            with self._changed:
                self._check_open()
                self._waiting.append(pending)
                self._changed.notify()
            return await asyncio.wrap_future(pending.future)

    def measure_silence_s(self) -> float:
        """Return for how long the engine has had requests and has not ended a pass."""
        return self._clock.measure_silence_s()

    def close(self) -> None:
        """Release the model. Requests still waiting fail with EngineDead."""
        self._stop("the engine was closed")
        self._thread.join()
        vars(self).pop("_model", None)

    def _check_open(self) -> None:
        """Raise EngineDead when the engine was closed or its thread has ended."""
        if self._stopped is not None:
            raise EngineDead(self._stopped)

    def _prepare(self, request: Request) -> PendingRequest:
        """Encode a request. Raises DocumentError for one that cannot be answered, EngineDead for a closed engine."""
        self._check_open()
        try:
            prompt = self._model.encoder.encode(request.messages)
            check_token_length(len(prompt.ids), request.sampling.max_tokens, self.max_model_len, self.max_request_tokens)
            self._model.vocabulary.start_constraint(request.schema)
        except JobError as error:
            raise DocumentError("schema", str(error)) from None
        except Exception as error:  # any: a template or a tokenizer may fail on this request's text
            raise convert_request_error(error) from None
        return PendingRequest(request, prompt)

    # What follows runs in the engine's thread.

    def _serve(self) -> None:
        """Run the batch until the engine is closed; then fail every open request, also when an exception ends this thread."""
        torch.set_num_threads(self._threads)
        batch = Batch([])
        try:
            while self._stopped is None:
                try:
                    batch = self._admit_and_advance(batch)
                    self._clock.note_token()
                except torch.OutOfMemoryError:  # outside a forward pass: while rows joined or left
                    batch = self._requeue(list(self._active))
        except BaseException as error:  # any: the callers learn of it by EngineDead, and by nothing else
            self._stop(f"the engine's thread ended: {type(error).__name__}: {error}")
        for pending in [*self._active.values(), *self._waiting]:
            pending.set_outcome(EngineDead(str(self._stopped)))

    def _admit_and_advance(self, batch: Batch) -> Batch:
        """Run one pass over the requests that join and one over the batch; return both as one batch."""
        joining = self._advance(Batch(self._admit(len(batch))), other_rows=len(batch))
        batch = join_batches(self._advance(batch, other_rows=len(joining)), joining)
        batch.compact()
        return batch

    def _stop(self, reason: str) -> None:
        """Accept no more requests; the first reason is kept."""
        with self._changed:
            self._stopped = self._stopped or reason
            self._changed.notify_all()

    def _admit(self, busy: int) -> list[BatchRow]:
        """Return the rows that join now; waits for requests only while the batch is empty."""
        with self._changed:
            if not busy:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                self._changed.wait_for(lambda: len(self._waiting) >= self._batch_size or self._stopped, timeout=GATHER_S)
            free = self._batch_size - busy
            if self._stopped or free < 1 or (busy and free < self._batch_size // 4):
                return []
            chosen = select_nearest([pending for pending in self._waiting if not pending.future.cancelled()], free)
            self._waiting = [pending for pending in self._waiting if pending not in chosen and not pending.future.cancelled()]
        return [row for pending in chosen if (row := self._make_row(pending))]

    def _make_row(self, pending: PendingRequest) -> BatchRow | None:
        """Return the row of a request; None when the request failed at once."""
        sampling = pending.request.sampling
        try:
            constraint = self._model.vocabulary.start_constraint(pending.request.schema)
            max_tokens = min(sampling.max_tokens, self.max_model_len - len(pending.prompt.ids))
            row = BatchRow(pending.prompt, sampling, constraint, max_tokens)
        except DocumentError as error:
            pending.set_outcome(error)
            return None
        self._active[row] = pending
        return row

    def _advance(self, batch: Batch, other_rows: int) -> Batch:
        """Run one pass over a batch and return the rows that are not finished. `other_rows` rows outside it hold memory as well."""
        if not batch.rows:
            return batch
        try:
            run_step(self._model, batch)
        except Exception as error:  # any: an error that one request causes must fail that request alone
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # on a GPU, on a CPU
            return self._shrink(batch, other_rows, error) if out_of_memory else self._isolate(batch, other_rows, error)
        return self._finish_rows(batch)

    def _shrink(self, batch: Batch, other_rows: int, error: Exception) -> Batch:
        """Requeue a batch that ran out of memory, with half the batch size; a request that was alone fails."""
        if len(batch) + other_rows == 1:
            row = batch.rows[0]
            row.outcome = DocumentError("memory", f"no memory on {self._model.device} for {len(row.prompt.ids)} prompt tokens: {error}")
            return self._finish_rows(batch)
        return self._requeue(batch.rows)

    def _requeue(self, rows: list[BatchRow]) -> Batch:
        """Put requests back at the head of the queue, to start again in smaller batches; return an empty batch."""
        self._batch_size = max(1, min(self._batch_size, len(self._active) // 2))
        with self._changed:
            self._waiting = [self._active.pop(row) for row in rows] + self._waiting
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return Batch([])

    def _isolate(self, batch: Batch, other_rows: int, error: Exception) -> Batch:
        """Find the request that made a pass fail by bisection, and fail it alone. Raises the error of a GPU that has failed."""
        if isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error):
            raise error
        if len(batch) == 1:
            batch.rows[0].outcome = convert_request_error(error)
            return self._finish_rows(batch)
        half = len(batch) // 2
        halves = batch.select(range(half)), batch.select(range(half, len(batch)))
        first = self._advance(halves[0], other_rows + len(halves[1]))
        return join_batches(first, self._advance(halves[1], other_rows + len(first)))

    def _finish_rows(self, batch: Batch) -> Batch:
        """Set the outcome of every finished row and return the other rows; rows of cancelled requests are dropped."""
        unfinished = [at for at, row in enumerate(batch.rows) if not row.is_finished and not self._active[row].future.cancelled()]
        for row in batch.rows:
            if row.is_finished or self._active[row].future.cancelled():
                self._active.pop(row).set_outcome(row.outcome if isinstance(row.outcome, DocumentError) else self._build_completion(row))
        if len(unfinished) == len(batch):
            return batch
        return batch.select(unfinished) if unfinished else Batch([])

    def _build_completion(self, row: BatchRow) -> Completion:
        """Return the completion of a finished row; of a row whose request was cancelled, what it has so far."""
        reason = row.outcome if isinstance(row.outcome, FinishReason) else FinishReason.LENGTH
        return build_completion(row.tokens, row.logprobs, reason, len(row.prompt.ids), self._model.vocabulary.decode_token)


def join_batches(one: Batch, other: Batch) -> Batch:
    """Return one batch with the rows of both; either may be empty."""
    if not one.rows or not other.rows:
        return one if one.rows else other
    return one.join(other)


def select_nearest(waiting: Sequence[PendingRequest], count: int) -> list[PendingRequest]:
    """Return the oldest request and those nearest to it in length: `count` at most, and no more than fit into one pass."""
    if not waiting:
        return []
    length = len(waiting[0].prompt.ids)
    nearest = sorted(waiting, key=lambda pending: abs(len(pending.prompt.ids) - length))[:count]
    longest = 0
    for at, pending in enumerate(nearest):
        longest = max(longest, len(pending.prompt.ids))
        if at and longest * (at + 1) > MAX_PREFILL_TOKENS:
            return nearest[:at]
    return nearest
