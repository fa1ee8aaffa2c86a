"""AWQ written and read back: names, layout and values of the quantized weights, and an unchanged vision tower."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from pipeline.demo import quantize
from pipeline.engines.transformers import awq
from pipeline.errors import JobError
from tests.support import tiny_checkpoint

CPU = torch.device("cpu")
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.build_checkpoint(tmp_path_factory.mktemp("plain"), dtype=torch.float16)


@pytest.fixture(scope="module")
def quantized(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("awq")
    quantize.quantize_checkpoint(plain, folder)
    return folder


def load_awq(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    return awq.load_awq_model(folder, AutoConfig.from_pretrained(folder), dtype, CPU, **kwargs)


def load_reference(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def compute_logits(model: Any) -> torch.Tensor:
    """Return a model's logits for a fixed prompt with one image of 4 x 6 visual tokens."""
    ids = torch.randint(0, 90, (1, 60), generator=torch.Generator().manual_seed(1))
    ids[0, 10:34] = model.config.image_token_id
    pixels = torch.randn((96, 1176), generator=torch.Generator().manual_seed(2))
    result: torch.Tensor = model(input_ids=ids, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 8, 12]])).logits
    return result


def round_by_loop(weight: torch.Tensor, group: int = 128) -> torch.Tensor:
    """Return a weight (out, in) rounded to 16 steps per group, one number at a time."""
    result = weight.float().clone()
    for row in result:
        for part in row.split(group):
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            scale = float(torch.tensor((high - low) / 15).half())
            zero = round(-low / scale)
            part.copy_(torch.tensor([(min(15, max(0, round(float(x) / scale) + zero)) - zero) * scale for x in part]))
    return result


def test_the_copy_has_the_originals_logits_within_quantization_error(plain: Path, quantized: Path) -> None:
    before, after = compute_logits(load_reference(plain)), compute_logits(load_awq(quantized))
    assert 0 < (before - after).std() < 0.35 * before.std()
    assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.94


def test_the_copy_has_the_logits_of_the_original_with_rounded_weights(plain: Path, quantized: Path) -> None:
    model = load_reference(plain)
    for name, parameter in model.named_parameters():
        if quantize.QUANTIZED.fullmatch(name.replace("model.language_model.", "model.")):
            parameter.data = round_by_loop(parameter.data).half().float()
    torch.testing.assert_close(compute_logits(load_awq(quantized)), compute_logits(model), rtol=1e-4, atol=1e-4)


def test_the_vision_tower_is_bit_equal(plain: Path, quantized: Path) -> None:
    before, after = load_reference(plain).model.visual.state_dict(), load_awq(quantized).model.visual.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_everything_that_is_not_rounded_is_bit_equal(plain: Path, quantized: Path) -> None:
    before, after = load_file(plain / "model.safetensors"), load_file(quantized / "model.safetensors")
    kept = [name for name in before if not quantize.QUANTIZED.fullmatch(name)]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"} <= set(kept)
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_names_shapes_and_types_are_the_published_ones(quantized: Path) -> None:
    with safe_open(quantized / "model.safetensors", "pt") as file:
        found = {kind: file.get_tensor(f"{UP}.{kind}") for kind in ("qweight", "qzeros", "scales")}
        assert f"{UP}.weight" not in file.keys()  # noqa: SIM118  a safe_open is no mapping
    assert {kind: (tensor.dtype, tuple(tensor.shape)) for kind, tensor in found.items()} == {
        "qweight": (torch.int32, (128, 32)),
        "qzeros": (torch.int32, (1, 32)),
        "scales": (torch.float16, (1, 256)),
    }


