"""Engine `transformers`: requests with page images come in, completions with a log-probability for each token go out.
A checkpoint in this process answers them in one continuous batch; a request that cannot be answered raises DocumentError.

The engine's thread takes waiting requests into the batch: the oldest and those nearest to it in length, so that little is padded. A
row leaves the batch when its answer ends, and is replaced while the others go on:

    waiting  7 6 5        batch  | 1 |   | 3 | 4 |        2 has ended; 5 replaces it once a quarter of the batch is free

A step is a pass over the rows that answer, which gives each a token, and a pass over prompts of rows that have joined, bounded in tokens
(`PART_TOKENS`): however long the prompts are, the others go on writing meanwhile.

The batch has at most `batch_size` rows, and as many as its cache has room for (`count_cache_tokens`). Where memory runs out nevertheless,
the youngest row leaves and is asked again, and the limit is lowered for a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import torch

from pipeline.engines import checkpoint
from pipeline.engines.completion import TokenClock, build_completion, check_token_length, convert_request_error
from pipeline.engines.encoding import EncodedPrompt
from pipeline.engines.transformers import load
from pipeline.engines.transformers.batch import Batch, BatchRow
from pipeline.engines.transformers.cache import COLUMN_STEP
from pipeline.engines.transformers.generate import run_step
from pipeline.engines.transformers.replay import make_replays, open_stream
from pipeline.errors import DocumentError, EngineDead, JobError
from pipeline.records import Completion, FinishReason, Request

GATHER_S = 0.02
"""How long an idle engine waits after the first request for others to join its batch, which then takes seconds."""
PART_TOKENS = {"cuda": 4096, "cpu": 1024}
"""Tokens of prompts, padding included, that a step reads; a page more where that would cut the first one."""
ANSWER_ROOM = COLUMN_STEP
"""Tokens of an answer for which a row that joins must find room. Answers that become longer may cost the youngest row its place."""
GPU_CACHE_SHARE = 0.7
"""Share of the GPU memory that is free after loading which the cache may take; the rest is for the passes' own tensors."""
CPU_CACHE_BYTES = 4 * 2**30
REGROW_PASSES = 64
"""Passes after which a limit that was lowered for want of memory grows by one row. Finding that too early costs that row's first pass."""


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
    """Qwen3-VL, Qwen2.5-VL or Qwen2-VL in transformers, with AWQ or unquantized weights."""

    name = "transformers"

    def __init__(
        self, model: str, *, revision: str | None = None, dtype: str = "auto", batch_size: int = 8, threads: int | None = None,
        device: str | None = None, max_model_len: int | None = None, max_request_tokens: int | None = None,
        rope_scaling: dict[str, Any] | None = None, lora: Path | None = None, keep_int4: bool = False, cache_tokens: int | None = None,
        part_tokens: int | None = None, logprobs: bool = True, enforce_eager: bool = False,
    ) -> None:  # fmt: skip
        """Load a checkpoint (hub id or folder) and start the engine's thread.

        `threads` is the number of cores for this engine: with more threads than cores every small operation waits for the scheduler.
        `cache_tokens` bounds rows x tokens of the batch; by default free memory does. `part_tokens` replaces `PART_TOKENS`. `logprobs`
        says whether completions have tokens with their log-probabilities. `enforce_eager` has a GPU compute every step instead of replaying
        CUDA graphs. Raises JobError for a checkpoint that cannot be used.
        """
        self.model = model
        self._threads = threads or torch.get_num_threads()
        torch.set_num_threads(self._threads)
        on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = load.load_checkpoint(model, revision, dtype, on, self._threads, rope_scaling, lora, keep_int4)
        self.max_model_len = max_model_len or checkpoint.count_context_tokens(self._model.network.config)
        self.max_request_tokens, self._logprobs = max_request_tokens, logprobs
        self._cache_tokens = cache_tokens or count_cache_tokens(self._model.make_cache().bytes_per_token, on)
        self._batch_size, self._part_tokens = batch_size, part_tokens or PART_TOKENS.get(on.type, PART_TOKENS["cuda"])
        self._replays = make_replays(on, enforce_eager)
        self._lowered_limit: int | None = None
        self._calm_passes = 0
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
        try:
            with open_stream(self._model.device):
                batch = Batch(self._model.make_cache(self._cache_tokens), self._part_tokens, self._replays)
                while self._stopped is None:
                    joining = self._admit(batch)
                    self._write_tokens(batch)
                    self._read_prompts(batch, joining)
                    self._regrow_limit()
                    self._clock.note_token()
        except BaseException as error:  # any: the callers learn of it by EngineDead, and by nothing else
            self._stop(f"the engine's thread ended: {type(error).__name__}: {error}")
        for pending in [*self._active.values(), *self._waiting]:
            pending.set_outcome(EngineDead(str(self._stopped)))
        self._replays.drop_recordings()

    def _stop(self, reason: str) -> None:
        """Accept no more requests; the first reason is kept."""
        with self._changed:
            self._stopped = self._stopped or reason
            self._changed.notify_all()

    @property
    def _limit(self) -> int:
        """Most rows of the batch now: `batch_size`, or fewer after memory ran out."""
        return min(self._batch_size, self._lowered_limit or self._batch_size)

    def _admit(self, batch: Batch) -> list[BatchRow]:
        """Return the rows that join now; waits for requests only while the batch is empty."""
        busy = len(batch)
        with self._changed:
            if not busy:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                self._changed.wait_for(lambda: len(self._waiting) >= self._limit or self._stopped, timeout=GATHER_S)
            free = self._limit - busy
            if self._stopped or free < 1 or (busy and free < self._limit // 4):
                return []
            chosen = select_nearest([pending for pending in self._waiting if not pending.future.cancelled()], free)
            while chosen and not batch.cache.fits(
                busy + len(chosen), max(batch.tokens, *(len(one.prompt.ids) for one in chosen)) + ANSWER_ROOM
            ):
                chosen.pop()
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

    def _write_tokens(self, batch: Batch) -> None:
        """Run one pass over the rows that answer. Where memory runs out the youngest row of all is evicted, and asked again later."""
        is_done = False
        while batch.answering and not is_done:
            try:
                self._advance(batch, batch.answering)
                is_done = True
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._remove_finished(batch)
                self._evict(batch, [row for row in self._active if row in batch.rows][-1:], error)
        self._remove_finished(batch)

    def _read_prompts(self, batch: Batch, joining: list[BatchRow]) -> None:
        """Add rows to the batch and run one pass over prompts. Where memory runs out the later half of those not read waits again."""
        is_done = False
        while not is_done:
            try:
                batch.add(joining)
                joining = []
                if reading := batch.select_reading():
                    self._advance(batch, reading)
                is_done = True
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._remove_finished(batch)
                unread = [*batch.rows[len(batch.answering) :], *joining]
                self._evict(batch, unread[len(unread) // 2 :], error)
                joining = [row for row in joining if row in self._active]
        self._remove_finished(batch)

    def _advance(self, batch: Batch, span: range) -> None:
        """Run one pass over some of the batch's rows. If one request makes it fail, find it by bisection and fail it alone.

        Raises the error of a GPU that has failed, and that of memory that has run out.
        """
        try:
            run_step(self._model, batch, span)
        except Exception as error:  # any: an error that one request causes must fail that request alone
            if is_out_of_memory(error) or isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error):
                raise
            if len(span) == 1:
                batch.rows[span.start].outcome = convert_request_error(error)
                return
            middle = span.start + len(span) // 2
            self._advance(batch, range(span.start, middle))
            self._advance(batch, range(middle, span.stop))

    def _evict(self, batch: Batch, rows: Sequence[BatchRow], error: Exception) -> None:
        """Put rows for which there is no memory back at the head of the queue, and lower the limit; a request that was alone fails."""
        batch.remove([row for row in rows if row in batch.rows])
        batch.replays.drop_recordings()
        if not batch.rows:
            batch.cache.shrink(0, 0)
        is_alone = len(self._active) == 1
        evicted = {row: self._active.pop(row) for row in rows}
        if is_alone:
            for row, pending in evicted.items():
                tokens = len(row.prompt.ids)
                pending.set_outcome(DocumentError("memory", f"no memory on {self._model.device} for {tokens} prompt tokens: {error}"))
        else:
            with self._changed:
                self._waiting = [*evicted.values(), *self._waiting]
            self._lowered_limit, self._calm_passes = max(1, len(self._active)), 0
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _regrow_limit(self) -> None:
        """Raise a lowered limit by one row after `REGROW_PASSES` passes in which memory sufficed."""
        self._calm_passes += 1
        if self._lowered_limit is not None and self._calm_passes >= REGROW_PASSES:
            raised = self._lowered_limit + 1
            self._lowered_limit, self._calm_passes = (raised if raised < self._batch_size else None), 0

    def _remove_finished(self, batch: Batch) -> None:
        """Set the outcome of every finished row and remove it from the batch, as well as the rows of cancelled requests."""
        leaving = [row for row in batch.rows if row.is_finished or self._active[row].future.cancelled()]
        for row in leaving:
            self._active.pop(row).set_outcome(row.outcome if isinstance(row.outcome, DocumentError) else self._build_completion(row))
        batch.remove(leaving)

    def _build_completion(self, row: BatchRow) -> Completion:
        """Return the completion of a finished row; of a row whose request was cancelled, what it has so far."""
        reason = row.outcome if isinstance(row.outcome, FinishReason) else FinishReason.LENGTH
        scores = row.logprobs if self._logprobs else None
        margins = [row.margins.get(at) for at in range(len(row.tokens))]
        return build_completion(row.tokens, scores, reason, len(row.prompt.ids), self._model.vocabulary.decode_token, margins)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def count_cache_tokens(bytes_per_token: int, device: torch.device) -> int:
    """Return for how many tokens the cache may have room: `GPU_CACHE_SHARE` of the memory that is free now, or `CPU_CACHE_BYTES`."""
    if device.type != "cuda":
        return CPU_CACHE_BYTES // bytes_per_token
    torch.cuda.empty_cache()  # what loading has left over, which the stream of the engine's thread could not use
    return int(torch.cuda.mem_get_info(device)[0] * GPU_CACHE_SHARE) // bytes_per_token


def select_nearest(waiting: Sequence[PendingRequest], count: int) -> list[PendingRequest]:
    """Return the oldest request and those nearest to it in length: `count` at most."""
    length = len(waiting[0].prompt.ids) if waiting else 0
    return sorted(waiting, key=lambda pending: abs(len(pending.prompt.ids) - length))[:count]
