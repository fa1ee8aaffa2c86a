"""Batch of answers in progress and their shared attention cache.

A forward pass takes each row's pending tokens: its whole prompt at first, then one token, or one and the forced tokens after it.
Rows with fewer pending tokens are padded on the left, and a mask (`seen`) marks the columns that hold a token of the row:

    row 0   prompt prompt prompt . . t1  . .  t2        t: chosen     f: forced
    row 1      .   prompt prompt t1 f f  t2 f t3        .: padding, never attended to

So rows can leave, join and take different numbers of tokens at any step. `compact` removes padding that all rows share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from pipeline.engines.encoding import EncodedPrompt
from pipeline.errors import DocumentError
from pipeline.records import FinishReason, Sampling
from pipeline.schema.grammar import Constraint

SPARE_COLUMNS = 64
"""Shared padding that `compact` leaves: removing it copies the whole cache."""


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
    unscored: int = 0
    pending: list[int] = field(default_factory=list)
    """Tokens that are not in the cache yet."""
    cached: int = 0
    """Tokens that are in the cache."""
    outcome: FinishReason | DocumentError | None = None
    """Set when no further token is chosen; the row is finished once nothing is unscored."""
    generator: torch.Generator = field(default_factory=torch.Generator)

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
    """Rows and their attention cache: for each layer keys and values (rows, heads, columns, width)."""

    def __init__(self, rows: Sequence[BatchRow], cache: Any = None, seen: Tensor | None = None) -> None:
        self.rows = list(rows)
        self.cache: Any = DynamicCache() if cache is None else cache
        self.seen = torch.zeros((len(self.rows), 0), dtype=torch.long) if seen is None else seen
        """(rows, columns): 1 where a column holds a token of this row."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> int:
        """Length of the cache: tokens and padding."""
        return self.seen.shape[1]

    def build_inputs(self, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pending tokens' ids (rows, width), mask (rows, width) and positions (3, rows, width), padded on the left."""
        width = max(len(row.pending) for row in self.rows)
        ids = torch.full((len(self), width), pad_id)
        mask = torch.zeros((len(self), width), dtype=torch.long)
        positions = torch.zeros((3, len(self), width), dtype=torch.long)
        for at, row in enumerate(self.rows):
            start = width - len(row.pending)
            ids[at, start:] = torch.tensor(row.pending)
            mask[at, start:] = 1
            positions[:, at, start:] = torch.from_numpy(row.compute_pending_positions())
        return ids, mask, positions

    def mark_cached(self, mask: Tensor) -> None:
        """Record that a pass has put the pending tokens into the cache; `mask` (rows, width) is that of `build_inputs`."""
        self.seen = torch.cat([self.seen, mask.to(self.seen.device)], dim=1)
        for row in self.rows:
            row.cached += len(row.pending)
            row.pending = []

    def rewind(self) -> None:
        """Remove what a failed pass has added to the cache of some layers."""
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[:, :, : self.columns], layer.values[:, :, : self.columns]

    def select(self, chosen: Sequence[int]) -> Batch:
        """Return a batch of the rows with these indices."""
        index = torch.tensor(list(chosen), dtype=torch.long)
        layers = [(k[index.to(k.device)], v[index.to(v.device)]) for k, v in self._layers()]
        return Batch([self.rows[at] for at in chosen], make_cache(layers), self.seen[index.to(self.seen.device)])

    def join(self, other: Batch) -> Batch:
        """Return one batch with the rows of both, the shorter cache padded on the left."""
        columns = max(self.columns, other.columns)
        layers = []
        for mine, theirs in zip(self._layers(), other._layers(), strict=True):
            keys, values = (torch.cat([pad_left(a, columns, -2), pad_left(b, columns, -2)]) for a, b in zip(mine, theirs, strict=True))
            layers.append((keys, values))
        seen = torch.cat([pad_left(self.seen, columns, -1), pad_left(other.seen.to(self.seen.device), columns, -1)])
        return Batch([*self.rows, *other.rows], make_cache(layers), seen)

    def compact(self) -> None:
        """Move each row's tokens to the right and remove the columns that no row needs, if there are more than `SPARE_COLUMNS`."""
        needed = max((row.cached for row in self.rows), default=0)
        if self.columns - needed <= SPARE_COLUMNS:
            return
        index = self.seen.argsort(dim=1, stable=True)[:, self.columns - needed :]
        self.seen = self.seen.gather(1, index)
        layers = []
        for keys, values in self._layers():
            positions = index[:, None, :, None].to(keys.device).expand(-1, keys.shape[1], -1, keys.shape[3])
            layers.append((keys.gather(2, positions), values.gather(2, positions)))
        self.cache = make_cache(layers)

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.keys, layer.values) for layer in self.cache.layers if layer.is_initialized]


def make_cache(layers: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Return a cache with these keys and values, one pair for each layer."""
    cache = DynamicCache()
    for at, (keys, values) in enumerate(layers):
        cache.update(keys, values, at)
    return cache


def pad_left(values: Tensor, columns: int, dim: int) -> Tensor:
    """Pad with zeros on the left of dimension -1 or -2, to a length of `columns`."""
    missing = columns - values.shape[dim]
    return pad(values, (missing, 0) if dim == -1 else (0, 0, missing, 0))
