"""Checkpoint loader of the engine `transformers`: brings weights, tokenizer and grammar vocabulary into this process.

In: a hub id or a folder, and how its weights are to be held. Out: a `LoadedModel` of Qwen3-VL, Qwen2.5-VL or Qwen2-VL, plain or AWQ, with a
LoRA adapter merged into it. Only safetensors are read. A checkpoint that lacks a weight is refused: transformers would fill it with random
numbers and only warn.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from pipeline.engines import checkpoint_files
from pipeline.engines.checkpoint import (
    BROKEN_FILE_ERRORS,
    check_chat_template,
    format_error_line,
    load_config,
    load_processor,
    locate_checkpoint,
)
from pipeline.engines.encoding import Encoder
from pipeline.engines.transformers import awq
from pipeline.engines.transformers.attention import install_attention
from pipeline.engines.transformers.generate import LoadedModel
from pipeline.engines.transformers.vision import batch_windows
from pipeline.errors import JobError
from pipeline.schema.grammar import Vocabulary
from pipeline.version import DISTRIBUTION

ADAPTER_NAMES = {r"^model\.layers\.": "model.language_model.layers.", r"^visual\.": "model.visual."}
"""The names of layers in adapters that were trained with transformers before 4.52, and those of the model now."""


def load_checkpoint(
    name: str, revision: str | None, dtype: str, device: torch.device, threads: int,
    rope_scaling: dict[str, Any] | None, lora: Path | None, keep_int4: bool,
) -> LoadedModel:  # fmt: skip
    """Return a checkpoint that is ready to answer. Raises JobError for one that cannot be used."""
    untyped_logging: Any = logging
    untyped_logging.set_verbosity_error()  # errors are raised; transformers' progress bars and notes would fill the run's stderr
    untyped_logging.disable_progress_bar()
    folder = locate_checkpoint(name, revision)
    checkpoint_files.check_checkpoint_files(folder)
    config = load_config(folder, rope_scaling)
    quantized = awq.is_awq(config)
    check_shapes(folder, config, quantized)
    chosen = choose_dtype(dtype, config, device, quantized, keep_int4)
    network: Any = (
        awq.load_awq_model(folder, config, chosen, device, keep_int4) if quantized else load_plain_model(folder, config, chosen, device)
    )
    if lora:
        network = merge_lora(network, lora, keep_int4)
    batch_windows(network)
    install_attention(network)
    processor = load_processor(folder)
    tokenizer = processor.tokenizer
    vocabulary = Vocabulary(
        tokenizer.backend_tokenizer.to_str(),
        size=network.lm_head.out_features,
        eos_ids=find_end_tokens(network, tokenizer),
        threads=threads,
    )
    encoder = Encoder(processor, config.image_token_id, device)
    check_chat_template(encoder, folder)
    return LoadedModel(network, encoder, vocabulary, device, tokenizer.pad_token_id or 0)


def check_shapes(folder: Path, config: Any, quantized: bool) -> None:
    """Compare the shapes of the stored weights with those that the config asks for, before gigabytes of either are in memory.

    Raises JobError for a different shape. Missing weights are found when the model is loaded; additional ones are ignored.
    """
    loader: Any = AutoModelForImageTextToText
    try:
        with torch.device("meta"):
            network = loader.from_config(config)
    except BROKEN_FILE_ERRORS as error:
        raise JobError(f"{folder}: config.json describes no model that can be built: {format_error_line(error)}") from None
    wanted = {name: tuple(parameter.shape) for name, parameter in network.named_parameters(remove_duplicate=False)}
    group_size = config.quantization_config.get("group_size") if quantized else 0
    if not isinstance(group_size, int) or group_size < quantized:
        raise JobError(f"{folder}: config.json says group_size {group_size!r}; allowed are whole numbers from 1")
    for name, shape in checkpoint_files.read_tensor_shapes(folder).items():
        expected = find_stored_shape(name, wanted, group_size)
        if expected not in (None, shape):
            raise JobError(f"{folder}: the weight {name} is {shape}, config.json asks for {expected}")


def find_stored_shape(name: str, wanted: dict[str, tuple[int, ...]], group_size: int) -> tuple[int, ...] | None:
    """Return the shape that a folder's tensor of this name must have; None for a tensor that the model does not have."""
    layer, _, kind = name.rpartition(".")
    packed = group_size and kind in ("qweight", "qzeros", "scales")
    try:
        shape = wanted[awq.convert_published_name(f"{layer}.weight" if packed else name, set(wanted))]
    except JobError:
        return None
    if not packed:
        return shape
    outputs, inputs = shape
    rows = inputs if kind == "qweight" else inputs // group_size
    return (rows, outputs if kind == "scales" else outputs // awq.PACKED)


def choose_dtype(wanted: str, config: Any, device: torch.device, quantized: bool, keep_int4: bool) -> torch.dtype:
    """Return the type of the weights: by default float32 on a CPU, else the checkpoint's own. Raises JobError.

    AWQ folders store float16, in whose range these models were not trained: their weights become bfloat16 on GPUs that have it (sm_80).
    Packed layers multiply in float16 and return what they are given, so that what is added up between them has bfloat16's range.
    """
    if keep_int4 and not (quantized and device.type == "cuda"):
        kind = "an AWQ checkpoint" if quantized else "plain weights"
        raise JobError(f"model.weights is int4, which needs an AWQ checkpoint and an NVIDIA GPU; found {kind} and the device {device.type}")
    if wanted != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[wanted]
    if device.type == "cpu":
        return torch.float32
    if quantized:
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16


def load_plain_model(folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the model of an unquantized checkpoint. Raises JobError for one that cannot be read or lacks weights."""
    loader: Any = AutoModelForImageTextToText
    try:
        network, report = loader.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise JobError(f"{folder}: the checkpoint cannot be read: {format_error_line(error)}") from None
    if wrong := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise JobError(f"{folder}: the checkpoint lacks weights: {', '.join(wrong[:5])} (of {len(wrong)})")
    return network.to(device).eval()


def merge_lora(network: Any, folder: Path, keep_int4: bool) -> Any:
    """Return the model with the adapter in a folder merged into its weights.

    Raises JobError, also for an adapter that lacks weights for this model's layers: peft would leave those as they are and only warn.
    """
    if importlib.util.find_spec("peft") is None:
        raise JobError(f"model.lora: adapters need the package peft, which is not installed: pip install '{DISTRIBUTION}[lora]'")
    if keep_int4:
        raise JobError("model.lora: an adapter cannot be merged into int4 weights")
    if not (folder / "adapter_model.safetensors").is_file():
        raise JobError(f"model.lora: {folder} holds no adapter_model.safetensors; adapters in other formats are not read")
    from peft import PeftModel  # optional

    try:
        with warnings.catch_warnings(record=True) as notes:  # its other warnings are about its use of transformers
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(network, folder, key_mapping=ADAPTER_NAMES)
    except BROKEN_FILE_ERRORS as error:
        raise JobError(f"model.lora: {folder} does not fit {network.config.model_type}: {format_error_line(error)}") from None
    if lacking := next((str(note.message) for note in notes if "missing adapter keys" in str(note.message)), ""):
        raise JobError(f"model.lora: {folder} lacks weights for this model: {' '.join(lacking.split())[:300]}")
    return adapted.merge_and_unload().eval()


def find_end_tokens(network: Any, tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that end an answer: those of the generation config and of the tokenizer."""
    given = network.generation_config.eos_token_id
    listed = given if isinstance(given, list) else [given]
    size = len(tokenizer)
    return sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None and token < size})
