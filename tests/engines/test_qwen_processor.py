"""Page sizes, pixels and prompts compared with Qwen's own processor and tokenizer, as transformers has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import qwen_vl_utils
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as theirs

from pipeline.budget import CELL_AREA, ImageSize, PixelBudget, check_budget, fit_image, fit_page, smart_resize
from pipeline.demo.model import build_processor
from pipeline.engines.encoding import Encoder
from pipeline.schema import prompt
from pipeline.schema.grammar import Vocabulary
from tests.support import tiny_checkpoint
from tests.support.pdfs import draw_corners, make_page_pdf
from tests.unit.render.test_document import BUDGET, SHAPES, render_first
from tests.unit.schema.test_grammar import INVOICE, find_allowed_tokens
from tests.unit.schema.test_properties import TEXTS, with_examples
from tests.unit.test_budget import DEFAULT, PT, PX, budgets

SHARED = Path(__file__).parents[3] / "shared"


# --- sizes


CELLS = st.sampled_from([28, 32])


@given(PX, PX, st.integers(1, 2_000_000), st.integers(1, 2_000_000), CELLS)
def test_smart_resize_is_transformers(height: int, width: int, one: int, other: int, cell_px: int) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    low, high = sorted((one, other))
    assert smart_resize(height, width, low, high, cell_px) == theirs(height, width, cell_px, low, high)


@given(PT, PT, st.floats(36, 1200), budgets(), CELLS)
def test_smart_resize_leaves_every_canvas(width_pt: float, height_pt: float, dpi: float, budget: PixelBudget, cell_px: int) -> None:
    budget = replace(budget, cell_px=cell_px)
    try:
        check_budget(budget)
    except ValueError:
        assume(False)
    size = fit_page(width_pt, height_pt, dpi, budget)
    assert theirs(size.height_px, size.width_px, cell_px, budget.min_pixels, budget.max_pixels) == (size.height_px, size.width_px)


@given(PX, PX)
def test_a_canvas_is_smart_resize_of_the_natural_size(width: int, height: int) -> None:
    assume(max(height, width) <= 140 * min(height, width))
    assert fit_image(width, height, DEFAULT) == ImageSize(*reversed(theirs(height, width, 28, DEFAULT.min_pixels, DEFAULT.max_pixels)))


@given(st.integers(28, 20_000), st.integers(28, 20_000), st.integers(1, 2_000_000), st.integers(200 * CELL_AREA, 2_000_000))
@settings(max_examples=400)
def test_smart_resize_is_qwen_vl_utils(height: int, width: int, low: int, high: int) -> None:
    """Smaller sizes and budgets are left out: there qwen_vl_utils rounds up to a cell first, or down to no cell at all."""
    assume(max(height, width) <= 200 * min(height, width) and low <= high)
    assert smart_resize(height, width, low, high) == qwen_vl_utils.smart_resize(height, width, 28, low, high)


# --- pixels


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_qwens_processor_returns_the_same_pixels(width: float, height: float) -> None:
    page = render_first(make_page_pdf(width, height, draw_corners(width, height, 5) + b" BT /F 8 Tf 12 6 Td (Hello) Tj ET"))
    processor = Qwen2VLImageProcessor(min_pixels=BUDGET.min_pixels, max_pixels=BUDGET.max_pixels)
    seen = processor(images=[page.pixels], return_tensors="pt")
    _, rows, columns = seen["image_grid_thw"][0].tolist()
    assert (rows * 14, columns * 14) == page.pixels.shape[:2]
    # Undo its patches of 14x14 in groups of 2x2, its normalisation and its two equal frames.
    patches = seen["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    picture = patches.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * 14, columns * 14, 3)
    colours = (picture * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)) * 255
    assert np.array_equal(colours.round().to(torch.uint8).numpy(), page.pixels)


# --- tokens


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    words = tiny_checkpoint.tokenizer()
    return Encoder(build_processor(words), words.convert_tokens_to_ids("<|image_pad|>"), torch.device("cpu"))


def control_tokens(encoder: Encoder, text: str, answer: str, error: str) -> list[int]:
    """Return the control tokens of a conversation with these texts in all places that strangers' texts can get to."""
    page = np.zeros((28, 28, 3), np.uint8)
    messages = prompt.build_correction(prompt.build_messages(text, [page]), answer, [error])
    control = set(encoder._tokenizer.convert_tokens_to_ids(list(tiny_checkpoint.CONTROL)))
    return [token for token in encoder.encode(messages).ids if token in control]


@with_examples(150)
@given(TEXTS, TEXTS, TEXTS)
def test_no_text_becomes_a_control_token(encoder: Encoder, text: str, answer: str, error: str) -> None:
    assert control_tokens(encoder, text, answer, error) == control_tokens(encoder, "a", "b", "c")


@pytest.mark.skipif(not (SHARED / "qwen2.5-vl-7b-awq").is_dir(), reason="needs ../shared/qwen2.5-vl-7b-awq")
def test_the_published_tokenizers_padding_and_control_tokens_are_masked() -> None:
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(SHARED / "qwen2.5-vl-7b-awq")
    vocabulary = Vocabulary(words.backend_tokenizer.to_str(), size=152_064, eos_ids=[151_645, 151_643])
    free = find_allowed_tokens(vocabulary, vocabulary.start_constraint(""))
    assert {token for token in free if token >= 151_643} == {151_643, 151_645}
    assert words.decode(vocabulary.start_constraint(INVOICE).take_forced_tokens()).startswith('{"seller_name')
