"""Checkpoint folder check: finds out from the files alone whether a checkpoint can be loaded. Reads no weights and imports no torch.

In: a folder. Out: nothing, or a JobError with one sentence on the first file that is wrong. Checked are that config.json describes
a model that this package runs, that the tokenizer and image processor files exist, and that every weights file exists and is a
complete safetensors file. `safetensors.safe_open` reads the header alone, and compares the file's length with the offsets in it:

    8 bytes   n, little-endian
    n bytes   JSON: {"model.norm.weight": {"dtype": "F32", "shape": [128], "data_offsets": [0, 512]}, …}
    512 …     the data; an interrupted copy, or a Git LFS pointer in place of the weights, is too short
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.errors import JobError

MODEL_TYPES = ("qwen3_vl", "qwen2_5_vl", "qwen2_vl")
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt")
"""The files of a checkpoint that are used: what is fetched from the hub or copied from an object store."""
INDEX = "model.safetensors.index.json"
REQUIRED_FILES = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "image processor": (("preprocessor_config.json",), ("processor_config.json",)),
}
"""What a checkpoint needs besides its weights, and the sets of files that may hold it."""


def check_checkpoint_files(folder: Path, any_quantization: bool = False) -> None:
    """Raise JobError when a checkpoint cannot be loaded from this folder. Shapes and values of the weights are not checked.

    `any_quantization` accepts every quantization method: vLLM checks it when it loads the checkpoint.
    """
    config = read_json_file(folder / "config.json")
    if config.get("model_type") not in MODEL_TYPES:
        raise JobError(f"{folder}: model_type is {config.get('model_type')!r}; allowed: {', '.join(MODEL_TYPES)}", folder / "config.json")
    block = config.get("quantization_config") or {}
    if block and not any_quantization and (not isinstance(block, dict) or block.get("quant_method") != "awq"):
        method = block.get("quant_method") if isinstance(block, dict) else block
        raise JobError(f"{folder}: config.json says quantization by {method!r}; allowed are none and 'awq'", folder / "config.json")
    for part, choices in REQUIRED_FILES.items():
        if not any(all((folder / name).is_file() for name in names) for names in choices):
            raise JobError(f"{folder}: its {part} is missing: there is no {' and no '.join(' with '.join(names) for names in choices)}")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            read_json_file(folder / name)
    for file in list_weights_files(folder):
        read_safetensors_header(file)


def read_tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its name in the weights files, of which only the headers are read."""
    return {name: shape for file in list_weights_files(folder) for name, shape in read_safetensors_header(file).items()}


def list_weights_files(folder: Path) -> list[Path]:
    """Return the weights files: those that the index names, or else every .safetensors file. Raises JobError for a missing one."""
    if (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
        named = read_json_file(folder / INDEX).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise JobError(f"{folder / INDEX}: it has no weight_map that says which file holds which weight", folder / INDEX)
        files = [folder / name for name in dict.fromkeys(map(str, named.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise JobError(f"{folder}: the weights file {missing[0]} is missing (of {len(files)} that {INDEX} names, {len(missing)} are)")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise JobError(f"{folder}: it holds no weights: no .safetensors file, and other weight files are not read")
    return files


def read_safetensors_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a safetensors file by its name.

    Raises JobError for a file that cannot be read, is not in this format or does not have the length that its header gives.
    """
    try:
        with file.open("rb") as opened:
            start, size_bytes = opened.read(9), opened.seek(0, 2)
        with safe_open(file, "np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118  not a mapping
    except OSError as error:
        raise JobError(f"{file} cannot be read: {error.strerror or error}", file) from None
    except SafetensorError as error:
        if start[8:] != b"{":  # the format's first byte after the length of its header
            raise JobError(f"{file} is not a safetensors file ({size_bytes:,} bytes that begin with {start[:8]!r})", file) from None
        raise JobError(f"{file} is damaged or incomplete ({size_bytes:,} bytes): {error}; fetch it again", file) from None


def read_json_file(file: Path) -> dict[str, Any]:
    """Return the object in a checkpoint's JSON file."""
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise JobError(f"{file} cannot be read: {error.strerror}", file) from None
    except (ValueError, RecursionError) as error:
        raise JobError(f"{file} is not JSON: {error}", file) from None
    if not isinstance(found, dict):
        raise JobError(f"{file}: expected a JSON object, found {type(found).__name__}", file)
    return found
