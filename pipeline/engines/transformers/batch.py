"""Batch of answers in progress: its rows, and what a forward pass takes of each.

A pass takes a row's pending tokens: at first its prompt, whole or in parts, then one token, or one and the forced tokens after it. Rows
with fewer pending tokens are padded on the right, where nothing attends to the padding. Rows can leave, join and take different numbers of
tokens at any step; where their keys and values are, `cache.py` says. Rows that answer stand before those that are still at their prompts:

    answer  answer  answer | prompt, half of it read  prompt  prompt

Everything that a pass needs on the device goes there as one tensor of 32-bit words (`StagedPass`), and one comes back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engines.encoding import EncodedPrompt
from pipeline.engines.transformers.cache import KeyValueCache
from pipeline.errors import DocumentError
from pipeline.records import FinishReason, Sampling
from pipeline.schema.grammar import Constraint, Masks

PASS_COST_TOKENS = {"cuda": 256, "cpu": 16}
"""What a pass costs besides its tokens, in tokens: reading 7B weights takes as long as computing 83 (int4) to 262 (bf16) tokens on an H100
by its data sheet, and on a CPU about as long as computing 16."""


@dataclass(eq=False)
class BatchRow:
    """One answer in progress."""

    prompt: EncodedPrompt
    sampling: Sampling
    constraint: Constraint
    max_tokens: int
    """The sampling's limit, or what the model's context leaves for the answer."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """One for each token but the last `unscored`: those were forced, and the next pass computes their log-probabilities."""
    margins: dict[int, float] = field(default_factory=dict)
    """Of the tokens that were chosen among several, by their index (`records.Token.margin`)."""
    unscored: int = 0
    pending: list[int] = field(default_factory=list)
    """Tokens that are not in the cache yet."""
    cached: int = 0
    """Tokens that are in the cache."""
    outcome: FinishReason | DocumentError | None = None
    """Set when no further token is chosen; the row is finished once nothing is unscored."""
    generator: torch.Generator = field(default_factory=torch.Generator)
    point: float | None = None
    """The random number in [0, 1) for the next token, kept until that token is chosen: a pass that fails is repeated with the same."""

    @property
    def is_reading(self) -> bool:
        """Whether a part of the prompt is not in the cache yet."""
        return self.cached < len(self.prompt.ids) and not isinstance(self.outcome, DocumentError)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.sampling.seed)
        self.pending = list(self.prompt.ids)
        self.append_forced()

    def append_forced(self) -> None:
        """Append the tokens to which the grammar allows no alternative, and set the outcome if the answer ends with them."""
        forced = self.constraint.take_forced_tokens()
        if len(self.tokens) + len(forced) > self.max_tokens:
            forced, self.outcome = forced[: self.max_tokens - len(self.tokens)], FinishReason.LENGTH
        elif self.constraint.is_done:
            self.outcome = FinishReason.STOP
        elif len(self.tokens) + len(forced) == self.max_tokens:
            self.outcome = FinishReason.LENGTH
        self.tokens += forced
        self.pending += forced
        self.unscored = len(forced)

    def draw_point(self) -> float:
        """Return the random number with which the next token is chosen; 0 for a row that draws none.

        It comes from the request's own generator on the CPU, so that an answer does not depend on its batch.
        """
        if self.sampling.temperature <= 0:
            return 0.0
        if self.point is None:
            self.point = float(torch.rand((), generator=self.generator, dtype=torch.float64))
        return self.point

    def advance(self, fed: int) -> int:
        """Record that the first `fed` pending tokens are in the cache; return how many forced ones the pass has scored."""
        scored = len(self.list_scored(fed))
        self.cached += fed
        self.pending = self.pending[fed:]
        self.unscored -= scored
        return scored

    def measure_part(self, most_tokens: int) -> int:
        """Return how many pending tokens a pass takes of a row that reads its prompt: all of them, or a part of the prompt."""
        if len(self.pending) <= most_tokens:
            return len(self.pending)
        return min(self.prompt.cut_part(self.cached, most_tokens) - self.cached, len(self.pending))

    def list_scored(self, fed: int) -> range:
        """Return the indices of the pending tokens among the first `fed` after which a forced token stands."""
        last = len(self.pending) - 1
        return range(last - self.unscored, min(fed, last))

    def compute_pending_positions(self) -> NDArray[np.int64]:
        """Return the positions (3, pending) of the pending tokens: the prompt's own, then counting up."""
        start = int(self.prompt.positions.max()) + 1 + max(0, self.cached - len(self.prompt.ids))
        known = self.prompt.positions[:, self.cached :]
        more = np.arange(start, start + len(self.pending) - known.shape[1])
        return np.concatenate([known, np.broadcast_to(more, (3, len(more)))], axis=1)

    @property
    def is_finished(self) -> bool:
        """Whether the answer and its log-probabilities are complete, or it has failed."""
        return isinstance(self.outcome, DocumentError) or (self.outcome is not None and not self.unscored)


