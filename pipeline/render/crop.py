"""Crop of a page image: the part in a box with a margin around it, enlarged onto a canvas that the model does not resample."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipeline.budget import PixelBudget, fit_content, fit_image
from pipeline.records import Pixels
from pipeline.render.images import pad_with_white

MOST_ENLARGEMENT = 2.0
"""More shows a model nothing: the pixels are those of the page image."""
LEAST_ENLARGEMENT = 1.2
"""Below this a part shows nothing that the page beside it does not."""


def crop_page(
    pixels: Pixels, box_px: tuple[float, float, float, float], margins_px: tuple[float, float], budget: PixelBudget
) -> Pixels | None:
    """Return the enlarged part of a page image, (height_px, width_px, 3); None where the budget leaves no room to enlarge it.

    `box_px` is x0, y0, x1, y1 in the page image, `margins_px` what is kept beside it, and above and below it.
    """
    height_px, width_px = pixels.shape[:2]
    across, down = margins_px
    left, top = max(0.0, box_px[0] - across), max(0.0, box_px[1] - down)
    right, bottom = min(float(width_px), box_px[2] + across), min(float(height_px), box_px[3] + down)
    width, height = right - left, bottom - top
    if width < 1 or height < 1:
        return None
    canvas = fit_image(round(MOST_ENLARGEMENT * width), round(MOST_ENLARGEMENT * height), budget)
    content = fit_content(width, height, canvas)
    if content.width_px < LEAST_ENLARGEMENT * width:
        return None
    size = (content.width_px, content.height_px)
    part = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return pad_with_white(np.asarray(part), canvas)
