"""Pixel budget: takes the size of a page and a budget of pixels, and returns the canvas (width and height) that the model reads.

Qwen2-VL and Qwen2.5-VL read an image in cells of 28x28 px, Qwen3-VL in cells of 32x32 px, one visual token each. Their image
processor resizes every image with `smart_resize`; a canvas from here is one that `smart_resize` does not change, so a page drawn
at that size is never resampled again and its token count is known before anything is drawn. An A4 page (595x842 pt) under the
default budget, in cells of 28 px: 1653x2339 px at 200 dpi -> canvas 840x1176 px = 1,260 tokens, about 101 dpi.

A page fills its canvas if that changes its proportions by at most `MAX_STRETCH`. If the grid of cells is too coarse for
that (a 20:1 strip, a fixed size, an aspect ratio beyond Qwen's 200), the page keeps its proportions at the top left and
the rest of the canvas is white: no page is squashed or cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

CELL_PX = 28
"""Side of a cell where a checkpoint says nothing else: that of Qwen2-VL and Qwen2.5-VL."""
CELL_AREA = CELL_PX * CELL_PX
A4_PT = (595.0, 842.0)
MAX_RATIO = 200
MAX_STRETCH = 1.05
MAX_TOKENS = 16384
"""The maximum of the published image processors (12845056 px in cells of 28 px, 16777216 px in cells of 32 px)."""


@dataclass(frozen=True)
class PixelBudget:
    """Bounds of a page image's area in pixels; or, if both `resized_*` are set, one fixed size that ignores the bounds."""

    min_pixels: int = 256 * CELL_AREA
    max_pixels: int = 1280 * CELL_AREA
    resized_height: int | None = None
    resized_width: int | None = None
    cell_px: int = CELL_PX
    """Side of the square that one visual token covers: a patch times the merge of patches, `factor` in transformers."""

    @property
    def cell_area(self) -> int:
        """Pixels of one visual token."""
        return self.cell_px * self.cell_px


@dataclass(frozen=True)
class ImageSize:
    """Width and height of an image."""

    width_px: int
    height_px: int


@dataclass(frozen=True)
class RenderSettings:
    """How documents are rendered, and the limits at which one fails."""

    budget: PixelBudget = field(default_factory=PixelBudget)
    dpi: float = 200.0
    password: str | None = field(default=None, repr=False)
    max_pages: int = 2000
    max_file_bytes: int = 256 * 2**20
    max_image_pixels: int = 300_000_000
    timeout_s: float = 60.0
    """Limit for opening a document, and for drawing each of its pages."""
    memory_bytes: int = 2 * 2**30
    """Address space of a renderer on top of that of an idle one."""
    text_layer: bool = False
    """Whether the words of a PDF page's text layer are read, which takes as long as drawing it: 4 ms for 720 words."""


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int, factor: int = CELL_PX) -> tuple[int, int]:
    """Return the (height, width) to which Qwen-VL's image processor resizes an image.

    The arithmetic of `smart_resize` in transformers' `image_processing_qwen2_vl`; the one in `qwen_vl_utils.vision_process`
    differs only for images of less than half a cell. Raises ValueError beyond an aspect ratio of 200.
    """
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_RATIO:
        raise ValueError(f"an image of {width}x{height} px has an aspect ratio of {ratio:.0f}; at most {MAX_RATIO} is allowed")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor * factor > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor * factor < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def fit_page(width_pt: float, height_pt: float, dpi: float, budget: PixelBudget) -> ImageSize:
    """Return the canvas for a page of paper: its size at `dpi`, fitted to the budget."""
    return fit_image(max(1, round(width_pt / 72 * dpi)), max(1, round(height_pt / 72 * dpi)), budget)


def fit_image(width_px: int, height_px: int, budget: PixelBudget) -> ImageSize:
    """Return the canvas for an image of this natural size: the result of `smart_resize`, if that is stable.

    It is not for aspect ratios beyond 200, and if its rounding leaves the budget (narrow budgets, long strips), so that
    it would resize its own result. Such an image gets the allowed canvas on which it is largest.
    """
    if budget.resized_width and budget.resized_height:
        return ImageSize(round_to_cell(budget.resized_width, budget.cell_px), round_to_cell(budget.resized_height, budget.cell_px))
    if max(width_px, height_px) <= MAX_RATIO * min(width_px, height_px):
        height, width = smart_resize(height_px, width_px, budget.min_pixels, budget.max_pixels, budget.cell_px)
        if is_stable(ImageSize(width, height), budget):
            return ImageSize(width, height)
    return max(list_canvases(width_px, height_px, budget), key=lambda size: rank_canvas(width_px, height_px, size, budget.cell_px))