def test_the_config_is_the_published_one(quantized: Path) -> None:
    config = json.loads((quantized / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True, "modules_to_not_convert": ["visual"],
    }  # fmt: skip
    assert (quantized / "tokenizer.json").is_file()


def test_eight_columns_share_an_integer_in_the_published_order() -> None:
    (packed,) = quantize.pack_columns(torch.arange(8).reshape(1, 8)).tolist()
    assert hex(packed[0]) == "0x75316420"


def test_autoawq_unpacks_what_is_packed_here() -> None:
    numbers = torch.randint(0, 16, (4, 16), generator=torch.Generator().manual_seed(0))
    zeros, scales = torch.full((1, 16), 8), torch.full((1, 16), 0.5, dtype=torch.float16)
    weight = awq.dequantize_weight(quantize.pack_columns(numbers), quantize.pack_columns(zeros), scales, 4)
    assert torch.equal(weight, ((numbers - 8) * 0.5).half())


def test_rounding_is_below_half_a_step(plain: Path, quantized: Path) -> None:
    weight = load_file(plain / "model.safetensors")[f"{UP}.weight"].float()
    stored = load_file(quantized / "model.safetensors")
    back = awq.dequantize_weight(*(stored[f"{UP}.{kind}"] for kind in ("qweight", "qzeros", "scales")), 128)
    step = stored[f"{UP}.scales"].float().t().repeat_interleave(128, dim=1)
    assert ((back.t().float() - weight).abs() / step).max() <= 0.51


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    quantize.quantize_checkpoint(tiny_checkpoint.build_checkpoint(tmp_path / "tied", tied=True), tmp_path / "awq")
    model = load_awq(tmp_path / "awq")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_layers_stay_packed_and_multiply_alike(quantized: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_awq(quantized, dtype, keep_int4=True)
    layer = model.model.language_model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "WQLinear_GEMM"
    monkeypatch.setattr("awq.modules.linear.gemm.TRITON_AVAILABLE", False)  # its kernels need a GPU; the plain way is the same sum
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the plain way is slow
        packed = compute_logits(model).float()
    tolerance = 0.05 if dtype == torch.float16 else 0.3  # bfloat16 has three bits less
    torch.testing.assert_close(packed, compute_logits(load_awq(quantized, dtype)).float(), rtol=0.05, atol=tolerance)


def test_kernels_that_ignore_the_current_stream_are_left_aside(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """autoawq prefers those of autoawq-kernels, where they are installed, to its own in Triton."""
    monkeypatch.setattr("awq.modules.linear.gemm.awq_ext", "autoawq-kernels")
    layer = load_awq(quantized, torch.float16, keep_int4=True).model.language_model.layers[0].mlp.up_proj
    assert sys.modules[type(layer).__module__].awq_ext is None


def test_importing_autoawq_restores_the_warning_filters(quantized: Path) -> None:
    before = list(warnings.filters)
    awq.import_autoawq("dequantize_gemm")
    assert warnings.filters == before


def test_layers_that_groups_do_not_divide_are_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"down_proj.*256 inputs.*group size 96"):
        quantize.quantize_checkpoint(plain, tmp_path, group_size=96)


def test_a_quantized_checkpoint_is_not_quantized_again(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="already, by 'awq'"):
        quantize.quantize_checkpoint(quantized, tmp_path)


@pytest.mark.parametrize(("missing", "named"), [("visual.merger.ln_q.weight", "visual.merger"), (f"{UP}.scales", "mlp.up_proj")])
def test_a_missing_weight_is_named_and_not_replaced(quantized: Path, tmp_path: Path, missing: str, named: str) -> None:
    folder = Path(shutil.copytree(quantized, tmp_path / "damaged"))
    weights = load_file(folder / "model.safetensors")
    del weights[missing]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(JobError, match=f"lacks weights: .*{named}"):
        load_awq(folder)


def test_other_quantizations_are_refused_by_name() -> None:
    class Config:
        quantization_config: dict[str, object] = {"quant_method": "gptq", "bits": 4}  # noqa: RUF012

    with pytest.raises(JobError, match=r"gptq.*allowed are no quantization and awq"):
        awq.is_awq(Config())


def test_compensated_rounding_reduces_the_error_on_the_given_inputs() -> None:
    """The inputs are near a subspace of 8 of 256 dimensions, which rounding each weight to the nearest step ignores."""
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 64, generator=chance)
    inputs = torch.randn(512, 8, generator=chance) @ torch.randn(8, 256, generator=chance) + 0.1 * torch.randn(512, 256, generator=chance)

    def error(numbers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> float:
        kept = awq.dequantize_weight(quantize.pack_columns(numbers), quantize.pack_columns(zeros), scales, 128)
        return float((inputs @ (kept.float() - weight)).pow(2).mean())

    assert error(*quantize.round_with_compensation(weight, 128, inputs.T @ inputs)) < 0.2 * error(*quantize.round_weight(weight, 128))
