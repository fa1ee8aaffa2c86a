"""Batch of answers in progress: its rows, and what a forward pass takes of each.

A pass takes a row's pending tokens: at first its prompt, whole or in parts, then one token, or one and the forced tokens after it. Rows
with fewer pending tokens are padded on the right, where nothing attends to the padding. Rows can leave, join and take different numbers of
tokens at any step; where their keys and values are, `cache.py` says. Rows that answer stand before those that are still at their prompts:

    answer  answer  answer | prompt, half of it read  prompt  prompt

Everything that a pass needs on the device goes there as one tensor of 32-bit words (`StagedPass`), and one comes back. Where in it each
array is, and all else that is not in the words, is the pass's shape (`PassShape`): passes of one shape are the same operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engines.encoding import EncodedPrompt
from pipeline.engines.transformers.cache import KeyValueCache
from pipeline.engines.transformers.replay import PassReplays
from pipeline.errors import DocumentError
from pipeline.records import FinishReason, Sampling
from pipeline.schema.grammar import Constraint, Masks

PASS_COST_TOKENS = {"cuda": 256, "cpu": 16}
"""What a pass costs besides its tokens, in tokens: reading 7B weights takes as long as computing 83 (int4) to 262 (bf16) tokens on an H100
by its data sheet, and on a CPU about as long as computing 16."""

CHOSEN = -1
"""In place of a forced token: the token that the pass chooses."""
PLAIN_DRAW = (0.0, 0.0, 1.0, 1.0, math.inf)
"""Random number, temperature, `top_p`, repetition penalty and `top_k` of a row that takes the most probable token."""


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
    answer_position: int = 0
    """The position of the answer's first token."""
    point: float | None = None
    """The random number in [0, 1) for the next token, kept until that token is chosen: a pass that fails is repeated with the same."""

    @property
    def is_reading(self) -> bool:
        """Whether a part of the prompt is not in the cache yet."""
        return self.cached < len(self.prompt.ids) and not isinstance(self.outcome, DocumentError)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.sampling.seed)
        self.answer_position = int(self.prompt.positions.max()) + 1
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

    def advance(self, fed: int) -> None:
        """Record that the first `fed` pending tokens are in the cache, and the forced ones after them scored."""
        self.unscored -= len(self.list_scored(fed))
        self.cached += fed
        self.pending = self.pending[fed:]

    def measure_part(self, most_tokens: int) -> int:
        """Return how many pending tokens a pass takes of a row that reads its prompt: all of them, or a part of the prompt."""
        if len(self.pending) <= most_tokens:
            return len(self.pending)
        return min(self.prompt.cut_part(self.cached, most_tokens) - self.cached, len(self.pending))

    def list_scored(self, fed: int) -> range:
        """Return the indices of the pending tokens among the first `fed` after which a forced token stands."""
        last = len(self.pending) - 1
        return range(last - self.unscored, min(fed, last))

    def fill_positions(self, positions: NDArray[np.int32]) -> None:
        """Fill in the positions (3, tokens) of the first pending tokens: the prompt's own, then counting up."""
        known = self.prompt.positions[:, self.cached : self.cached + positions.shape[1]]
        start = self.answer_position + max(0, self.cached - len(self.prompt.ids))
        positions[:, : known.shape[1]] = known
        positions[:, known.shape[1] :] = range(start, start + positions.shape[1] - known.shape[1])

    @property
    def is_finished(self) -> bool:
        """Whether the answer and its log-probabilities are complete, or it has failed."""
        return isinstance(self.outcome, DocumentError) or (self.outcome is not None and not self.unscored)


class Batch:
    """Rows and their cache: row r of the batch is row r of the cache's buffers."""

    def __init__(self, cache: KeyValueCache, part_tokens: int, replays: PassReplays | None = None) -> None:
        """`part_tokens` is how many tokens of prompts, padding included, a pass takes; without `replays` every pass is computed."""
        self.rows: list[BatchRow] = []
        self.cache, self.part_tokens = cache, part_tokens
        self.replays = replays or PassReplays(None)

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
        if leaving and (self.rows or not self.replays.is_on):  # recordings are of these buffers: the next batch begins with both
            with suppress(torch.OutOfMemoryError):  # no memory for the smaller copy: the buffers stay as they are
                self.cache.shrink(len(self), self.tokens)


@dataclass(frozen=True)
class PassShape:
    """What passes have in common that are the same operations: their sizes, and what they compute at all.

    The last token of a row that a pass takes is always scored: after it stands the token that the pass chooses, or a forced one. The other
    tokens after which forced ones stand are further places.
    """

    start: int
    """The first of the batch's rows."""
    rows: int
    """Rows from there on, padding included."""
    width: int
    columns: int
    """Columns of the cache that the pass reads."""
    further: int
    """Further scored places, padding included."""
    is_first: bool
    """The rows' first pass: nothing of them is in the cache."""
    is_masked: bool
    """Whether rows see less than all columns: not in a first pass, nor where one token of one row reads as many columns as it has."""
    is_drawing: bool
    """Whether any row has a temperature or a repetition penalty."""
    vocabulary: int
    """The width of the logits."""


