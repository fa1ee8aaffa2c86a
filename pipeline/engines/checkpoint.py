"""A hub id or a folder -> a loaded Qwen2.5-VL or Qwen2-VL checkpoint. Knows no request.

Only safetensors are read, no code comes with a checkpoint, and one that lacks a weight is refused: transformers would fill
it with random numbers behind a warning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoProcessor

from pipeline.engines.encoding import Encoder
from pipeline.errors import JobError, PipelineError

CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
BROKEN_FILE_ERRORS = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, StrictDataclassError, TypeError, ValueError)
"""What transformers raises about files whose content makes no sense."""
TRAINED_TOKENS = 32_768
"""Qwen2.5-VL's own context; its config.json names 128,000, which needs YaRN."""


def format_error_line(error: Exception) -> str:
    """Return an exception in one line."""
    name = "" if isinstance(error, OSError | ValueError | PipelineError) else f"{type(error).__name__}: "
    return " ".join(f"{name}{error}".split())[:300]


def check_chat_template(encoder: Encoder, folder: Path) -> None:
    """Refuse a chat template that cannot ask about a page, before every request finds that out."""
    try:
        encoder.trial()
    except Exception as error:  # any: a template runs what its author wrote
        raise JobError(f"{folder}: its chat template cannot ask about a page: {format_error_line(error)}") from None


def load_processor(folder: Path) -> Any:
    """Return the checkpoint's tokenizer, chat template and image processor."""
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except BROKEN_FILE_ERRORS as error:
        raise JobError(f"{folder}: tokenizer or image processor cannot be read: {format_error_line(error)}") from None


def locate_checkpoint(name: str, revision: str | None) -> Path:
    """Return the folder of a checkpoint, fetching it from the hub when it is not one already."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=CHECKPOINT_FILES))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors, a malformed id is a ValueError
        raise JobError(f"model {name!r}: neither a folder here nor a checkpoint that the hub gave: {format_error_line(error)}") from None


def load_config(folder: Path, rope_scaling: dict[str, Any] | None) -> Any:
    """Return the checkpoint's config with the job's rotary scaling, refusing what this engine cannot run."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except BROKEN_FILE_ERRORS as error:
        raise JobError(f"{folder}: config.json cannot be used: {format_error_line(error)}") from None
    text = config.get_text_config()
    if "sliding_attention" in (text.layer_types or ()):
        raise JobError(f"{folder}: use_sliding_window is true, which this engine does not know")
    if rope_scaling:
        given = {("rope_type" if key == "type" else key): value for key, value in rope_scaling.items()}
        text.rope_parameters = {**text.rope_parameters, "type": given.get("rope_type", "default"), **given}
    return config


def count_context_tokens(config: Any) -> int:
    """Return how many tokens prompt and answer may have together: what the model was trained for, times a YaRN factor."""
    text = config.get_text_config()
    rope = text.rope_parameters
    if "factor" in rope:
        return int(rope["factor"] * rope.get("original_max_position_embeddings", TRAINED_TOKENS))
    return min(TRAINED_TOKENS, int(text.max_position_embeddings))
