"""Answers being written side by side, and the attention cache they share. Knows no weights and no vocabulary.

A forward pass takes from each row the tokens it has not fed yet: its whole prompt at first, then one token, or one and the
forced ones behind it. Rows that feed fewer are padded on the left, and a mask (`seen`) keeps what they attend to:

    row 0   prompt prompt prompt . . t1  . .  t2        t: chosen     f: forced
    row 1      .   prompt prompt t1 f f  t2 f t3        .: padding, never attended to

so that rows can leave, join and feed different numbers of tokens at any step. `compact` removes padding that all share.
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
"""Padding that is not worth a copy of the cache to be rid of."""


@dataclass(eq=False)
class BatchRow:
    """One answer being written."""

    prompt: EncodedPrompt
    sampling: Sampling
    constraint: Constraint
    room: int
    """How many tokens the answer may have."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """One per token but the last `unscored`, which were forced and whose probabilities the next pass gives."""
    unscored: int = 0
    pending: list[int] = field(default_factory=list)
    """Tokens the model has not been fed."""
    fed: int = 0
    ended: FinishReason | DocumentError | None = None
    """Set when nothing more is to be chosen; the row is finished once nothing is unscored."""
    chance: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.chance.manual_seed(self.sampling.seed)
        self.pending = list(self.prompt.ids)
        self.force()

    def force(self) -> None:
        """Append what the grammar leaves no choice about."""
        forced = self.constraint.take_forced_tokens()
        if len(self.tokens) + len(forced) > self.room:
            forced, self.ended = forced[: self.room - len(self.tokens)], FinishReason.LENGTH
        elif self.constraint.is_done:
            self.ended = FinishReason.STOP
        elif len(self.tokens) + len(forced) == self.room:
            self.ended = FinishReason.LENGTH
        self.tokens += forced
        self.pending += forced
        self.unscored = len(forced)

    def pending_positions(self) -> NDArray[np.int64]:
        """Return (3, pending) positions: the prompt's own, then counting up."""
        start = int(self.prompt.positions.max()) + 1 + max(0, self.fed - len(self.prompt.ids))
        known = self.prompt.positions[:, self.fed :]
        more = np.arange(start, start + len(self.pending) - known.shape[1])
        return np.concatenate([known, np.broadcast_to(more, (3, len(more)))], axis=1)

    @property
    def finished(self) -> bool:
        """Whether the answer and its probabilities are complete, or it failed."""
        return isinstance(self.ended, DocumentError) or (self.ended is not None and not self.unscored)


class Batch:
    """Rows and their cache: per layer keys and values of (rows, heads, columns, width)."""

    def __init__(self, rows: Sequence[BatchRow], cache: Any = None, seen: Tensor | None = None) -> None:
        self.rows = list(rows)
        self.cache: Any = DynamicCache() if cache is None else cache
        self.seen = torch.zeros((len(self.rows), 0), dtype=torch.long) if seen is None else seen
        """(rows, columns): 1 where a column holds a token of this row."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> int:
        """How many tokens and paddings the cache holds for each row."""
        return self.seen.shape[1]

    def inputs(self, filler: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids (rows, width), their mask, and positions (3, rows, width) of what is pending."""
        width = max(len(row.pending) for row in self.rows)
        ids = torch.full((len(self), width), filler)
        mask = torch.zeros((len(self), width), dtype=torch.long)
        positions = torch.zeros((3, len(self), width), dtype=torch.long)
        for at, row in enumerate(self.rows):
            start = width - len(row.pending)
            ids[at, start:] = torch.tensor(row.pending)
            mask[at, start:] = 1
            positions[:, at, start:] = torch.from_numpy(row.pending_positions())
        return ids, mask, positions

    def feed(self, mask: Tensor) -> None:
        """Note that what was pending is in the cache now."""
        self.seen = torch.cat([self.seen, mask.to(self.seen.device)], dim=1)
        for row in self.rows:
            row.fed += len(row.pending)
            row.pending = []

    def rewind(self) -> None:
        """Drop what a pass that broke off has left in some layers."""
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[:, :, : self.columns], layer.values[:, :, : self.columns]

    def keep(self, chosen: Sequence[int]) -> Batch:
        """Return a batch of some rows."""
        index = torch.tensor(list(chosen), dtype=torch.long)
        layers = [(k[index.to(k.device)], v[index.to(v.device)]) for k, v in self._layers()]
        return Batch([self.rows[at] for at in chosen], make_cache(layers), self.seen[index.to(self.seen.device)])

    def join(self, other: Batch) -> Batch:
        """Return one batch of both's rows, the shorter cache padded on the left."""
        columns = max(self.columns, other.columns)
        layers = []
        for mine, theirs in zip(self._layers(), other._layers(), strict=True):
            keys, values = (torch.cat([pad_left(a, columns, -2), pad_left(b, columns, -2)]) for a, b in zip(mine, theirs, strict=True))
            layers.append((keys, values))
        seen = torch.cat([pad_left(self.seen, columns, -1), pad_left(other.seen.to(self.seen.device), columns, -1)])
        return Batch([*self.rows, *other.rows], make_cache(layers), seen)

    def compact(self) -> None:
        """Move each row's tokens to the right and cut columns that no row needs, when there are many."""
        needed = max((row.fed for row in self.rows), default=0)
        if self.columns - needed <= SPARE_COLUMNS:
            return
        index = self.seen.argsort(dim=1, stable=True)[:, self.columns - needed :]
        self.seen = self.seen.gather(1, index)
        layers = []
        for keys, values in self._layers():
            places = index[:, None, :, None].to(keys.device).expand(-1, keys.shape[1], -1, keys.shape[3])
            layers.append((keys.gather(2, places), values.gather(2, places)))
        self.cache = make_cache(layers)

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.keys, layer.values) for layer in self.cache.layers if layer.is_initialized]


def make_cache(layers: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Return a cache that holds these keys and values."""
    cache = DynamicCache()
    for at, (keys, values) in enumerate(layers):
        cache.update(keys, values, at)
    return cache


def pad_left(values: Tensor, columns: int, dim: int) -> Tensor:
    """Pad on the left of the last or the last but one dimension."""
    missing = columns - values.shape[dim]
    return pad(values, (missing, 0) if dim == -1 else (0, 0, missing, 0))
