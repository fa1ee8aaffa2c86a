"""Window batching: same outputs and gradients as one attention call per window, with fewer calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from pipeline.engines.transformers import vision
from pipeline.engines.transformers.vision import batch_windows

ONE_PAGE = [[1, 84, 62]]  # 1176 x 868 px: windows of all four sizes
EQUAL_PAGES = [[1, 16, 16]] * 3
MIXED_PAGES = [[1, 10, 34], [1, 16, 20], [1, 6, 6]]


def build_tower() -> Any:
    small = {"depth": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": 32, "fullatt_block_indexes": [3]}
    config = Qwen2_5_VLConfig(vision_config=small).vision_config
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return Qwen2_5_VisionTransformerPretrainedModel(config)


def draw_patches(grids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    grid = torch.tensor(grids)
    return torch.randn((int(grid.prod(1).sum()), 1176), generator=torch.Generator().manual_seed(1)), grid


@pytest.mark.parametrize("grids", [ONE_PAGE, EQUAL_PAGES, MIXED_PAGES])
def test_outputs_are_the_same(grids: list[list[int]]) -> None:
    model, (pixels, grid) = build_tower(), draw_patches(grids)
    with torch.no_grad():
        before = model(pixels, grid).pooler_output
        batch_windows(model)
        torch.testing.assert_close(model(pixels, grid).pooler_output, before, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_same() -> None:
    gradients = []
    for batched in (False, True):
        model, (pixels, grid) = build_tower(), draw_patches(MIXED_PAGES)
        if batched:
            batch_windows(model)
        model(pixels, grid).pooler_output.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("grids", "calls_per_window_layer"), [(ONE_PAGE, 4), (EQUAL_PAGES, 1), (EQUAL_PAGES * 4, 1)])
def test_one_call_per_window_size_and_layer(grids: list[list[int]], calls_per_window_layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    attention = vision.compute_attention
    monkeypatch.setattr(vision, "compute_attention", lambda q, *rest: (calls.append(q.shape), attention(q, *rest))[1])
    model = build_tower()
    batch_windows(model)
    with torch.no_grad():
        model(*draw_patches(grids))
    assert len(calls) == 3 * calls_per_window_layer + 1


def test_qwen2_vl_whose_attention_has_no_windows_batches_equal_images() -> None:
    config = Qwen2VLConfig(vision_config={"depth": 2, "embed_dim": 64, "num_heads": 4, "hidden_size": 32}).vision_config
    config._attn_implementation = "sdpa"
    model, (pixels, grid) = Qwen2VisionTransformerPretrainedModel(config), draw_patches(EQUAL_PAGES)
    with torch.no_grad():
        before = model(pixels, grid).pooler_output
        assert batch_windows(model) == 2
        torch.testing.assert_close(model(pixels, grid).pooler_output, before, rtol=1e-5, atol=1e-5)


def test_other_instances_of_the_same_class_are_left_alone() -> None:
    changed, other = build_tower(), build_tower()
    assert batch_windows(changed) == 4
    assert "forward" in vars(changed.blocks[0].attn)
    assert "forward" not in vars(other.blocks[0].attn)
