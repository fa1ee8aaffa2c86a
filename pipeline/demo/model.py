"""Demonstration model: architecture, tokenizer and processor of a Qwen2.5-VL with five million parameters, untrained.

Its tokens are the 256 bytes, the keys of the two schemas it is trained on (`,"invoice_date":` is one token) and the lines of
their prompts (one token each), so that such a small model spends its capacity on reading the page. All other text is tokenized
byte by byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from pipeline.schema import Schema, prompt

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VOCABULARY = 384
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_demo_schemas(folder: Path) -> dict[str, Schema]:
    """Return the two schemas that the model is trained on, by form."""
    return {form: json.loads((folder / f"{form}.json").read_text()) for form in ("invoice", "receipt")}


def list_schema_keys(schema: Schema) -> Iterator[str]:
    """Yield each property's key as compact JSON writes it: after the brace that opens its object, or after a comma."""
    for index, (name, part) in enumerate(schema.get("properties", {}).items()):
        yield ("," if index else "{") + json.dumps(name) + ":"
        yield from list_schema_keys(part.get("items", {}))


def build_tokenizer(known: dict[str, Schema]) -> Qwen2Tokenizer:
    """Return a byte-level tokenizer without merges whose added tokens are the schemas' keys and prompt lines."""
    phrases = dict.fromkeys(k for schema in known.values() for k in list_schema_keys(schema))
    phrases |= dict.fromkeys(line for schema in known.values() for line in prompt.build_system_message(schema).splitlines())
    return build_spelling_tokenizer(sorted(pre_tokenizers.ByteLevel.alphabet()), (*phrases, prompt.ASK, "null"))


def build_spelling_tokenizer(alphabet: Sequence[str], phrases: Sequence[str]) -> Qwen2Tokenizer:
    """Return a tokenizer with one token for each letter of an alphabet and for each of some phrases."""
    core = Tokenizer(BPE({token: index for index, token in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    core.add_tokens([AddedToken(p, normalized=False) for p in phrases])
    special: dict[str, Any] = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None}
    return Qwen2Tokenizer(tokenizer_object=core, model_max_length=32768, **special)


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLProcessor:
    """Return the processor: a tokenizer, Qwen's image processor and a chat template in Qwen's format."""
    pixels: dict[str, Any] = {"min_pixels": 4 * 28 * 28, "max_pixels": 16384 * 28 * 28}
    images, videos = Qwen2VLImageProcessor(**pixels), Qwen2VLVideoProcessor(**pixels)
    return Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)


def build_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """Return the architecture. The input width of every projection is a multiple of 128, the group size of AWQ."""
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]},
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": 4,
        "hidden_size": 192,
        "num_heads": 3,
        "intermediate_size": 384,
        "out_hidden_size": 256,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [2],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_untrained_model(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Return the model with random weights."""
    return Qwen2_5_VLForConditionalGeneration(build_config(tokenizer))
