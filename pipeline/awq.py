"""A folder in the published AWQ layout <-> weights. Knows nothing of prompts and pages; the only door to autoawq.

    model.layers.0.mlp.up_proj.qweight  int32 (in, out / 8)      eight 4-bit numbers, columns 0 2 4 6 1 3 5 7 from the lowest bits up
    model.layers.0.mlp.up_proj.qzeros   int32 (in / group, out / 8)
    model.layers.0.mlp.up_proj.scales   fp16  (in / group, out)
    -> model.language_model.layers.0.mlp.up_proj.weight (out, in) = (number - zero) * scale

transformers' own way to such a folder (gptqmodel) converts the vision tower as well and fills it with fresh random weights, since
it looks for `visual` only at the start of `model.visual…`. Here whatever has a `.qweight` is unpacked, and everything else is as stored.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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


def load(folder: Path, config: Any, dtype: torch.dtype, device: torch.device, keep_int4: bool = False) -> nn.Module:
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
    for name, tensor in tensors(folder, device):
        layer, _, kind = name.rpartition(".")
        if kind in ("qweight", "qzeros", "scales"):
            packed = left.setdefault(layer, {})
            packed[kind] = tensor
            if len(packed) == 3:
                unpack(model, own_name(f"{layer}.weight", wanted), left.pop(layer), group_size, dtype, keep_int4)
        else:
            assign(model, own_name(name, wanted), tensor.to(dtype))
    model.tie_weights()  # type: ignore[operator]
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty or left:
        raise JobError(f"{folder}: the checkpoint lacks weights: {', '.join([*empty, *left][:5])} (of {len(empty) + len(left)})")
    return model.to(device).eval()


def tensors(folder: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
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


def own_name(published: str, wanted: set[str]) -> str:
    """Return the model's own name of a published tensor: `model.layers.0…` is `model.language_model.layers.0…` in transformers 5."""
    language = published.replace("model.", "model.language_model.", 1)
    for name in (published, language, f"model.{published}"):
        if name in wanted:
            return name
    raise JobError(f"the checkpoint holds {published}, which its architecture does not have")


def unpack(model: nn.Module, name: str, packed: dict[str, Tensor], group_size: int, dtype: torch.dtype, keep_int4: bool) -> None:
    """Put a quantized layer's weights in place, dequantized or packed."""
    layer_name = name.removesuffix(".weight")
    if keep_int4:
        model.set_submodule(layer_name, packed_layer(model.get_submodule(layer_name), packed, group_size))
        return
    weight = dequantize(packed["qweight"], packed["qzeros"], packed["scales"], group_size)
    assign(model, name, weight.t().contiguous().to(dtype))


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
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


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Return (in, out) weights in the scales' dtype, exactly."""
    from_packed = autoawq("dequantize_gemm")
    weight: Tensor = from_packed(qweight, qzeros, scales, BITS, group_size)
    return weight


def packed_layer(linear: Any, packed: dict[str, Tensor], group_size: int) -> nn.Module:
    """Return autoawq's layer that multiplies with packed weights."""
    device = packed["qweight"].device
    layer: nn.Module = autoawq("WQLinear_GEMM")(BITS, group_size, linear.in_features, linear.out_features, linear.bias is not None, device)
    for kind, tensor in packed.items():
        setattr(layer, kind, tensor)
    if linear.bias is not None:  # read already, or empty until it is
        layer.bias = linear.bias.data
    return layer


def autoawq(name: str) -> Any:
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


