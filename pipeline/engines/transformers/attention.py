"""Attention of the language model: grouped queries against keys and values that are not copied.

transformers' own `sdpa` repeats keys and values once for each query head of a group as soon as there is a mask and more than one query
token, 7-fold for Qwen2.5-VL-7B. Here the query heads of a group are rows of one matrix instead:

    query (rows, 28 heads, width, 128) -> (rows, 4 heads, 7 x width, 128)      keys (rows, 4 heads, columns, 128), a view of the cache

A row alone, whose width may be thousands of tokens of a prompt, has a mask of one head's size instead of a group's:

    query (1, 28 heads, width, 128) -> (4, 7 heads, width, 128)      keys (4, 7 times the same head, columns, 128), still a view
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pipeline.errors import JobError

NAME = "grouped_sdpa"
"""The name under which transformers finds `attend_grouped`. It has no mask function, so transformers builds no mask of its own."""


def install_attention(network: nn.Module) -> None:
    """Make the language model of `network` use `attend_grouped`; the vision tower keeps its own attention.

    Raises JobError for a model with sliding windows, of which this attention knows nothing.
    """
    untyped: Any = network
    config = untyped.config.get_text_config()
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise JobError("model: its config.json has layers of sliding-window attention, which the engine transformers does not compute")
    AttentionInterface.register(NAME, attend_grouped)
    config._attn_implementation = NAME


def attend_grouped(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Return softmax(query · keyᵀ · scaling + mask) · value as (rows, width, heads, size), and no weights.

    The mask is that of `build_mask`, for a row alone with one group; without a mask, tokens see the tokens before them, and a single token
    sees all.
    """
    rows, heads, width, size = query.shape
    kinds = key.shape[1]
    groups = heads // kinds
    if attention_mask is None and width > 1:
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1)
    elif rows == 1 and width > 1:
        grouped = query.view(kinds, groups, width, size)
        key, value = (states.transpose(0, 1).expand(-1, groups, -1, -1) for states in (key, value))
        output = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling).reshape(query.shape)
    else:
        grouped = query.reshape(rows, kinds, groups * width, size)
        output = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling).view(rows, heads, width, size)
    return output.transpose(1, 2).contiguous(), None


def build_mask(cached: Tensor, width: int, columns: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Return the mask (rows, 1, groups x width, columns) of a pass whose row r puts `width` tokens behind `cached[r]` others.

    Values are 0 where a token sees a column and -inf elsewhere. Each token sees itself, so that no softmax is over nothing.
    """
    last_seen = cached.unsqueeze(1) + torch.arange(width, device=cached.device)
    hidden = torch.arange(columns, device=cached.device) > last_seen.unsqueeze(-1)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=cached.device).masked_fill_(hidden, float("-inf")).unsqueeze(1)
    return mask if width == 1 else mask.repeat(1, 1, groups, 1)