@dataclass(frozen=True, eq=False)
class StagedPass:
    """What a pass needs, on the CPU, in one tensor."""

    shape: PassShape
    fed: tuple[int, ...]
    """Pending tokens of each row that this pass takes; rows that are padding are not among them."""
    words: Tensor
    """int32; pinned where there is a GPU."""


@lru_cache(maxsize=256)
def lay_out_arrays(shape: PassShape) -> tuple[dict[str, tuple[slice, torch.dtype, tuple[int, ...]]], int]:
    """Return where in the words of a pass each array is, its type and its shape, and the number of words."""
    drawing, masks = shape.rows if shape.is_drawing else 0, -(-shape.vocabulary // 32)
    sizes = {
        "draws": (drawing, 5),  # first, because its numbers have two words
        "ids": (shape.rows, shape.width),
        "positions": (3, shape.rows, shape.width),
        "cached": (shape.rows,),
        "places": (shape.rows + shape.further,),
        "follows": (shape.rows + shape.further,),
        "masks": (shape.rows, masks),
        "used": (drawing, masks),
    }
    arrays, offset = {}, 0
    for name, size in sizes.items():
        dtype = torch.float64 if name == "draws" else torch.int32
        stop = offset + math.prod(size) * dtype.itemsize // 4
        arrays[name] = (slice(offset, stop), dtype, size)
        offset = stop
    return arrays, offset


def view_arrays(words: Tensor, shape: PassShape) -> dict[str, Tensor]:
    """Return the arrays of a pass as views of its words, wherever those are."""
    return {name: words[part].view(dtype).view(size) for name, (part, dtype, size) in lay_out_arrays(shape)[0].items()}


def choose_width(rows: Sequence[BatchRow], pass_cost: int, widths: Sequence[int] = ()) -> int:
    """Return how many pending tokens of a row a pass takes at most: as many as make it the cheapest for each token.

    All rows are as wide as the widest, so a pass costs `pass_cost` + rows x width, and takes min(pending, width) of each row. Forced tokens
    that are left over are taken by the next passes. Allowed are `widths`, or any.
    """
    pending = [len(row.pending) for row in rows]
    return max(
        widths or sorted(set(pending)),
        key=lambda width: sum(min(width, count) for count in pending) / (pass_cost + len(pending) * width),
    )


def stage_pass(batch: Batch, shape: PassShape, stop: int, masks: Masks, pad_id: int, pinned: bool) -> StagedPass:
    """Return what a pass over the batch's rows from the shape's first to `stop` needs.

    `masks` has a row for each of them that gets a new token. Every row takes as many pending tokens as the shape is wide, at most. Rows
    from `stop` on are padding. Their keys are written behind the tokens of whatever row has this place in the cache, where nothing sees
    them and that row's own next tokens come, as it is behind a row that takes fewer tokens than the others.
    """
    rows = batch.rows[shape.start : stop]
    fed = tuple(min(len(row.pending), shape.width) for row in rows)
    words = torch.empty(lay_out_arrays(shape)[1], dtype=torch.int32, pin_memory=pinned)
    arrays = {name: array.numpy() for name, array in view_arrays(words, shape).items()}
    ids, positions, cached, places, follows = (arrays[name] for name in ("ids", "positions", "cached", "places", "follows"))
    for array, padding in ((ids, pad_id), (positions, 0), (cached, 0), (places, 0), (follows, 0)):
        array.fill(padding)
    arrays["masks"][len(rows) :], arrays["draws"][:], arrays["used"][:] = -1, PLAIN_DRAW, 0
    allowed, further = iter(masks), shape.rows
    for at, row in enumerate(rows):
        last = fed[at] - 1
        ids[at, : fed[at]] = row.pending[: fed[at]]
        row.fill_positions(positions[:, at, : fed[at]])
        places[at] = at * shape.width + last
        for place in row.list_scored(fed[at]):
            target = at if place == last else further
            places[target], follows[target] = at * shape.width + place, row.pending[place + 1]
            further += place != last
        is_given_one = is_choosing(row, fed[at])
        arrays["masks"][at] = next(allowed) if is_given_one else -1
        if is_given_one:
            follows[at] = CHOSEN
            if shape.is_drawing:
                stage_draw(row, arrays["draws"][at], arrays["used"][at])
    beyond = batch.rows[shape.start : shape.start + shape.rows]
    cached[: len(beyond)] = [row.cached for row in beyond]
    return StagedPass(shape, fed, words)


def stage_draw(row: BatchRow, draw: NDArray[np.float64], used: NDArray[np.int32]) -> None:
    """Fill in how a row's token is drawn: its numbers (5), and the bits of all tokens that a repetition penalty lowers."""
    sampling = row.sampling
    top_k = sampling.top_k if sampling.top_k > 0 else math.inf
    draw[:] = (row.draw_point(), sampling.temperature, sampling.top_p, sampling.repetition_penalty, top_k)
    if sampling.repetition_penalty != 1:
        bits = np.zeros(len(used) * 32, np.bool_)
        bits[row.prompt.ids] = True
        bits[row.tokens] = True
        used[:] = np.packbits(bits, bitorder="little").view(np.int32)


def is_choosing(row: BatchRow, fed: int) -> bool:
    """Return whether a pass that takes `fed` pending tokens of a row gives it a new one."""
    return row.outcome is None and fed == len(row.pending)
