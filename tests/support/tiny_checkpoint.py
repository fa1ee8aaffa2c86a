"""A folder with a tiny random Qwen2.5-VL checkpoint, for tests. Knows nothing of documents and of what an answer means.

Its tokenizer is the demonstration model's with a smaller alphabet (printable ASCII and newline) and other phrases.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2Tokenizer, Qwen2VLConfig

from pipeline.demo.model import SPECIAL as CONTROL
from pipeline.demo.model import build_processor, build_spelling_tokenizer

ORDINARY = ('{"invoice_number":', '"invoice_number":', ',"total":', "null", "Return the JSON object for this document.")
VOCABULARY = 192
"""Wider than the tokenizer, as published embeddings are padded."""


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
    """Return the tokenizer; what is not printable ASCII is lost in it."""
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    printable = [as_bytes.pre_tokenize_str(chr(code))[0][0] for code in (10, *range(32, 127))]
    return build_spelling_tokenizer(printable, ORDINARY)


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