class Batch:
    """Rows and their cache: row r of the batch is row r of the cache's buffers."""

    def __init__(self, cache: KeyValueCache, part_tokens: int) -> None:
        """`part_tokens` is how many tokens of prompts, padding included, a pass takes."""
        self.rows: list[BatchRow] = []
        self.cache, self.part_tokens = cache, part_tokens

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """The longest row's tokens: those in the cache and those that a pass adds."""
        return max((row.cached + len(row.pending) for row in self.rows), default=0)

    @property
    def answering(self) -> range:
        """The rows that have read their prompts; those behind them have not."""
        return range(sum(not row.is_reading for row in self.rows))

    def select_reading(self) -> range:
        """Return the rows behind those that answer whose prompts the next pass reads: several whole ones, or a part of the first."""
        start = stop = len(self.answering)
        widest = 0
        while stop < len(self.rows) and not (stop > start and (self.rows[start].cached or self.rows[stop].cached)):
            widest = max(widest, len(self.rows[stop].pending))
            if stop > start and widest * (stop + 1 - start) > self.part_tokens:
                break
            stop += 1
        return range(start, stop)

    def add(self, rows: Sequence[BatchRow]) -> None:
        """Append rows. Raises OutOfMemoryError, and appends none, where the cache has no room for them."""
        longest = max(self.tokens, *(row.cached + len(row.pending) for row in rows)) if rows else 0
        self.cache.reserve(len(self) + len(rows), longest)
        self.rows += rows

    def remove(self, leaving: Sequence[BatchRow]) -> None:
        """Remove rows. The place of one that answers is taken by the last that does, and the place of that by the last row of all."""
        for row in leaving:
            at, count = self.rows.index(row), len(self.answering)
            for last in (count - 1, len(self.rows) - 1) if at < count else (len(self.rows) - 1,):
                if at != last:
                    self.cache.move_row(last, at)
                    self.rows[at] = self.rows[last]
                at = last
            self.rows.pop()
        if leaving:
            with suppress(torch.OutOfMemoryError):  # no memory for the smaller copy: the buffers stay as they are
                self.cache.shrink(len(self), self.tokens)


