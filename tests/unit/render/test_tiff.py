"""TIFFs of every depth and layout: the pixels are those that the samples say, whichever renderer draws them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.budget import PixelBudget, RenderSettings
from pipeline.errors import DocumentError
from pipeline.records import Page
from pipeline.render import tiff
from pipeline.render.document import open_document, render_pages
from tests.support.pdfs import encode_image
from tests.support.tiffs import (
    CIELAB,
    ICCLAB,
    LONG,
    MIN_IS_BLACK,
    MIN_IS_WHITE,
    PALETTE,
    RATIONAL,
    RGB,
    SEPARATED,
    SHORT,
    YCBCR,
    assemble_tiff,
    join_pages,
    pack_samples,
    write_tiff,
)

pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")
WIDTH, HEIGHT = 112, 84
SETTINGS = RenderSettings(PixelBudget(784, 10**6))
"""An image of 112x84 px is its own canvas under this budget: nothing is resampled."""
Shares = NDArray[np.float64]
"""Sample values between 0 and 1: (height, width, samples per pixel)."""


def make_shares(count: int) -> Shares:
    """Return gradients: to the right, downwards, to the left, upwards."""
    across, down = np.meshgrid(np.linspace(0, 1, WIDTH), np.linspace(0, 1, HEIGHT))
    return np.stack([across, down, 1 - across, 0.7 * (1 - down)][:count], axis=2)


def quantise(shares: Shares, bits: int) -> NDArray[Any]:
    return np.round(shares * (2**bits - 1)).astype(np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32)


def draw(data: bytes) -> Page:
    return next(render_pages(data, SETTINGS))


def measure_error(data: bytes, expected: Shares) -> int:
    """Return the largest difference between a page and the RGB values expected, 0 to 255."""
    pixels = draw(data).pixels
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    return int(np.abs(pixels - np.round(expected * 255)).max())


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 14, 16, 24, 32])
@pytest.mark.parametrize("photometric", [MIN_IS_WHITE, MIN_IS_BLACK])
def test_grey_of_any_depth(bits: int, photometric: int) -> None:
    samples = quantise(make_shares(1), bits)
    shown = np.repeat(samples / (2**bits - 1), 3, axis=2)
    assert measure_error(write_tiff(samples, bits, photometric), shown if photometric == MIN_IS_BLACK else 1 - shown) <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 14, 16, 24, 32])
@pytest.mark.parametrize("is_planar", [False, True])
def test_colours_of_any_depth(bits: int, is_planar: bool) -> None:
    samples = quantise(make_shares(3), bits)
    assert measure_error(write_tiff(samples, bits, RGB, is_planar=is_planar), samples / (2**bits - 1)) <= 1


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_a_palette(bits: int) -> None:
    samples, colours = quantise(make_shares(1), bits), np.random.default_rng(1).integers(0, 256, (3, 2**bits))
    data = write_tiff(samples, bits, PALETTE, tags={320: (SHORT, (colours * 257).ravel().tolist())})
    assert measure_error(data, colours[:, samples[..., 0]].transpose(1, 2, 0) / 255) <= 1


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("is_planar", [False, True])
def test_inks(bits: int, is_planar: bool) -> None:
    samples = quantise(make_shares(4), bits)
    inks = samples / (2**bits - 1)
    assert measure_error(write_tiff(samples, bits, SEPARATED, is_planar=is_planar), (1 - inks[..., :3]) * (1 - inks[..., 3:])) <= 2


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("is_planar", [False, True])
@pytest.mark.parametrize("is_premultiplied", [False, True])
def test_what_is_transparent_is_white(bits: int, is_planar: bool, is_premultiplied: bool) -> None:
    shares = make_shares(4)
    colours, opacity = shares[..., :3], shares[..., 3:]
    shares[..., :3] *= opacity if is_premultiplied else 1
    data = write_tiff(quantise(shares, bits), bits, RGB, is_planar=is_planar, tags={338: (SHORT, [1 if is_premultiplied else 2])})
    shown = shares[..., :3] if is_premultiplied else colours * opacity
    assert measure_error(data, shown + 1 - opacity) <= 2


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("count", [1, 3])
def test_floats(dtype: type, count: int) -> None:
    samples = make_shares(count).astype(dtype)
    data = write_tiff(samples, samples.itemsize * 8, RGB if count == 3 else MIN_IS_BLACK, sample_format=3)
    assert measure_error(data, np.repeat(samples.astype(float), 3 // count, axis=2)) <= 1


@pytest.mark.parametrize("bits", [16, 32])
def test_signed_colours(bits: int) -> None:
    unsigned = quantise(make_shares(3), bits).astype(np.int64)
    samples = (unsigned - 2 ** (bits - 1)).astype(f"i{bits // 8}")
    assert measure_error(write_tiff(samples, bits, RGB, sample_format=2), unsigned / (2**bits - 1)) <= 1


@pytest.mark.parametrize("is_planar", [False, True])
def test_ycbcr(is_planar: bool) -> None:
    colours = quantise(make_shares(3), 8)
    samples = np.asarray(Image.fromarray(colours).convert("YCbCr"))
    assert measure_error(write_tiff(samples, 8, YCBCR, is_planar=is_planar, tags={530: (SHORT, [1, 1])}), colours / 255) <= 3


def subsample(colours: NDArray[Any]) -> NDArray[Any]:
    """Return the colours as a TIFF stores them with one Cb and Cr for 2x2 pixels."""
    ycbcr = np.asarray(Image.fromarray(colours).convert("YCbCr")).astype(float)
    blocks = ycbcr.reshape(HEIGHT // 2, 2, WIDTH // 2, 2, 3).transpose(0, 2, 1, 3, 4).reshape(HEIGHT // 2, WIDTH // 2, 4, 3)
    return np.concatenate([blocks[..., 0], blocks[..., 1:].mean(axis=2)], axis=2).round().astype(np.uint8)


def make_subsampled(colours: NDArray[Any], **tags: tuple[int, list[int]]) -> bytes:
    shape = {256: (LONG, [WIDTH]), 257: (LONG, [HEIGHT]), 258: (SHORT, [8, 8, 8]), 277: (SHORT, [3]), 278: (LONG, [HEIGHT])}
    layout = {259: (SHORT, [1]), 262: (SHORT, [YCBCR]), 284: (SHORT, [1]), 530: (SHORT, [2, 2])}
    return assemble_tiff([subsample(colours).tobytes()], {**shape, **layout, **{int(name[1:]): tag for name, tag in tags.items()}})


def test_subsampled_ycbcr() -> None:
    colours = quantise(make_shares(3), 8)
    assert draw(make_subsampled(colours)).renderer == "tifffile"
    assert measure_error(make_subsampled(colours), colours / 255) <= 8


LAB = {"white": (100, 0, 0, (255, 255, 255)), "black": (0, 0, 0, (0, 0, 0)), "red": (54.29, 80.81, 69.89, (255, 0, 0)),
       "green": (87.82, -79.27, 80.99, (0, 255, 0)), "blue": (29.57, 68.30, -112.03, (0, 0, 255))}  # fmt: skip
"""L*, a*, b* of sRGB's colours under D50 (http://www.brucelindbloom.com/index.html?ColorCalculator.html)."""


