"""The demonstration model's tokenizer, processor and architecture, without its trained weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig

from pipeline.demo import documents, model
from pipeline.demo.sheets import HEIGHT_PX, WIDTH_PX
from pipeline.demo.truth import format_answer
from pipeline.schema import prompt

KNOWN = model.load_demo_schemas(Path(__file__).parents[2] / "schemas")
PROCESSOR = model.build_processor(model.build_tokenizer(KNOWN))
TOKENIZER = PROCESSOR.tokenizer
CONFIG: Qwen2_5_VLConfig = model.build_config(TOKENIZER)
UNTRAINED = model.build_untrained_model(TOKENIZER)


def tokenize(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text)["input_ids"]
    return found


# --- the tokenizer


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_decoded_unchanged(text: str) -> None:
    assert TOKENIZER.decode(tokenize(text)) == text


@pytest.mark.parametrize("form", ["invoice", "receipt"])
def test_an_answer_is_decoded_unchanged(form: documents.Form) -> None:
    written = format_answer(documents.draw_sample(1, form).truth)
    assert TOKENIZER.decode(tokenize(written)) == written


@pytest.mark.parametrize("key", dict.fromkeys(key for schema in KNOWN.values() for key in model.list_schema_keys(schema)))
def test_a_key_is_one_token(key: str) -> None:
    assert len(tokenize(key)) == 1


@pytest.mark.parametrize(
    "line", dict.fromkeys(line for schema in KNOWN.values() for line in prompt.build_system_message(schema).splitlines())
)
def test_a_line_of_the_prompt_is_one_token(line: str) -> None:
    assert len(tokenize(line)) == 1


def test_keys_are_those_of_compact_json() -> None:
    schema = {"properties": {"a": {}, "b": {"items": {"properties": {"c": {}}}}}}
    assert list(model.list_schema_keys(schema)) == ['{"a":', ',"b":', '{"c":']
    assert json.dumps({"a": 1, "b": [{"c": 2}]}, separators=(",", ":")).startswith('{"a":1,"b":[{"c":')


def test_values_are_tokenized_byte_by_byte() -> None:
    assert len(tokenize("INV-2024-0047")) == len("INV-2024-0047")
    assert len(tokenize("null")) == 1


def test_only_the_control_tokens_are_special_and_all_tokens_fit_the_embedding() -> None:
    added = TOKENIZER.added_tokens_decoder
    assert {token.content for token in added.values() if token.special} == set(model.SPECIAL)
    assert len(TOKENIZER) <= model.VOCABULARY


# --- the processor


def test_the_prompt_has_qwens_format() -> None:
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Q"}]},
    ]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    text = PROCESSOR.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{image}{image}Q<|im_end|>\n<|im_start|>assistant\n"


def test_a_page_is_256_visual_tokens_and_is_not_resized() -> None:
    page = np.full((HEIGHT_PX, WIDTH_PX, 3), 255, np.uint8)
    grid = PROCESSOR.image_processor(images=[page], return_tensors="np")["image_grid_thw"]
    assert np.array_equal(grid, [[1, 32, 32]])


# --- the architecture


def test_the_input_of_every_quantized_projection_is_a_multiple_of_128() -> None:
    layers = UNTRAINED.model.language_model.layers
    widths = {name: part.in_features for name, part in layers.named_modules() if isinstance(part, torch.nn.Linear)}
    assert len(widths) == 7 * CONFIG.text_config.num_hidden_layers
    assert [name for name, width in widths.items() if width % 128] == []


def test_the_sections_of_the_rotary_embedding_fill_a_head() -> None:
    text = CONFIG.text_config
    assert 2 * sum(text.rope_parameters["mrope_section"]) == text.hidden_size // text.num_attention_heads


def test_the_config_names_the_tokenizer_s_own_control_tokens() -> None:
    named = [CONFIG.image_token_id, CONFIG.video_token_id, CONFIG.vision_start_token_id, CONFIG.text_config.eos_token_id]
    assert TOKENIZER.convert_ids_to_tokens(named) == ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_end|>"]


def test_it_has_a_few_million_parameters() -> None:
    count = sum(weight.numel() for weight in UNTRAINED.parameters())
    assert 3e6 < count < 8e6
