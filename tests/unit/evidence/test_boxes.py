"""A box that a model names is one in the page image, whatever the model counts in; what is no place is none."""

from __future__ import annotations

import pytest

from pipeline.evidence.boxes import FAMILIES, BoxUnits, convert_box, find_largest_number, guess_box_units
from pipeline.evidence.page_index import Box

PAGE = (840, 1176)


@pytest.mark.parametrize(
    ("family", "box"),
    [("qwen2_5_vl", (84, 100, 168, 120)), ("qwen2_vl", (70.56, 117.6, 141.12, 141.12)), ("qwen3_vl", (70.56, 117.6, 141.12, 141.12))],
)
def test_families_count_in_pixels_or_in_thousandths(family: str, box: Box) -> None:
    assert convert_box([84, 100, 168, 120], FAMILIES[family], *PAGE) == pytest.approx(box)


@pytest.mark.parametrize(
    ("numbers", "box"),
    [
        ([168, 120, 84, 100], (84, 100, 168, 120)),  # right before left, bottom before top
        ([700, 1000, 2000, 1050], (700, 1000, 840, 1050)),  # beyond the page
        ([-5, 0, 60, 20], (0, 0, 60, 20)),
    ],
)
def test_corners_are_put_in_order_and_on_the_page(numbers: list[float], box: Box) -> None:
    assert convert_box(numbers, BoxUnits.PIXELS, *PAGE) == box


@pytest.mark.parametrize(
    "numbers",
    [
        [0, 0, 0, 0],
        [100, 100, 300, 102],  # two pixels high
        [900, 100, 1000, 200],  # beside the page
        [0, 0, 840, 1176],
        [0, 0, 500, 600],  # more than a quarter of the page
    ],
)
def test_what_is_empty_or_much_of_the_page_is_no_place(numbers: list[float]) -> None:
    assert convert_box(numbers, BoxUnits.PIXELS, *PAGE) is None


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-7B-Instruct-AWQ", "qwen2_5_vl", "qwen2.5vl:7b", "org/my-Qwen2-5-VL"])
def test_a_name_that_says_qwen2_5_vl_counts_in_pixels(name: str) -> None:
    assert guess_box_units(name) is BoxUnits.PIXELS


@pytest.mark.parametrize("name", ["Qwen/Qwen2-VL-7B-Instruct", "qwen3-vl-235b", "gpt-5", "Qwen/Qwen2.5-7B"])
def test_any_other_counts_in_thousandths(name: str) -> None:
    assert guess_box_units(name) is BoxUnits.THOUSANDTHS


def test_numbers_are_bounded_by_the_largest_page_or_by_a_thousand() -> None:
    assert find_largest_number(BoxUnits.PIXELS, [(840, 1176), (1204, 812)]) == 1204
    assert find_largest_number(BoxUnits.THOUSANDTHS, [(840, 1176)]) == 1000
