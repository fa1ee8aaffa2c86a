"""How many attention calls, and how long, takes a page's vision tower, window by window and with batched windows? Needs no weights.

    python benchmarks/vision_windows.py [--width 1280] [--pairs 5]

Calls are counted over the whole tower of Qwen2.5-VL-7B (32 layers) at a small width: they do not depend on it. Times are of two
layers at the given width, one with windows and one without, in alternating pairs, because a shared machine drifts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from pipeline.engines.transformers import vision

DOWN, ACROSS = 80, 64
"""Patches of a page at the default budget: 1120 x 896 px, 5,120 patches, 1,280 visual tokens."""


def main() -> None:
    """Print calls and times of both ways."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    print(f"a page of {DOWN * ACROSS:,} patches; attention calls in 32 layers, 4 of them without windows:")
    calls = [counted(batched) for batched in (False, True)]
    print(f"  window by window {calls[0]:,}, batched {calls[1]}: {calls[0] / calls[1]:.0f} times fewer")
    ratios, times = [], []
    models = [tower(2, options.width, [1], options.device, batched) for batched in (False, True)]
    page = patches(options.device)
    for _ in range(options.pairs + 1):
        pair = [seconds(model, page) for model in models]
        times.append(pair)
        ratios.append(pair[0] / pair[1])
    one, other = (statistics.median(column) for column in zip(*times[1:], strict=True))
    print(f"2 layers of width {options.width} on {options.device}, median of {options.pairs} pairs after a warm-up:")
    print(f"  window by window {one * 1000:.0f} ms, batched {other * 1000:.0f} ms: {statistics.median(ratios[1:]):.2f} times as fast")


def tower(depth: int, width: int, full: list[int], device: str, batched: bool) -> Any:
    """Return a vision tower of random weights."""
    shape = {"depth": depth, "hidden_size": width, "num_heads": 16, "intermediate_size": width * 8 // 3, "fullatt_block_indexes": full}
    config = Qwen2_5_VLConfig(vision_config={**shape, "out_hidden_size": width}).vision_config
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = Qwen2_5_VisionTransformerPretrainedModel(config).to(device).eval()
    if batched:
        vision.batch_windows(model)
    return model


def patches(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one page as the tower takes it."""
    return torch.randn((DOWN * ACROSS, 1176), device=device), torch.tensor([[1, DOWN, ACROSS]], device=device)


@torch.inference_mode()
def seconds(model: Any, page: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return how long one pass takes: the clock's time on a GPU, on a CPU its own, which other processes do not lengthen."""
    clock = time.process_time if page[0].device.type == "cpu" else time.perf_counter
    start_s = clock()
    model(*page).pooler_output.sum().item()  # waits for a GPU
    return clock() - start_s


@torch.inference_mode()
def counted(batched: bool) -> int:
    """Return the attention calls of a whole tower, a narrow one."""
    model = tower(32, 128, [7, 15, 23, 31], "cpu", batched)
    with counting() as calls:
        model(*patches("cpu"))
    return len(calls)


@contextmanager
def counting() -> Iterator[list[None]]:
    """Count what either way calls for attention: the fused kernel, or the products that stand for it on a CPU."""
    calls: list[None] = []

    def count(real: Any) -> Any:
        return lambda *args, **kwargs: (calls.append(None), real(*args, **kwargs))[1]

    ours = mock.patch.object(vision, "attention", count(vision.compute_attention))
    theirs = mock.patch.object(functional, "scaled_dot_product_attention", count(functional.scaled_dot_product_attention))
    with ours, theirs:
        yield calls


if __name__ == "__main__":
    main()
