"""AWQ writer: rounds a checkpoint to 4 bits and writes it in the published AWQ layout, which `engines/transformers/awq.py` reads.

    model.language_model.layers.0.mlp.up_proj.weight (out, in)
    -> model.layers.0.mlp.up_proj.qweight  int32 (in, out / 8)      eight 4-bit numbers, columns 0 2 4 6 1 3 5 7 from the lowest bits up
       model.layers.0.mlp.up_proj.qzeros   int32 (in / group, out / 8)
       model.layers.0.mlp.up_proj.scales   fp16  (in / group, out)       weight = (number - zero) * scale

Only the linear layers of the language model are quantized; embeddings, `lm_head` and the vision tower are stored as fp16.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.engines.transformers.awq import BITS, PACKED
from pipeline.errors import JobError

COLUMN_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The n-th lowest four bits of an int32 hold this one of eight neighbouring columns."""
QUANTIZED = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
"""Published names of the weights that are quantized."""


def quantize_checkpoint(folder_in: Path, folder_out: Path, group_size: int = 128, moments: Mapping[str, Tensor] | None = None) -> None:
    """Write an AWQ copy of a checkpoint: the language model's linear layers as 4-bit numbers, all other tensors as fp16.

    Each weight is rounded to the nearest of 16 steps of its group of inputs. `moments` are, by published name, the sums of x xᵀ
    (in, in) over sample inputs x of a layer: where they are given, the weights that are rounded later compensate for the error of
    the earlier ones. Files that are not weights are copied. Raises JobError for a quantized checkpoint or layers that groups do
    not divide.
    """
    config = json.loads((folder_in / "config.json").read_text())
    if "quantization_config" in config:
        raise JobError(f"{folder_in} is quantized already, by {config['quantization_config'].get('quant_method')!r}")
    folder_out.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for file in sorted(folder_in.glob("*.safetensors")):
        written: dict[str, Tensor] = {}
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                published = make_published_name(name)
                written |= pack_tensor(published, opened.get_tensor(name), group_size, (moments or {}).get(published))
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


def make_published_name(name: str) -> str:
    """Return the name of a tensor in published folders; the inverse of `awq.convert_published_name`."""
    return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)


def pack_tensor(name: str, tensor: Tensor, group_size: int, moment: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors of an AWQ folder that represent one tensor (out, in) of a plain folder."""
    if not QUANTIZED.fullmatch(name):
        return {name: tensor.half().contiguous()}
    if tensor.shape[1] % group_size or tensor.shape[0] % PACKED:
        raise JobError(
            f"{name}: {tensor.shape[1]} inputs and {tensor.shape[0]} outputs cannot be quantized;"
            f" inputs must be a multiple of the group size {group_size}, outputs of {PACKED}"
        )
    weight = tensor.float().t()
    numbers, zeros, scales = round_weight(weight, group_size) if moment is None else round_with_compensation(weight, group_size, moment)
    layer = name.removesuffix(".weight")
    return {f"{layer}.qweight": pack_columns(numbers), f"{layer}.qzeros": pack_columns(zeros), f"{layer}.scales": scales}


def round_weight(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the 4-bit numbers (in, out), zeros and scales (in / group, out) of a weight (in, out), rounded to the nearest."""
    groups = weight.reshape(-1, group_size, weight.shape[1])
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    top = 2**BITS - 1
    scales = ((high - low) / top).clamp(min=1e-5).half()
    exact = scales.float()
    zeros = (-low / exact).round().clamp(0, top)
    numbers = (groups / exact.unsqueeze(1)).round().add(zeros.unsqueeze(1)).clamp(0, top)
    return numbers.flatten(0, 1).int(), zeros.int(), scales


def round_with_compensation(weight: Tensor, group_size: int, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as `round_weight`, with each row's error compensated by later rows, for inputs with this moment (in, in).

    Row by row with the Cholesky factor of the inverse moment (Frantar et al., GPTQ, arXiv:2210.17323, algorithm 1).
    """
    remaining = weight.double().clone()
    damped = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    share = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    numbers, zeros, scales = torch.empty_like(weight), [], []
    for row in range(len(remaining)):
        if row % group_size == 0:
            _, zero, scale = round_weight(remaining[row : row + group_size].float(), group_size)
            zeros.append(zero)
            scales.append(scale)
        step = scales[-1][0].double()
        numbers[row] = (remaining[row] / step).round().add(zeros[-1][0]).clamp(0, 2**BITS - 1)
        error = (remaining[row] - (numbers[row] - zeros[-1][0]) * step) / share[row, row]
        remaining[row + 1 :] -= share[row, row + 1 :].unsqueeze(1) * error
    return numbers.int(), torch.cat(zeros), torch.cat(scales)


def pack_columns(numbers: Tensor) -> Tensor:
    """Pack eight neighbouring columns of 4-bit numbers into one int32, in the published order: (rows, columns / 8)."""
    eight = numbers.int().reshape(len(numbers), -1, PACKED)
    packed = torch.zeros(eight.shape[:2], dtype=torch.int32)
    for nibble, column in enumerate(COLUMN_ORDER):
        packed |= eight[:, :, column] << (BITS * nibble)
    return packed