def quantize(folder_in: Path, folder_out: Path, group_size: int = 128, moments: Mapping[str, Tensor] | None = None) -> None:
    """Write a checkpoint's AWQ copy: the language model's layers rounded to 4 bits, all else to fp16.

    Each weight becomes the nearest of 16 steps per group of inputs. `moments`, by published name, are the sums of x xᵀ over
    inputs x that a layer was seen with, (in, in): where they are given, what rounding does to an answer is made up for by the
    weights that are rounded later. Files that are not weights are copied.
    """
    config = json.loads((folder_in / "config.json").read_text())
    if "quantization_config" in config:
        raise JobError(f"{folder_in}: is quantized already, by {config['quantization_config'].get('quant_method')!r}")
    folder_out.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for file in sorted(folder_in.glob("*.safetensors")):
        written: dict[str, Tensor] = {}
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                named = published_name(name)
                written |= stored(named, opened.get_tensor(name), group_size, (moments or {}).get(named))
        save_file(written, folder_out / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(written, file.name)
    if len(set(weight_map.values())) > 1:
        (folder_out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
    for file in folder_in.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(file, folder_out / file.name)
    block = {"quant_method": "awq", "version": "gemm", "bits": BITS, "group_size": group_size, "zero_point": True}
    config |= {"quantization_config": {**block, "modules_to_not_convert": ["visual"]}}
    config |= {key: "float16" for key in ("dtype", "torch_dtype") if key in config}
    (folder_out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def published_name(name: str) -> str:
    """Return the name that published folders use for a tensor."""
    return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)


def stored(name: str, tensor: Tensor, group_size: int, moment: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors that an AWQ folder holds for one of a plain folder's."""
    if not QUANTIZED.fullmatch(name):
        return {name: tensor.half().contiguous()}
    if tensor.shape[1] % group_size or tensor.shape[0] % PACKED:
        raise JobError(
            f"{name}: {tensor.shape[1]} inputs and {tensor.shape[0]} outputs cannot be quantized;"
            f" inputs must be a multiple of the group size {group_size}, outputs of {PACKED}"
        )
    weight = tensor.float().t()
    numbers, zeros, scales = rounded(weight, group_size) if moment is None else compensated(weight, group_size, moment)
    layer = name.removesuffix(".weight")
    return {f"{layer}.qweight": pack(numbers), f"{layer}.qzeros": pack(zeros), f"{layer}.scales": scales}


def rounded(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return 4-bit numbers (in, out), zeros and scales (in / group, out) of a weight (in, out)."""
    groups = weight.reshape(-1, group_size, weight.shape[1])
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    top = 2**BITS - 1
    scales = ((high - low) / top).clamp(min=1e-5).half()
    exact = scales.float()
    zeros = (-low / exact).round().clamp(0, top)
    numbers = (groups / exact.unsqueeze(1)).round().add(zeros.unsqueeze(1)).clamp(0, top)
    return numbers.flatten(0, 1).int(), zeros.int(), scales


def compensated(weight: Tensor, group_size: int, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as `rounded`, each row's error made up for by the rows behind it, as inputs with this moment have it.

    Row by row with the Cholesky factor of the inverse moment (Frantar et al., GPTQ, arXiv:2210.17323, algorithm 1).
    """
    left = weight.double().clone()
    damped = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    share = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    numbers, zeros, scales = torch.empty_like(weight), [], []
    for row in range(len(left)):
        if row % group_size == 0:
            _, zero, scale = rounded(left[row : row + group_size].float(), group_size)
            zeros.append(zero)
            scales.append(scale)
        step = scales[-1][0].double()
        numbers[row] = (left[row] / step).round().add(zeros[-1][0]).clamp(0, 2**BITS - 1)
        error = (left[row] - (numbers[row] - zeros[-1][0]) * step) / share[row, row]
        left[row + 1 :] -= share[row, row + 1 :].unsqueeze(1) * error
    return numbers.int(), torch.cat(zeros), torch.cat(scales)


def pack(numbers: Tensor) -> Tensor:
    """Put eight neighbouring 4-bit columns into one int32, in the published order."""
    eight = numbers.int().reshape(len(numbers), -1, PACKED)
    packed = torch.zeros(eight.shape[:2], dtype=torch.int32)
    for nibble, column in enumerate(ORDER):
        packed |= eight[:, :, column] << (BITS * nibble)
    return packed
