"""Canvases are what Qwen's processor would choose, and stay what they are when it looks again."""

from __future__ import annotations

import pytest
import qwen_vl_utils
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as theirs

from pipeline.budget import (
    CELL_AREA,
    MAX_STRETCH,
    ImageSize,
    PixelBudget,
    check_budget,
    compute_area_bounds,
    count_visual_tokens,
    fit_content,
    fit_image,
    fit_page,
    smart_resize,
)

PX = st.integers(1, 20_000)
PT = st.floats(0.01, 1e7)
DEFAULT = PixelBudget()


@st.composite
def budgets(draw: st.DrawFn) -> PixelBudget:
    budget = PixelBudget(*sorted((draw(st.integers(1, 2_000_000)), draw(st.integers(1, 2_000_000)))))
    try:
        check_budget(budget)
    except ValueError:
        assume(False)
    return budget


@given(PX, PX, st.integers(1, 2_000_000), st.integers(1, 2_000_000))
def test_smart_resize_is_transformers(height: int, width: int, one: int, other: int) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    low, high = sorted((one, other))
    assert smart_resize(height, width, low, high) == theirs(height, width, 28, low, high)


@given(st.integers(28, 20_000), st.integers(28, 20_000), st.integers(1, 2_000_000), st.integers(200 * CELL_AREA, 2_000_000))
@settings(max_examples=400)
def test_smart_resize_is_qwen_vl_utils(height: int, width: int, low: int, high: int) -> None:
    """Smaller sizes and budgets are left out: there qwen_vl_utils rounds up to a cell first, or down to no cell at all."""
    assume(max(height, width) <= 200 * min(height, width) and low <= high)
    assert smart_resize(height, width, low, high) == qwen_vl_utils.smart_resize(height, width, 28, low, high)


def test_smart_resize_refuses_what_transformers_refuses() -> None:
    with pytest.raises(ValueError, match="201"):
        smart_resize(1, 201, 784, 1_000_000)


@given(PT, PT, st.floats(36, 1200), budgets())
def test_smart_resize_leaves_every_canvas(width_pt: float, height_pt: float, dpi: float, budget: PixelBudget) -> None:
    size = fit_page(width_pt, height_pt, dpi, budget)
    assert theirs(size.height_px, size.width_px, 28, budget.min_pixels, budget.max_pixels) == (size.height_px, size.width_px)


@given(PX, PX)
def test_a_canvas_is_smart_resize_of_the_natural_size(width: int, height: int) -> None:
    assume(max(height, width) <= 140 * min(height, width))
    assert fit_image(width, height, DEFAULT) == ImageSize(*reversed(theirs(height, width, 28, DEFAULT.min_pixels, DEFAULT.max_pixels)))


def test_an_a4_page_of_200_dpi() -> None:
    assert fit_page(595, 842, 200, DEFAULT) == ImageSize(840, 1176)
    assert count_visual_tokens(ImageSize(840, 1176)) == 1260


@given(PX, PX, budgets())
def test_a_page_keeps_its_proportions(width: int, height: int, budget: PixelBudget) -> None:
    canvas = fit_image(width, height, budget)
    inner = fit_content(width, height, canvas)
    across, down = inner.width_px / width, inner.height_px / height
    assert inner.width_px <= canvas.width_px
    assert inner.height_px <= canvas.height_px
    if min(inner.width_px, inner.height_px) > 20:
        assert max(across, down) <= MAX_STRETCH * min(across, down)


@pytest.mark.parametrize(
    ("width", "height", "canvas"), [(10_000, 10, (10024, 56)), (10, 10_000, (56, 10024)), (1000, 4, (3584, 56)), (100_000, 9, (11928, 84))]
)
def test_ratios_beyond_200_get_the_canvas_on_which_they_stand_largest(width: int, height: int, canvas: tuple[int, int]) -> None:
    assert fit_image(width, height, DEFAULT) == ImageSize(*canvas)


def test_a_page_on_a_canvas_of_another_shape_covers_a_part_of_it() -> None:
    assert fit_content(2000, 100, ImageSize(1988, 112)) == ImageSize(1988, 99)
    assert fit_content(1653, 2339, ImageSize(840, 1176)) == ImageSize(840, 1176)


def test_a_fixed_size_is_rounded_to_cells() -> None:
    assert fit_page(595, 842, 200, PixelBudget(resized_height=1000, resized_width=10)) == ImageSize(28, 1008)


@pytest.mark.parametrize(
    ("budget", "complaint"),
    [
        (PixelBudget(0, 1000), "min_pixels is 0; it must be positive"),
        (PixelBudget(2000, 1000), "less than min_pixels"),
        (PixelBudget(1, 20_000 * CELL_AREA), "16384 visual tokens"),
        (PixelBudget(1, 783), "allow a wider range"),
        (PixelBudget(1009 * CELL_AREA, 1009 * CELL_AREA), "allow a wider range"),
        (PixelBudget(resized_height=280), "give both or neither"),
        (PixelBudget(resized_height=-1, resized_width=280), "must be positive"),
        (PixelBudget(resized_height=28, resized_width=28_000), "aspect ratio of 200"),
    ],
)
def test_a_budget_that_no_page_fits_is_refused(budget: PixelBudget, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_budget(budget)


def test_one_cell_is_a_budget() -> None:
    check_budget(PixelBudget(784, 784))
    assert fit_page(10_000, 1, 200, PixelBudget(784, 784)) == ImageSize(28, 28)


def test_pages_of_a_fixed_size_lie_between_that_and_that() -> None:
    assert compute_area_bounds(PixelBudget(resized_height=280, resized_width=430)) == (280 * 420, 280 * 420)
    assert compute_area_bounds(DEFAULT) == (DEFAULT.min_pixels, DEFAULT.max_pixels)