def fit_content(width: float, height: float, canvas: ImageSize) -> ImageSize:
    """Return the part of the canvas, from its top left, that a page of these proportions covers."""
    across, down = canvas.width_px / width, canvas.height_px / height
    if max(across, down) <= MAX_STRETCH * min(across, down):
        return canvas
    scale = min(across, down)
    return ImageSize(max(1, round(width * scale)), max(1, round(height * scale)))


def count_visual_tokens(size: ImageSize, cell_px: int = CELL_PX) -> int:
    """Return the number of tokens that a model with cells of this size reads for an image."""
    return size.width_px * size.height_px // (cell_px * cell_px)


def compute_area_bounds(budget: PixelBudget) -> tuple[int, int]:
    """Return the least and largest area of the pages under this budget, with which an image processor resizes none of them."""
    if budget.resized_height and budget.resized_width:
        size = fit_image(1, 1, budget)
        return size.width_px * size.height_px, size.width_px * size.height_px
    return budget.min_pixels, budget.max_pixels


def is_stable(size: ImageSize, budget: PixelBudget) -> bool:
    """Return whether `smart_resize` leaves a canvas made of whole cells unchanged."""
    short, long = sorted((size.width_px, size.height_px))
    return long <= MAX_RATIO * short and budget.min_pixels <= short * long <= budget.max_pixels


def check_budget(budget: PixelBudget) -> None:
    """Raise ValueError with a sentence if no page fits the budget."""
    if budget.resized_height is not None or budget.resized_width is not None:
        return check_fixed_size(budget)
    if budget.min_pixels < 1:
        raise ValueError(f"min_pixels is {budget.min_pixels}; it must be positive")
    if budget.max_pixels < budget.min_pixels:
        raise ValueError(f"max_pixels ({budget.max_pixels}) is less than min_pixels ({budget.min_pixels})")
    most = MAX_TOKENS * budget.cell_area
    if budget.max_pixels > most:
        raise ValueError(f"max_pixels is {budget.max_pixels}; at most {most} ({MAX_TOKENS} visual tokens) is allowed")
    if not any(list_canvases(1, 1, budget)):
        raise ValueError(
            f"no whole number of {budget.cell_px}x{budget.cell_px} px cells has between min_pixels ({budget.min_pixels}) "
            f"and max_pixels ({budget.max_pixels}); allow a wider range"
        )
    return None


def check_fixed_size(budget: PixelBudget) -> None:
    """Raise ValueError with a sentence if a fixed size is incomplete or larger than the model reads."""
    height_px, width_px = budget.resized_height, budget.resized_width
    if height_px is None or width_px is None:
        raise ValueError("resized_height and resized_width go together: give both or neither")
    if height_px < 1 or width_px < 1:
        raise ValueError(f"resized_height ({height_px}) and resized_width ({width_px}) must be positive")
    size = fit_image(1, 1, budget)
    if not is_stable(size, PixelBudget(1, MAX_TOKENS * budget.cell_area)):
        raise ValueError(
            f"resized_width x resized_height is {size.width_px}x{size.height_px} px in whole cells; allowed are at most "
            f"{MAX_TOKENS} visual tokens and an aspect ratio of {MAX_RATIO}"
        )


def round_to_cell(length_px: float, cell_px: int) -> int:
    """Return the nearest multiple of a cell's side, at least one cell."""
    return max(cell_px, round(length_px / cell_px) * cell_px)


def list_canvases(width_px: int, height_px: int, budget: PixelBudget) -> Iterator[ImageSize]:
    """Yield the candidate canvases for a page, all stable: for each number of rows the fewest columns, and those that a page fills."""
    cell_px = budget.cell_px
    fewest, most = math.ceil(budget.min_pixels / budget.cell_area), budget.max_pixels // budget.cell_area
    for rows in range(1, most + 1):
        low = max(1, math.ceil(fewest / rows), math.ceil(rows / MAX_RATIO))
        high = min(most // rows, MAX_RATIO * rows)
        if low <= high:
            for columns in (low, math.ceil(width_px / cell_px), math.ceil(rows * width_px / height_px)):
                yield ImageSize(min(max(low, columns), high) * cell_px, rows * cell_px)


def rank_canvas(width_px: int, height_px: int, size: ImageSize, cell_px: int) -> tuple[float, int, float]:
    """Return the sort key of a canvas: the largest scale up to natural size, then the fewest tokens, then the largest scale."""
    scale = min(size.width_px / width_px, size.height_px / height_px)
    return min(scale, 1.0), -count_visual_tokens(size, cell_px), scale
