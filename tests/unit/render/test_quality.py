"""Measures of a page image move with what they are measures of."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipeline.demo import documents, drawing
from pipeline.records import Pixels
from pipeline.render.quality import measure_quality


@pytest.fixture(scope="module")
def page() -> Pixels:
    return drawing.rasterize_sheet(documents.draw_sample(3, "invoice").sheets[0])


def test_a_clean_page_is_sharp_even_and_without_noise(page: Pixels) -> None:
    found = measure_quality(page)
    assert (found["contrast"], found["noise"], found["unevenness"]) == (pytest.approx(1.0, abs=0.02), 0.0, 0.0)
    assert found["sharpness"] > 0.8


def test_blur_lowers_sharpness(page: Pixels) -> None:
    blurred = np.asarray(Image.fromarray(page).filter(ImageFilter.GaussianBlur(1.0)))
    assert measure_quality(blurred)["sharpness"] < 0.7 * measure_quality(page)["sharpness"]


def test_pale_print_lowers_contrast(page: Pixels) -> None:
    pale = (90 + page * (130 / 255)).astype(np.uint8)
    assert measure_quality(pale)["contrast"] == pytest.approx(130 / 255, abs=0.02)


def test_light_from_one_side_is_uneven(page: Pixels) -> None:
    light = np.linspace(1.0, 0.8, page.shape[1])[None, :, None]
    assert measure_quality((page * light).astype(np.uint8))["unevenness"] == pytest.approx(0.15, abs=0.03)


def test_noise_is_measured(page: Pixels) -> None:
    noise = np.random.default_rng(0).normal(0, 6, page.shape[:2])[..., None]
    assert measure_quality((page * 0.8 + 20 + noise).clip(0, 255).astype(np.uint8))["noise"] > 0.015


def test_the_smallest_page_and_one_without_ink_are_measured() -> None:
    assert measure_quality(np.full((28, 28, 3), 255, np.uint8))["contrast"] == pytest.approx(1 / 255)
