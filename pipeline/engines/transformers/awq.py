"""A folder in the published AWQ layout <-> weights. Knows nothing of prompts and pages; the only door to autoawq.

    model.layers.0.mlp.up_proj.qweight  int32 (in, out / 8)      eight 4-bit numbers, columns 0 2 4 6 1 3 5 7 from the lowest bits up
    model.layers.0.mlp.up_proj.qzeros   int32 (in / group, out / 8)
    model.layers.0.mlp.up_proj.scales   fp16  (in / group, out)
    -> model.language_model.layers.0.mlp.up_proj.weight (out, in) = (number - zero) * scale

transformers' own way to such a folder (gptqmodel) converts the vision tower as well and fills it with fresh random weights, since
it looks for `visual` only at the start of `model.visual…`. Here whatever has a `.qweight` is unpacked, and everything else is as stored.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from pipeline.errors import JobError

BITS = 4
PACKED = 32 // BITS
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns stands in the n-th lowest four bits."""
QUANTIZED = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
"""Published names of the layers that AWQ folders quantize; embeddings, `lm_head` and the vision tower stay 16-bit."""


def is_awq(config: Any) -> bool:
    """Say whether a checkpoint's config describes the layout read here.

    Raises JobError for any other quantization.
    """
    block = getattr(config, "quantization_config", None)
    if not block:
        return False
    found = {key: block.get(key) for key in ("quant_method", "version", "bits")}
    if found["quant_method"] != "awq" or str(found["version"]).lower() != "gemm" or found["bits"] != BITS:
        raise JobError(f"model: its config.json says {found}; allowed are no quantization and awq, version gemm, 4 bits")
    return True


def load_awq_model(folder: Path, config: Any, dtype: torch.dtype, device: torch.device, keep_int4: bool = False) -> nn.Module:
    """Return the model of an AWQ folder on a device.

    By default its weights become `dtype`: at batch sizes that matter that is as fast. `keep_int4` leaves them packed, in
    autoawq's `WQLinear_GEMM` (NVIDIA GPUs), which saves three quarters of the language model's memory.
    """
    group_size = int(config.quantization_config["group_size"])
    config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with init_empty_weights():
        model: nn.Module = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    wanted = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    left: dict[str, dict[str, Tensor]] = {}
    for name, tensor in iterate_tensors(folder, device):
        layer, _, kind = name.rpartition(".")
        if kind in ("qweight", "qzeros", "scales"):
            packed = left.setdefault(layer, {})
            packed[kind] = tensor
            if len(packed) == 3:
                unpack_layer(model, convert_published_name(f"{layer}.weight", wanted), left.pop(layer), group_size, dtype, keep_int4)
        else:
            assign_parameter(model, convert_published_name(name, wanted), tensor.to(dtype))
    model.tie_weights()  # type: ignore[operator]
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty or left:
        raise JobError(f"{folder}: the checkpoint lacks weights: {', '.join([*empty, *left][:5])} (of {len(empty) + len(left)})")
    return model.to(device).eval()


def iterate_tensors(folder: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a folder's safetensors files with its name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise JobError(f"{folder}: no .safetensors files found; other weight files are not read")
    for file in files:
        try:
            with safe_open(file, "pt", device=str(device)) as opened:
                for name in opened.keys():  # noqa: SIM118  a safe_open is no mapping
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise JobError(f"{file}: damaged: {error}") from None


def convert_published_name(published: str, wanted: set[str]) -> str:
    """Return the model's own name of a published tensor: `model.layers.0…` is `model.language_model.layers.0…` in transformers 5."""
    language = published.replace("model.", "model.language_model.", 1)
    for name in (published, language, f"model.{published}"):
        if name in wanted:
            return name
    raise JobError(f"the checkpoint holds {published}, which its architecture does not have")


def unpack_layer(model: nn.Module, name: str, packed: dict[str, Tensor], group_size: int, dtype: torch.dtype, keep_int4: bool) -> None:
    """Put a quantized layer's weights in place, dequantized or packed."""
    layer_name = name.removesuffix(".weight")
    if keep_int4:
        model.set_submodule(layer_name, make_packed_layer(model.get_submodule(layer_name), packed, group_size))
        return
    weight = dequantize_weight(packed["qweight"], packed["qzeros"], packed["scales"], group_size)
    assign_parameter(model, name, weight.t().contiguous().to(dtype))


def assign_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the parameter of this name, checking its shape."""
    layer_name, _, kind = name.rpartition(".")
    layer = model.get_submodule(layer_name)
    old = getattr(layer, kind)
    if old.shape != tensor.shape:
        raise JobError(f"the checkpoint's {name} is {tuple(tensor.shape)}, its config.json asks for {tuple(old.shape)}")
    if isinstance(old, nn.Parameter):
        setattr(layer, kind, nn.Parameter(tensor, requires_grad=False))
    else:  # the bias of a packed layer
        setattr(layer, kind, tensor)


def dequantize_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Return (in, out) weights in the scales' dtype, exactly."""
    from_packed = import_autoawq("dequantize_gemm")
    weight: Tensor = from_packed(qweight, qzeros, scales, BITS, group_size)
    return weight


def make_packed_layer(linear: Any, packed: dict[str, Tensor], group_size: int) -> nn.Module:
    """Return autoawq's layer that multiplies with packed weights."""
    device = packed["qweight"].device
    layer: nn.Module = import_autoawq("WQLinear_GEMM")(
        BITS, group_size, linear.in_features, linear.out_features, linear.bias is not None, device
    )
    for kind, tensor in packed.items():
        setattr(layer, kind, tensor)
    if linear.bias is not None:  # read already, or empty until it is
        layer.bias = linear.bias.data
    return layer


def import_autoawq(name: str) -> Any:
    """Return one object of autoawq's.

    Importing any part of it imports all of its model classes (0.8 s after transformers), warns that it is archived, which users cannot
    help, and sets a warnings filter for the whole process; hence so late, and with the filters put back.
    """
    with warnings.catch_warnings(record=True):
        if name == "WQLinear_GEMM":
            from awq.modules.linear.gemm import WQLinear_GEMM as found
        else:
            from awq.utils.packing_utils import dequantize_gemm as found
    return found
