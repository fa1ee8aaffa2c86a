"""Pixel budget: a canvas has the size that Qwen's image processor would choose, and the processor does not resize it again."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

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


def test_smart_resize_refuses_what_transformers_refuses() -> None:
    with pytest.raises(ValueError, match="201"):
        smart_resize(1, 201, 784, 1_000_000)


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