@pytest.mark.parametrize("name", LAB)
@pytest.mark.parametrize("photometric", [CIELAB, ICCLAB])
def test_lab_of_16_bits(name: str, photometric: int) -> None:
    light, red, yellow, rgb = LAB[name]
    stored = np.array([light / 100 * (65280 if photometric == ICCLAB else 65535), red * 256, yellow * 256])
    stored[1:] += 32768 if photometric == ICCLAB else 0
    samples = np.broadcast_to(np.round(stored).astype(np.int64) % 65536, (HEIGHT, WIDTH, 3)).astype(np.uint16)
    page = draw(write_tiff(samples, 16, photometric))
    assert page.renderer == "tifffile"
    assert np.abs(page.pixels.astype(int) - rgb).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("is_libtiff", [False, True], ids=["tifffile", "libtiff"])
def test_it_is_set_upright(orientation: int, is_libtiff: bool) -> None:
    shares = np.zeros((HEIGHT, WIDTH, 3))
    shares[:28, :28] = 1  # a white square in the corner that is stored first
    colours, tag = quantise(shares, 10), (SHORT, [orientation])
    data = make_subsampled(quantise(shares, 8), t274=tag) if is_libtiff else write_tiff(colours, 10, RGB, tags={274: tag})
    pixels = draw(data).pixels[..., 1]
    assert pixels.shape == ((WIDTH, HEIGHT) if orientation > 4 else (HEIGHT, WIDTH))
    bottom, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    assert pixels[-14 if bottom else 14, -14 if right else 14] > 240
    assert (pixels > 128).mean() == pytest.approx(28 * 28 / (HEIGHT * WIDTH), abs=0.01)