@dataclass(frozen=True, eq=False)
class StagedPass:
    """What a pass over rows `start` to `stop` needs, on the CPU, in one tensor.

    Scored places come in two groups: the last token of each row that gets a new token, then each token after which a forced one stands.
    """

    start: int
    stop: int
    width: int
    columns: int
    is_reading: bool
    """The pass takes prompts, or a part of one."""
    is_first: bool
    """The rows' first pass: nothing of them is in the cache."""
    is_even: bool
    """All rows have as many tokens in the cache and take one more, and the pass reads no column behind it: no mask is needed."""
    fed: tuple[int, ...]
    """Pending tokens of each row that this pass takes."""
    choosing: tuple[int, ...]
    """Rows, counted from `start`, that get a new token."""
    is_drawing: bool
    """Whether any of them has a temperature or a repetition penalty."""
    layout: dict[str, tuple[int, tuple[int, ...], np.dtype[np.generic]]]
    """Offset in words, shape and type of each array."""
    words: Tensor
    """int32; pinned where there is a GPU."""

    def unpack(self, words: Tensor) -> dict[str, Tensor]:
        """Return the arrays as views of the words, wherever those are."""
        views = {}
        for name, (offset, shape, dtype) in self.layout.items():
            part = words[offset : offset + math.prod(shape) * dtype.itemsize // 4]
            views[name] = (part.view(torch.float64) if dtype == np.float64 else part).view(shape)
        return views


def choose_width(rows: Sequence[BatchRow], pass_cost: int) -> int:
    """Return how many pending tokens of a row a pass takes at most: as many as make it the cheapest for each token.

    All rows are as wide as the widest, so a pass costs `pass_cost` + rows x width, and takes min(pending, width) of each row. Forced tokens
    that are left over are taken by the next passes.
    """
    pending = [len(row.pending) for row in rows]
    return max(sorted(set(pending)), key=lambda width: sum(min(width, count) for count in pending) / (pass_cost + len(pending) * width))


def stage_pass(
    rows: Sequence[BatchRow], start: int, widest: int, masks: Masks, columns: int, pad_id: int, vocabulary: int, pinned: bool
) -> StagedPass:
    """Return what a pass over these rows needs; `masks` has a row for each of them that gets a new token.

    Every row takes `widest` pending tokens at most. `vocabulary` is the width of the logits.
    """
    fed = [min(len(row.pending), widest) for row in rows]
    choosing = [at for at, row in enumerate(rows) if is_choosing(row, fed[at])]
    forced = [(at, place, row.pending[place + 1]) for at, row in enumerate(rows) for place in row.list_scored(fed[at])]
    width = max(fed)
    ids = np.full((len(rows), width), pad_id)
    positions = np.zeros((3, len(rows), width), np.int64)
    for at, row in enumerate(rows):
        ids[at, : fed[at]] = row.pending[: fed[at]]
        positions[:, at, : fed[at]] = row.compute_pending_positions()[:, : fed[at]]
    samplings = [rows[at].sampling for at in choosing]
    is_drawing = any(sampling.temperature > 0 or sampling.repetition_penalty != 1 for sampling in samplings)
    used = [
        place for at, s in enumerate(samplings) if s.repetition_penalty != 1 for place in list_used(rows[choosing[at]], at * vocabulary)
    ]
    arrays = {
        "draws": np.array(
            [
                (rows[at].draw_point(), s.temperature, s.top_p, s.repetition_penalty, s.top_k if s.top_k > 0 else math.inf)
                for at, s in zip(choosing if is_drawing else (), samplings, strict=False)
            ],
            np.float64,
        ).reshape(-1, 5),  # first, because its numbers have two words
        "ids": ids,
        "positions": positions,
        "cached": np.array([row.cached for row in rows]),
        "places": np.array([at * width + fed[at] - 1 for at in choosing] + [at * width + place for at, place, _ in forced]),
        "follows": np.array([token for _, _, token in forced]),
        "used": np.array(used),
        "masks": masks,
    }
    arrays = {name: array if name == "draws" else array.astype(np.int32) for name, array in arrays.items()}
    layout, offset = {}, 0
    for name, array in arrays.items():
        layout[name] = (offset, array.shape, array.dtype)
        offset += array.nbytes // 4
    words = torch.empty(offset, dtype=torch.int32, pin_memory=pinned)
    np.concatenate([array.ravel().view(np.int32) for array in arrays.values()], out=words.numpy())
    is_first = all(not row.cached for row in rows)
    is_even = width == 1 and {row.cached for row in rows} == {columns - 1}
    return StagedPass(
        start, start + len(rows), width, columns, rows[0].is_reading, is_first, is_even, tuple(fed), tuple(choosing), is_drawing, layout,
        words,
    )  # fmt: skip


def list_used(row: BatchRow, offset: int) -> list[int]:
    """Return the tokens of a row's prompt and answer, each once, plus an offset."""
    return [offset + token for token in sorted({*row.prompt.ids, *row.tokens})]


def is_choosing(row: BatchRow, fed: int) -> bool:
    """Return whether a pass that takes `fed` pending tokens of a row gives it a new one."""
    return row.outcome is None and fed == len(row.pending)
