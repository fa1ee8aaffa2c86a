"""Boxes that a vision-language model names: the four numbers of its answer and the size of the image in, a box in its pixels out.

    pixels        of the image as the model sees it, which is the page image: Qwen2.5-VL
    thousandths   of its width and of its height: Qwen2-VL, Qwen3-VL

Qwen2-VL normalizes coordinates to [0, 1000) (arXiv:2409.12191), Qwen2.5-VL uses those of the image after `smart_resize`
(github.com/QwenLM/Qwen3-VL/issues/866), Qwen3-VL went back to 0 to 1000 (its documentation, quoted in
github.com/QwenLM/Qwen3-VL/issues/1741).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum

from pipeline.evidence.page_index import Box

LEAST_SIDE_PX = 4.0
"""Of a box: no letter that a model reads is smaller."""
MOST_OF_PAGE = 0.25
"""Of a page's area: a box of more says of no value where it stands, and its reading would have most values of the page."""
PIXEL_NAMES = re.compile(r"qwen-?_?2[._-]?5-?_?vl", re.IGNORECASE)


class BoxUnits(StrEnum):
    """In what a model counts."""

    PIXELS = "pixels"
    THOUSANDTHS = "thousandths"


FAMILIES = {
    "qwen2_vl": BoxUnits.THOUSANDTHS,
    "qwen2_5_vl": BoxUnits.PIXELS,
    "qwen3_vl": BoxUnits.THOUSANDTHS,
    "qwen3_vl_moe": BoxUnits.THOUSANDTHS,
}
"""By the `model_type` of a checkpoint's config.json."""


def guess_box_units(model: str) -> BoxUnits:
    """Return in what a model of this name counts: pixels if it is a Qwen2.5-VL, else thousandths, as most models do."""
    return BoxUnits.PIXELS if PIXEL_NAMES.search(model) else BoxUnits.THOUSANDTHS


def find_largest_number(units: BoxUnits, sizes: Sequence[tuple[int, int]]) -> int:
    """Return the largest number that a box may have on images of these sizes, (width_px, height_px)."""
    return 1000 if units is BoxUnits.THOUSANDTHS else max(map(max, sizes))


def convert_box(numbers: Sequence[float], units: BoxUnits, width_px: int, height_px: int) -> Box | None:
    """Return the box of an answer, [x, y, x, y], in the image's pixels, its corners in order and cut at the image's edges.

    None for one that is empty there, or covers more than `MOST_OF_PAGE`.
    """
    across, down = (width_px / 1000, height_px / 1000) if units is BoxUnits.THOUSANDTHS else (1.0, 1.0)
    left, right = sorted(min(max(number * across, 0.0), float(width_px)) for number in numbers[::2])
    top, bottom = sorted(min(max(number * down, 0.0), float(height_px)) for number in numbers[1::2])
    width, height = right - left, bottom - top
    if min(width, height) < LEAST_SIDE_PX or width * height > MOST_OF_PAGE * width_px * height_px:
        return None
    return left, top, right, bottom
