"""Checkpoint folder without its weights: config, tokenizer, chat template and image processor, read by transformers.

In: a hub id or a folder. Out: the folder, fetched from the hub if necessary, and what transformers reads from it. The engines
`transformers` and `vllm` both start from this; each loads the weights itself. No code that comes with a checkpoint is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoProcessor

from pipeline.engines.checkpoint_files import CHECKPOINT_FILES
from pipeline.engines.encoding import Encoder
from pipeline.errors import JobError, PipelineError

BROKEN_FILE_ERRORS = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, StrictDataclassError, TypeError, ValueError)
"""What transformers raises for files with unusable content."""
TRAINED_TOKENS = {"qwen2_vl": 32_768, "qwen2_5_vl": 32_768}
"""The context with which models were trained whose config.json gives more: 128,000 for Qwen2.5-VL, which needs YaRN. Qwen3-VL's 262,144 is
its own."""


def format_error_line(error: Exception) -> str:
    """Return an exception as one line of at most 300 characters; its class is named unless the text explains itself."""
    name = "" if isinstance(error, OSError | ValueError | PipelineError) else f"{type(error).__name__}: "
    return " ".join(f"{name}{error}".split())[:300]


def check_chat_template(encoder: Encoder, folder: Path) -> None:
    """Raise JobError for a chat template that cannot ask about a page: otherwise every single request would fail on it."""
    try:
        encoder.encode_sample_page()
    except Exception as error:  # any: a template is a program and may raise anything
        raise JobError(f"{folder}: its chat template cannot ask about a page: {format_error_line(error)}") from None


def load_processor(folder: Path) -> Any:
    """Return transformers' processor: tokenizer, chat template and image processor in one. Raises JobError."""
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except BROKEN_FILE_ERRORS as error:
        raise JobError(f"{folder}: tokenizer or image processor cannot be read: {format_error_line(error)}") from None


def locate_checkpoint(name: str, revision: str | None) -> Path:
    """Return the folder of a checkpoint; a hub id is fetched from the hub, or from its cache. Raises JobError."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(CHECKPOINT_FILES)))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors, a malformed id is a ValueError
        raise JobError(
            f"model {name!r}: neither a folder here nor a checkpoint that can be fetched from the hub: {format_error_line(error)}"
        ) from None


def load_config(folder: Path, rope_scaling: dict[str, Any] | None) -> Any:
    """Return the checkpoint's config with the job's rotary scaling. Raises JobError for one that no engine here can run."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except BROKEN_FILE_ERRORS as error:
        raise JobError(f"{folder}: config.json cannot be used: {format_error_line(error)}") from None
    text = config.get_text_config()
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise JobError(f"{folder}: use_sliding_window is true, which is not supported")
    if rope_scaling:
        given = {("rope_type" if key == "type" else key): value for key, value in rope_scaling.items()}
        text.rope_parameters = {**text.rope_parameters, "type": given.get("rope_type", "default"), **given}
    return config


def count_context_tokens(config: Any) -> int:
    """Return how many tokens prompt and answer may have together: the trained length, times the factor of YaRN if there is one."""
    text = config.get_text_config()
    longest = int(text.max_position_embeddings)
    trained = min(TRAINED_TOKENS.get(config.model_type, longest), longest)
    rope = text.rope_parameters
    if "factor" in rope:
        return int(rope["factor"] * rope.get("original_max_position_embeddings", trained))
    return trained
