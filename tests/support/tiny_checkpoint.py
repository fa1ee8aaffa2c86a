"""Tiny checkpoint of Qwen2.5-VL with random weights, written into a folder. Its tokenizer is `tiny_tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2Tokenizer, Qwen2VLConfig

from pipeline.demo.model import build_processor
from tests.support.tiny_tokenizer import CONTROL, VOCABULARY, build_tokenizer


def build_checkpoint(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, family: str = "qwen2_5_vl") -> Path:
    """Write the checkpoint and return its folder. Layers are 128 or 256 wide, as groups of 128 want."""
    words = tokenizer()
    build_processor(words).save_pretrained(folder)
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


def tokenizer() -> Qwen2Tokenizer:
    """Return the tokenizer in the form in which checkpoints keep it."""
    special: dict[str, Any] = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None}
    return Qwen2Tokenizer(tokenizer_object=build_tokenizer(), model_max_length=32768, **special)


def config(words: Qwen2Tokenizer, tied: bool, family: str) -> Qwen2_5_VLConfig | Qwen2VLConfig:
    """Return the architecture: two language layers, two vision layers, the first of which has windows."""
    ids = dict(zip(CONTROL, words.convert_tokens_to_ids(list(CONTROL)), strict=True))
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    width = {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 128, "fullatt_block_indexes": [1]}
    vision = {"depth": 2, "num_heads": 4, **(width if family == "qwen2_5_vl" else {"embed_dim": 64, "hidden_size": 128})}
    return (Qwen2_5_VLConfig if family == "qwen2_5_vl" else Qwen2VLConfig)(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
