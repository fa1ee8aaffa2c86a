"""AWQ loader: reads a checkpoint folder in the published AWQ layout into a model of transformers. `demo/quantize.py` writes this layout.

    model.layers.0.mlp.up_proj.qweight  int32 (in, out / 8)      eight 4-bit numbers, columns 0 2 4 6 1 3 5 7 from the lowest bits up
    model.layers.0.mlp.up_proj.qzeros   int32 (in / group, out / 8)
    model.layers.0.mlp.up_proj.scales   fp16  (in / group, out)
    -> model.language_model.layers.0.mlp.up_proj.weight (out, in) = (number - zero) * scale

transformers' own loader of such folders (gptqmodel) converts the vision tower as well and fills it with new random weights, because
it expects names that begin with `visual` and finds `model.visual…`. Here every tensor with a `.qweight` is unpacked, and all others
are taken as stored. Only this file imports autoawq.
"""

from __future__ import annotations

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
"""Numbers in one int32."""


def is_awq(config: Any) -> bool:
    """Return whether a checkpoint's config describes the layout that is read here.

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

    By default the weights are converted to `dtype`, which is as fast at the usual batch sizes. `keep_int4` leaves them packed, in
    autoawq's `WQLinear_GEMM` (NVIDIA GPUs), which saves three quarters of the language model's memory. Raises JobError.
    """
    group_size = int(config.quantization_config["group_size"])
    config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with init_empty_weights():
        model: nn.Module = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    wanted = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    incomplete: dict[str, dict[str, Tensor]] = {}
    for name, tensor in iterate_tensors(folder, device):
        layer, _, kind = name.rpartition(".")
        if kind in ("qweight", "qzeros", "scales"):
            packed = incomplete.setdefault(layer, {})
            packed[kind] = tensor
            if len(packed) == 3:
                weight_name = convert_published_name(f"{layer}.weight", wanted)
                unpack_layer(model, weight_name, incomplete.pop(layer), group_size, dtype, keep_int4)
        else:
            assign_parameter(model, convert_published_name(name, wanted), tensor.to(dtype))
    model.tie_weights()  # type: ignore[operator]
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty or incomplete:
        raise JobError(
            f"{folder}: the checkpoint lacks weights: {', '.join([*empty, *incomplete][:5])} (of {len(empty) + len(incomplete)})"
        )
    return model.to(device).eval()


def iterate_tensors(folder: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the tensor of every entry of a folder's safetensors files. Raises JobError."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise JobError(f"{folder}: no .safetensors files found; other weight files are not read")
    for file in files:
        try:
            with safe_open(file, "pt", device=str(device)) as opened:
                for name in opened.keys():  # noqa: SIM118  not a mapping
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise JobError(f"{file} is damaged: {error}") from None


def convert_published_name(published: str, wanted: set[str]) -> str:
    """Return the name in the model of a tensor with a published name: `model.language_model.layers.0…` for `model.layers.0…`."""
    language = published.replace("model.", "model.language_model.", 1)
    for name in (published, language, f"model.{published}"):
        if name in wanted:
            return name
    raise JobError(f"the checkpoint holds {published}, which its architecture does not have")


def unpack_layer(model: nn.Module, name: str, packed: dict[str, Tensor], group_size: int, dtype: torch.dtype, keep_int4: bool) -> None:
    """Set the weights of one quantized layer, dequantized or packed."""
    layer_name = name.removesuffix(".weight")
    if keep_int4:
        model.set_submodule(layer_name, make_packed_layer(model.get_submodule(layer_name), packed, group_size))
        return
    weight = dequantize_weight(packed["qweight"], packed["qzeros"], packed["scales"], group_size)
    assign_parameter(model, name, weight.t().contiguous().to(dtype))


def assign_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set the parameter of this name. Raises JobError for a tensor of another shape."""
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
    """Return the weight (in, out) in the scales' dtype, without rounding."""
    weight: Tensor = import_autoawq("dequantize_gemm")(qweight, qzeros, scales, BITS, group_size)
    return weight


def make_packed_layer(linear: Any, packed: dict[str, Tensor], group_size: int) -> nn.Module:
    """Return autoawq's layer that multiplies by packed weights."""
    device = packed["qweight"].device
    layer: nn.Module = import_autoawq("WQLinear_GEMM")(
        BITS, group_size, linear.in_features, linear.out_features, linear.bias is not None, device
    )
    for kind, tensor in packed.items():
        setattr(layer, kind, tensor)
    if linear.bias is not None:  # loaded already, or still empty
        layer.bias = linear.bias.data
    return layer


def import_autoawq(name: str) -> Any:
    """Return a class or function of autoawq, imported on first use.

    Importing any part of it imports all of its model classes (0.8 s after transformers), warns that the project is archived, which
    users cannot change, and sets a warnings filter for the whole process; the filters are restored here. Its kernels in Triton are used,
    also where those of autoawq-kernels are installed: some of these run on the default stream whatever the current one is
    (casper-hansen/AutoAWQ_kernels#23), and so neither wait for the engine's other kernels nor become part of a CUDA graph.
    """
    with warnings.catch_warnings(record=True):
        from awq.modules.linear import gemm

        gemm.awq_ext = None
        return getattr(gemm, name)
