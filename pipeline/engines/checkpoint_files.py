"""A checkpoint's folder -> one sentence on what is wrong with its files, before anything is loaded. Knows no torch and no Ray.

What a glance can tell: that config.json describes a model that this package runs, that tokenizer and image processor are there,
and that every weights file is there and as long as its own header says:

    8 bytes   n, little-endian
    n bytes   JSON: {"model.norm.weight": {"dtype": "F32", "shape": [128], "data_offsets": [0, 512]}, …}
    512 …     the data; a copy that broke off, or a file of Git LFS in place of the weights, ends too early
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from pipeline.errors import JobError

MODEL_TYPES = ("qwen2_5_vl", "qwen2_vl")
INDEX = "model.safetensors.index.json"
PARTS = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "image processor": (("preprocessor_config.json",), ("processor_config.json",)),
}
"""What a checkpoint has beside its weights, and the files that it may come in."""
MAX_HEADER_BYTES = 100_000_000
"""What the format itself allows."""


def check_checkpoint_files(folder: Path, any_quantization: bool = False) -> None:
    """Raise JobError when a checkpoint cannot be loaded from this folder; a sound one may still hold the wrong weights.

    `any_quantization` leaves it to whoever loads it which ones there are.
    """
    config = read_json_file(folder / "config.json")
    if config.get("model_type") not in MODEL_TYPES:
        raise JobError(f"{folder}: model_type is {config.get('model_type')!r}; allowed: {', '.join(MODEL_TYPES)}")
    block = config.get("quantization_config") or {}
    if block and not any_quantization and (not isinstance(block, dict) or block.get("quant_method") != "awq"):
        method = block.get("quant_method") if isinstance(block, dict) else block
        raise JobError(f"{folder}: config.json says quantization by {method!r}; allowed are none and 'awq'")
    for part, choices in PARTS.items():
        if not any(all((folder / name).is_file() for name in names) for names in choices):
            raise JobError(f"{folder}: its {part} is missing: there is no {' and no '.join(' with '.join(names) for names in choices)}")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            read_json_file(folder / name)
    for file in list_weights_files(folder):
        read_safetensors_header(file)


def read_tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its name in the weights files, of which only the headers are read."""
    entries = [entry for file in list_weights_files(folder) for entry in read_safetensors_header(file).items()]
    return {name: tuple(entry["shape"]) for name, entry in entries if name != "__metadata__"}


def list_weights_files(folder: Path) -> list[Path]:
    """Return the weights files: whatever is there, and what the index names where they are several."""
    if (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
        named = read_json_file(folder / INDEX).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise JobError(f"{folder / INDEX}: it has no weight_map that says which file holds which weight")
        files = [folder / name for name in dict.fromkeys(map(str, named.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise JobError(f"{folder}: the weights file {missing[0]} is missing (of {len(files)} that {INDEX} names, {len(missing)} are)")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise JobError(f"{folder}: it holds no weights: no .safetensors file, and other weight files are not read")
    return files


def read_safetensors_header(file: Path) -> dict[str, Any]:
    """Return a safetensors file's header, refusing a file that is not as long as it says."""
    try:
        with file.open("rb") as opened:
            size_bytes = opened.seek(0, 2)
            opened.seek(0)
            start = opened.read(8)
            header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 1 < header_bytes <= MAX_HEADER_BYTES:
                raise JobError(f"{file}: it is no safetensors file ({size_bytes:,} bytes that begin with {start!r})")
            text = opened.read(header_bytes)
    except OSError as error:
        raise JobError(f"{file} cannot be read: {error.strerror}") from None
    if len(text) < header_bytes:
        raise JobError(f"{file}: it is damaged: it ends in its header, after {size_bytes:,} bytes; fetch it again")
    try:
        found: dict[str, Any] = json.loads(text)
        data_bytes = max((int(entry["data_offsets"][1]) for name, entry in found.items() if name != "__metadata__"), default=0)
    except (ValueError, AttributeError, TypeError, LookupError, RecursionError):
        raise JobError(f"{file}: it is damaged: its header is not that of a safetensors file; fetch it again") from None
    if size_bytes != 8 + header_bytes + data_bytes:
        whole_bytes = 8 + header_bytes + data_bytes
        raise JobError(f"{file}: it is damaged: {size_bytes:,} bytes long, {whole_bytes:,} by its own header; fetch it again")
    return found


def read_json_file(file: Path) -> dict[str, Any]:
    """Return the object in a checkpoint's JSON file."""
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise JobError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise JobError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise JobError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found
