"""Tiny checkpoints of Qwen-VL's families with random weights, each written into a folder. Their tokenizer is `tiny_tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from pipeline.demo.model import CHAT_TEMPLATE, build_processor
from tests.support.tiny_tokenizer import CONTROL, VOCABULARY, build_tokenizer

FAMILIES = {"qwen2_vl": 28, "qwen2_5_vl": 28, "qwen3_vl": 32}
"""The side in pixels of a visual token, by family."""


def build_checkpoint(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, family: str = "qwen2_5_vl") -> Path:
    """Write the checkpoint and return its folder. Layers are 128 or 256 wide, as groups of 128 want."""
    words = tokenizer()
    build_family_processor(words, family).save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config(words, tied, family))
    with torch.no_grad():  # larger than at initialisation, so that answers are varied and no bias is 0
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def build_family_processor(words: Qwen2Tokenizer, family: str) -> Any:
    """Return the family's processor; that of Qwen3-VL has the values of its published preprocessor_config.json."""
    if family != "qwen3_vl":
        return build_processor(words)
    values: dict[str, Any] = {
        "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}, "patch_size": 16, "merge_size": 2, "temporal_patch_size": 2,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    return Qwen3VLProcessor(Qwen2VLImageProcessor(**values), words, Qwen3VLVideoProcessor(), chat_template=CHAT_TEMPLATE)


def tokenizer() -> Qwen2Tokenizer:
    """Return the tokenizer in the form in which checkpoints keep it."""
    special: dict[str, Any] = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None}
    return Qwen2Tokenizer(tokenizer_object=build_tokenizer(), model_max_length=32768, **special)


def config(words: Qwen2Tokenizer, tied: bool, family: str) -> Qwen2_5_VLConfig | Qwen2VLConfig | Qwen3VLConfig:
    """Return the architecture: two language layers, two vision layers.

    In Qwen2.5-VL the first of those has windows, in Qwen3-VL its output goes to the first language layer too.
    """
    ids = dict(zip(CONTROL, words.convert_tokens_to_ids(list(CONTROL)), strict=True))
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    if family == "qwen3_vl":
        text["head_dim"] = 32
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    width = {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 128}
    own: dict[str, Any] = {
        "qwen2_vl": {"embed_dim": 64, "hidden_size": 128},
        "qwen2_5_vl": {**width, "fullatt_block_indexes": [1]},
        "qwen3_vl": {**width, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    }[family]
    return {"qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig, "qwen3_vl": Qwen3VLConfig}[family](
        text_config=text,
        vision_config={"depth": 2, "num_heads": 4, **own},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
