"""JPEG 2000, AVIF and HEIF: pixels, orientation, limits before decoding."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipeline.budget import PixelBudget, RenderSettings
from pipeline.errors import DocumentError
from pipeline.render import images
from pipeline.render.document import detect_kind, open_document, render_pages
from pipeline.render.images import DocumentKind
from tests.support.pdfs import encode_image

SETTINGS = RenderSettings(PixelBudget(784, 10**6))
PICTURE = Image.effect_noise((560, 420), 60).convert("RGB").filter(ImageFilter.GaussianBlur(3))
KINDS = [DocumentKind.JPEG2000, DocumentKind.AVIF, DocumentKind.HEIF]


@pytest.fixture(autouse=True)
def _heif() -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()


def measure_error(data: bytes, expected: Image.Image) -> float:
    pixels = next(render_pages(data, SETTINGS)).pixels
    assert pixels.shape[1::-1] == expected.size
    return float(np.abs(pixels.astype(int) - np.asarray(expected.convert("RGB"))).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA"])
def test_pixels_are_those_of_the_picture(kind: DocumentKind, mode: str) -> None:
    assert measure_error(encode_image(PICTURE.convert(mode), kind, quality=95), PICTURE) < 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_transparent_is_white(kind: DocumentKind) -> None:
    clear = Image.new("RGBA", (560, 420), (0, 0, 0, 0))
    assert measure_error(encode_image(clear, kind), Image.new("RGB", (560, 420), "white")) < 2


def test_a_codestream_alone_is_a_jpeg_2000() -> None:
    data = encode_image(PICTURE, "JPEG2000", no_jp2=True)
    assert detect_kind(data) is DocumentKind.JPEG2000
    assert measure_error(data, PICTURE) == 0


@pytest.mark.parametrize("bits", [12, 16])
def test_a_jpeg_2000_of_more_bits_keeps_its_greys(bits: int) -> None:
    ramp = np.broadcast_to(np.linspace(0, 2**bits - 1, 560), (420, 560)).astype(np.uint16)
    shown = Image.fromarray(np.round(ramp / (2**bits - 1) * 255).astype(np.uint8))
    assert measure_error(encode_image(Image.fromarray(ramp), "JPEG2000"), shown) <= 1


def test_a_large_jpeg_2000_is_decoded_at_a_part_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    split = images.split_into_bands
    monkeypatch.setattr(images, "split_into_bands", lambda image, block=1: sizes.append(image.size) or split(image, block))
    page = next(render_pages(encode_image(PICTURE.resize((4480, 3360)), "JPEG2000"), RenderSettings(PixelBudget(784, 560 * 420))))
    assert sizes == [(1120, 840)]
    assert page.pixels.shape == (420, 560, 3)
    assert page.width_pt == pytest.approx(4480 / 200 * 72)
    assert np.abs(page.pixels.astype(int) - np.asarray(PICTURE)).mean() < 3


@pytest.mark.parametrize("kind", [DocumentKind.AVIF, DocumentKind.HEIF])
def test_a_photograph_is_set_upright(kind: DocumentKind) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert measure_error(encode_image(PICTURE, kind, exif=exif.tobytes(), quality=95), PICTURE.transpose(Image.Transpose.ROTATE_270)) < 2


def test_of_several_images_of_a_heif_the_primary_one_is_read() -> None:
    other = Image.new("RGB", (280, 140), "red")
    data = encode_image(other, "HEIF", save_all=True, append_images=[PICTURE], primary_index=1, quality=95)
    assert measure_error(data, PICTURE) < 2
    assert next(render_pages(data, SETTINGS)).warnings == ("several images: only the primary one is read",)


def test_of_an_animated_avif_the_first_frame_is_read() -> None:
    data = encode_image(PICTURE, "AVIF", save_all=True, append_images=[Image.new("RGB", PICTURE.size)], quality=95)
    assert measure_error(data, PICTURE) < 2
    assert "animation" in next(render_pages(data, SETTINGS)).warnings[0]


BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"mif1": "HEIF", b"mif1\0\0\0\0miafavif": "AVIF",
          b"mif1\0\0\0\0heicmif1": "HEIF", b"heic\0\0\0\0mif1avif": "HEIF"}  # fmt: skip


@pytest.mark.parametrize("brands", BRANDS)
def test_avif_and_heif_are_told_apart_by_their_brands(brands: bytes) -> None:
    assert detect_kind(struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(20)) == BRANDS[brands]


@pytest.mark.parametrize("brand", [b"isom", b"mp42", b"qt  "])
def test_a_film_is_no_document(brand: bytes) -> None:
    with pytest.raises(DocumentError, match="the content is none of PDF, PNG"):
        open_document(b"\0\0\0\x18ftyp" + brand + bytes(100), SETTINGS)


def test_without_its_package_a_heif_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "register_heif_opener", None)
    with pytest.raises(DocumentError, match="need the package pillow-heif: pip install") as caught:
        open_document(encode_image(PICTURE, "HEIF"), SETTINGS)
    assert caught.value.kind == "unsupported"
