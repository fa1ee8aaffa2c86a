"""Window batching for Qwen's vision tower: one attention call for all windows of one size.

transformers 5 calls attention once for each window and image: 2,244 calls for a page of 5,120 patches. Windows do not attend to each
other, so windows of one size can be one batch: a page has at most four sizes (inner, right edge, bottom edge, corner), and a batch of
equal pages has no more than one page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention, apply_rotary_pos_emb_vision
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionAttention

WINDOW_PATCHES = 64
ATTENTIONS = (Qwen3VLVisionAttention, Qwen2_5_VLVisionAttention, VisionAttention)


@dataclass(frozen=True, eq=False)
class WindowLayout:
    """The windows of each size in a packed sequence of patches."""

    sizes: tuple[tuple[int, int], ...]
    """(windows, patches in each), in the order of `order`."""
    order: Tensor | None
    """Patch indices sorted by window size; None when they are in this order already."""
    back: Tensor | None
    """The inverse of `order`."""


def batch_windows(model: nn.Module) -> int:
    """Make every vision attention of `model` batch its windows; return how many there are.

    Only the `forward` of these objects is replaced: weights, outputs (up to rounding) and gradients stay the same. Safe to repeat.
    """
    layout_of = cache_per_pass(arrange_windows)
    found = [module for module in model.modules() if isinstance(module, ATTENTIONS)]
    for module in found:
        module.forward = partial(attend_windows, module, layout_of)  # type: ignore[method-assign]  # this object's, not the class's
    return len(found)


def attend_windows(
    module: Any, layout_of: Callable[[Tensor], WindowLayout], hidden_states: Tensor, cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor], **_: Any,
) -> Tensor:  # fmt: skip
    """Return what the module's own `forward` returns, with one attention call for each window size."""
    layout = layout_of(cu_seqlens)
    cos, sin = position_embeddings
    if layout.order is not None:
        hidden_states, cos, sin = hidden_states[layout.order], cos[layout.order], sin[layout.order]
    patches, heads = hidden_states.shape[0], module.num_heads
    query, key, value = module.qkv(hidden_states).reshape(patches, 3, heads, -1).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
    outputs, start = [], 0
    for windows, size in layout.sizes:
        stop = start + windows * size
        q, k, v = (t[start:stop].unflatten(0, (windows, size)).transpose(1, 2) for t in (query, key, value))
        outputs.append(compute_attention(q, k, v, module.scaling).transpose(1, 2).reshape(windows * size, -1))
        start = stop
    output: Tensor = module.proj(torch.cat(outputs) if len(outputs) > 1 else outputs[0])
    return output if layout.back is None else output[layout.back]


def compute_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return softmax(query · keyᵀ · scale) · value.

    On a CPU windows are computed by plain products: the fused kernel is made for long sequences and takes, for 4,096 windows of 64
    patches, twice as long forward and eight times as long backward (0.19 s instead of 0.025 s, bf16, one core).
    """
    if query.device.type == "cpu" and query.shape[-2] <= WINDOW_PATCHES:
        return torch.softmax((query * scale) @ key.transpose(-1, -2), -1) @ value
    return scaled_dot_product_attention(query, key, value, scale=scale)


def arrange_windows(cu_seqlens: Tensor) -> WindowLayout:
    """Return the layout of windows that are given by their cumulative lengths."""
    bounds = cu_seqlens.tolist()
    starts: dict[int, list[int]] = {}
    for start, stop in pairwise(bounds):
        if stop > start:
            starts.setdefault(stop - start, []).append(start)
    sizes = tuple((len(at), size) for size, at in starts.items())
    if len(sizes) == 1:
        return WindowLayout(sizes, None, None)
    rows = [torch.tensor(at).unsqueeze(1) + torch.arange(size) for size, at in starts.items()]
    order = torch.cat([row.flatten() for row in rows])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return WindowLayout(sizes, order.to(cu_seqlens.device), back.to(cu_seqlens.device))


def cache_per_pass(compute: Callable[[Tensor], WindowLayout]) -> Callable[[Tensor], WindowLayout]:
    """Return `compute` with a cache for one forward pass instead of a call in each layer: reading `cu_seqlens` waits for the GPU.

    A pass uses two tensors, one of windows and one of whole images, and passes the same two objects to every layer.
    """
    kept: list[tuple[Tensor, WindowLayout]] = []

    def layout_of(cu_seqlens: Tensor) -> WindowLayout:
        for seen, layout in kept:
            if seen is cu_seqlens:
                return layout
        layout = compute(cu_seqlens)
        kept.insert(0, (cu_seqlens, layout))
        del kept[2:]
        return layout

    return layout_of
