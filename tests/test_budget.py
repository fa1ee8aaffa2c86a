"""Canvases are what Qwen's processor would choose, and stay what they are when it looks again."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as theirs

from pipeline.budget import CELL_AREA, MAX_STRETCH, PixelBudget, Size, bounds, check, fit, fit_pixels, place, smart_resize, visual_tokens

PX = st.integers(1, 20_000)
PT = st.floats(0.01, 1e7)
DEFAULT = PixelBudget()


@st.composite
def budgets(draw: st.DrawFn) -> PixelBudget:
    budget = PixelBudget(*sorted((draw(st.integers(1, 2_000_000)), draw(st.integers(1, 2_000_000)))))
    try:
        check(budget)
    except ValueError:
        assume(False)
    return budget


@given(PX, PX, st.integers(1, 2_000_000), st.integers(1, 2_000_000))
def test_smart_resize_is_transformers(height: int, width: int, one: int, other: int) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    low, high = sorted((one, other))
    assert smart_resize(height, width, low, high) == theirs(height, width, 28, low, high)


def test_smart_resize_refuses_what_transformers_refuses() -> None:
    with pytest.raises(ValueError, match="201"):
        smart_resize(1, 201, 784, 1_000_000)


@given(PT, PT, st.floats(36, 1200), budgets())
def test_smart_resize_leaves_every_canvas(width_pt: float, height_pt: float, dpi: float, budget: PixelBudget) -> None:
    size = fit(width_pt, height_pt, dpi, budget)
    assert theirs(size.height_px, size.width_px, 28, budget.min_pixels, budget.max_pixels) == (size.height_px, size.width_px)


@given(PX, PX)
def test_a_canvas_is_smart_resize_of_the_natural_size(width: int, height: int) -> None:
    assume(max(height, width) <= 140 * min(height, width))
    assert fit_pixels(width, height, DEFAULT) == Size(*reversed(theirs(height, width, 28, DEFAULT.min_pixels, DEFAULT.max_pixels)))


def test_an_a4_page_of_200_dpi() -> None:
    assert fit(595, 842, 200, DEFAULT) == Size(840, 1176)
    assert visual_tokens(Size(840, 1176)) == 1260


@given(PX, PX, budgets())
def test_a_page_keeps_its_proportions(width: int, height: int, budget: PixelBudget) -> None:
    canvas = fit_pixels(width, height, budget)
    inner = place(width, height, canvas)
    across, down = inner.width_px / width, inner.height_px / height
    assert inner.width_px <= canvas.width_px
    assert inner.height_px <= canvas.height_px
    if min(inner.width_px, inner.height_px) > 20:
        assert max(across, down) <= MAX_STRETCH * min(across, down)


@pytest.mark.parametrize(
    ("width", "height", "canvas"), [(10_000, 10, (10024, 56)), (10, 10_000, (56, 10024)), (1000, 4, (3584, 56)), (100_000, 9, (11928, 84))]
)
def test_ratios_beyond_200_get_the_canvas_on_which_they_stand_largest(width: int, height: int, canvas: tuple[int, int]) -> None:
    assert fit_pixels(width, height, DEFAULT) == Size(*canvas)


def test_a_page_on_a_canvas_of_another_shape_covers_a_part_of_it() -> None:
    assert place(2000, 100, Size(1988, 112)) == Size(1988, 99)
    assert place(1653, 2339, Size(840, 1176)) == Size(840, 1176)


def test_a_fixed_size_is_rounded_to_cells() -> None:
    assert fit(595, 842, 200, PixelBudget(resized_height=1000, resized_width=10)) == Size(28, 1008)


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
        check(budget)


def test_one_cell_is_a_budget() -> None:
    check(PixelBudget(784, 784))
    assert fit(10_000, 1, 200, PixelBudget(784, 784)) == Size(28, 28)


def test_pages_of_a_fixed_size_lie_between_that_and_that() -> None:
    assert bounds(PixelBudget(resized_height=280, resized_width=430)) == (280 * 420, 280 * 420)
    assert bounds(DEFAULT) == (DEFAULT.min_pixels, DEFAULT.max_pixels)
