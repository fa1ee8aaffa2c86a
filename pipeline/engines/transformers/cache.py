"""Key and value cache of the batch: for each layer two buffers (rows, heads, columns, size) that passes write into.

Row r of the buffers belongs to row r of the batch, and its token t is in column t. There is no padding between tokens: what lies behind
a row's tokens is masked, and overwritten by the next ones.

    row 0   prompt prompt prompt t f f t . . .        t: chosen     f: forced     .: free
    row 1   prompt prompt t t . . . . . .

Rows join into free rows at the end, and the last row moves into the place of one that leaves. Buffers grow by `COLUMN_STEP` columns, one
after the other, so that beside the cache never more than one buffer of one layer exists twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

COLUMN_STEP = 256
"""Columns by which buffers grow: growing copies the whole cache, once in so many tokens of an answer."""
VIEW_STEP = 64
"""Columns that a pass sees are a multiple of this: few different shapes, and masks aligned as fused kernels want them."""
KEEP_FACTOR = 4
"""Buffers shrink when they are more than this many times larger than needed."""


@dataclass(frozen=True)
class PassWindow:
    """The part of the buffers that one pass writes and reads."""

    start: int
    stop: int
    columns: int
    """What the pass reads: the first columns."""
    places: tuple[Tensor, Tensor] | None
    """Row (rows, 1) and column (rows, width) of each new token; None for rows that begin, whose tokens begin at column 0."""


class BufferLayer(CacheLayerMixin):
    """The buffers of one layer, in the form in which transformers updates them."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, heads: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys = torch.zeros((0, heads, 0, size), dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.window: PassWindow | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: `KeyValueCache.reserve` makes room."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values (rows, heads, width, size) in place; return those that the pass sees, without a copy."""
        assert self.window is not None
        return write_states(self.keys, key_states, self.window), write_states(self.values, value_states, self.window)

    def get_seq_length(self) -> int:
        """Return the columns of the buffers; rows have lengths of their own."""
        return self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns that a pass reads, and 0."""
        return (self.window.columns if self.window else query_length), 0

    def get_max_length(self) -> int:
        """Return -1: the buffers grow."""
        return -1


class KeyValueCache(Cache):
    """All layers' buffers."""

    def __init__(self, layers: int, heads: int, size: int, dtype: torch.dtype, device: torch.device, max_tokens: int | None = None) -> None:
        """`max_tokens` bounds rows x columns as soon as there are two rows."""
        super().__init__(layers=[BufferLayer(heads, size, dtype, device) for _ in range(layers)])
        self.bytes_per_token = 2 * layers * heads * size * dtype.itemsize
        self.dtype, self.max_tokens = dtype, max_tokens
        self.shape = 0, 0
        """Rows and columns for which every layer has room."""
        self.generation = 0
        """Counts how often buffers were replaced: what was recorded with those of another generation must not be replayed."""

    def fits(self, rows: int, tokens: int) -> bool:
        """Return whether so many rows of so many tokens are allowed."""
        return rows <= 1 or self.max_tokens is None or rows * round_up(tokens, COLUMN_STEP) <= self.max_tokens

    @torch.inference_mode()
    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for so many rows of so many tokens. Raises OutOfMemoryError where they are not allowed or not to be had.

        After an error the cache is as usable as before: every layer has kept what it held.
        """
        if not self.fits(rows, tokens):
            raise torch.OutOfMemoryError(f"{rows} rows of {tokens} tokens exceed the budget of {self.max_tokens} tokens in the cache")
        has_rows, has_columns = self.shape
        if rows <= has_rows and tokens <= has_columns:
            return
        columns = round_up(tokens, COLUMN_STEP)
        wide = max(rows, has_rows), max(columns, has_columns)
        self._resize(*(wide if self.max_tokens is None or wide[0] * wide[1] <= self.max_tokens else (rows, columns)))

    @torch.inference_mode()
    def shrink(self, rows: int, tokens: int) -> None:
        """Release memory that so many rows of so many tokens do not need, if it is most of it."""
        columns = round_up(tokens, COLUMN_STEP) if rows else 0
        has_rows, has_columns = self.shape
        if has_rows * has_columns > KEEP_FACTOR * rows * columns:
            self._resize(rows, columns)

    @torch.inference_mode()
    def move_row(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for _, _, buffer in self._buffers():
            buffer[target].copy_(buffer[source])

    def open_window(self, window: PassWindow) -> None:
        """Say which part of the buffers the next pass uses."""
        for layer in self._own_layers():
            layer.window = window

    def _resize(self, rows: int, columns: int) -> None:
        """Give every buffer this size, one after the other, and keep what fits into it."""
        self.generation += 1
        self.shape = min(rows, self.shape[0]), min(columns, self.shape[1])  # until all have it
        for layer, name, old in self._buffers():
            if old.shape[0] == rows and old.shape[2] == columns:
                continue
            new = old.new_zeros((rows, old.shape[1], columns, old.shape[3]))  # zeros: 0 times what is in free memory could be NaN
            kept_rows, kept_columns = min(rows, old.shape[0]), min(columns, old.shape[2])
            new[:kept_rows, :, :kept_columns] = old[:kept_rows, :, :kept_columns]
            setattr(layer, name, new)
            del old
        self.shape = rows, columns

    def _own_layers(self) -> list[BufferLayer]:
        layers: list[Any] = self.layers
        return layers

    def _buffers(self) -> Iterator[tuple[BufferLayer, str, Tensor]]:
        for layer in self._own_layers():
            for name in ("keys", "values"):
                yield layer, name, getattr(layer, name)


def write_states(buffer: Tensor, states: Tensor, window: PassWindow) -> Tensor:
    """Write the states (rows, heads, width, size) of new tokens into a buffer; return the states that the pass sees."""
    if window.places is None:
        width = states.shape[2]
        buffer[window.start : window.stop, :, :width] = states
        buffer[window.start : window.stop, :, width:] = 0  # an earlier row may have left numbers that are not finite
        return states
    part = buffer[window.start : window.stop]
    part.transpose(1, 2).index_put_(window.places, states.transpose(1, 2))
    return part[:, :, : window.columns]


def round_up(count: int, step: int) -> int:
    """Return the smallest multiple of `step` that is not below `count`."""
    return -(-count // step) * step