def test_it_has_the_resolution_that_it_states() -> None:
    tags = {282: (RATIONAL, [100, 1]), 283: (RATIONAL, [100, 1]), 296: (SHORT, [2])}
    assert draw(write_tiff(quantise(make_shares(3), 10), 10, RGB, tags=tags)).width_pt == pytest.approx(WIDTH / 100 * 72)


# ---- Pages --------------------------------------------------------------------------------------------------------


def make_page(bits: int) -> tuple[list[bytes], dict[int, tuple[int, list[int]]]]:
    shape = {256: (LONG, [WIDTH]), 257: (LONG, [HEIGHT]), 258: (SHORT, [bits] * 3), 277: (SHORT, [3]), 278: (LONG, [HEIGHT])}
    layout = {259: (SHORT, [1]), 262: (SHORT, [RGB]), 284: (SHORT, [1])}
    return [pack_samples(quantise(make_shares(3), bits), bits)], {**shape, **layout}


def test_pages_behind_one_that_pillow_cannot_read_are_not_lost() -> None:
    opened = open_document(join_pages([make_page(bits) for bits in (8, 10, 8, 10)]), SETTINGS)
    assert opened.page_count == 4
    assert [opened.draw(page_no).renderer for page_no in range(1, 5)] == ["", "tifffile", "", "tifffile"]


def test_too_many_pages_that_pillow_cannot_read() -> None:
    with pytest.raises(DocumentError) as caught:
        open_document(join_pages([make_page(10)] * 8), RenderSettings(SETTINGS.budget, max_pages=5))
    assert caught.value.kind == "too_many_pages"


# ---- Damage and limits --------------------------------------------------------------------------------------------


def find_kind(data: bytes, settings: RenderSettings = SETTINGS) -> DocumentError:
    with pytest.raises(DocumentError) as caught:
        list(render_pages(data, settings))
    return caught.value


def test_a_page_whose_data_is_cut_off_is_broken() -> None:
    strips, tags = make_page(10)
    whole = assemble_tiff(strips, tags)
    assert find_kind(whole.replace(b"\x11\x01\4\0\1\0\0\0\x08\0\0\0", b"\x11\x01\4\0\1\0\0\0\xff\0\1\0")).kind == "broken"
    place = make_subsampled(quantise(make_shares(3), 8)).replace(b"\x11\x01\4\0\1\0\0\0\x08\0\0\0", b"\x11\x01\4\0\1\0\0\0\xff\0\1\0")
    assert find_kind(place).kind == "broken"


def test_a_cut_off_compressed_page_is_broken() -> None:
    data = encode_image(Image.effect_noise((300, 300), 90), "TIFF", compression="tiff_lzw")
    start = data.index(b"\x80")
    assert find_kind(data[:start] + bytes(5000) + data[start + 5000 :]).kind == "broken"


@pytest.mark.parametrize("bits", [8, 10])
def test_a_page_that_claims_too_many_pixels_is_not_decoded(bits: int) -> None:
    strips, tags = make_page(bits)
    failure = find_kind(assemble_tiff(strips, {**tags, 256: (LONG, [10**5]), 257: (LONG, [10**5])}))
    assert failure.kind == "too_large"
    assert "max_image_megapixels" in failure.message


def test_without_its_packages_the_failure_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff, "tifffile", None)
    failure = find_kind(write_tiff(quantise(make_shares(3), 10), 10, RGB))
    assert failure.kind == "unsupported"
    assert "tifffile and imagecodecs: pip install" in failure.message
