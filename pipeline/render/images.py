"""An image's bytes -> its pages, by Pillow. Knows no PDF.

Memory: an image is decoded whole, 1 to 4 bytes a pixel (a WebP 16), but for a JPEG, which is decoded at 1/2, 1/4 or 1/8
where that is enough; in RGB it never exists at full size. So 100 megapixels cost 1.6 MB as a JPEG and 400 MB as a PNG.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import StrEnum

import numpy as np
from PIL import Image

from pipeline.budget import ImageSize, RenderSettings, count_visual_tokens, fit_content, fit_image
from pipeline.errors import DocumentError
from pipeline.records import Page, Pixels
from pipeline.render.errors import MAX_WARNINGS, clean_text, convert_library_errors


class DocumentKind(StrEnum):
    """Each value is Pillow's name for it, but for PDF."""

    PDF = "PDF"
    PNG = "PNG"
    JPEG = "JPEG"
    TIFF = "TIFF"
    WEBP = "WEBP"
    GIF = "GIF"
    BMP = "BMP"


ASSUMED_DPI = 200.0
BAND_PIXELS = 4_000_000
REDUCE_ABOVE = 3
"""Before the one resampling, whole blocks of a much larger image are averaged, down to this many times the target:
Pillow's `reducing_gap`, where 3.0 is as good as none."""
ORIENTATION = 0x0112
PHOTOMETRIC = 0x0106
TURN = Image.Transpose
TURNED = (TURN.FLIP_LEFT_RIGHT, TURN.ROTATE_180, TURN.FLIP_TOP_BOTTOM, TURN.TRANSPOSE, TURN.ROTATE_270, TURN.TRANSVERSE, TURN.ROTATE_90)
TURNS = dict(enumerate(TURNED, 2))
"""EXIF orientation -> what sets the picture upright."""
SWAPPING = TURNED[3:]


def open_image(data: bytes, kind: DocumentKind, settings: RenderSettings) -> tuple[int, Callable[[int], Page]]:
    """Return an image's page count and what draws a page. Frames are pages in a TIFF; of an animation only the first is read."""
    # Pillow's own bomb check warns at 89 and raises at 179 megapixels; `max_image_pixels` stands in its place.
    Image.MAX_IMAGE_PIXELS = None
    if kind is DocumentKind.WEBP:
        check_webp(data, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=[kind])
        page_count = count_frames(image, settings.max_pages) if kind is DocumentKind.TIFF else 1
    whole = (*image.size, len(image.getbands()), 2)

    def draw(page_no: int) -> Page:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            image.seek(page_no - 1)
            try:
                page = draw_image(image, page_no, settings)
            except OSError:
                if "progressive" in image.info:
                    np.empty(whole, np.uint8)  # libjpeg holds such an image whole, and calls it broken when it cannot
                raise
        texts = dict.fromkeys(clean_text(str(warning.message)) for warning in caught)
        return replace(page, warnings=(*page.warnings, *texts)[:MAX_WARNINGS])

    return page_count, draw


def check_webp(data: bytes, settings: RenderSettings) -> None:
    """Raise DocumentError when a WebP's canvas is too large: Pillow makes room for it twice when it opens the file.

    And says of a lack of memory only that it "could not create decoder object", as of any other damage.
    """
    chunk = data[12:16]
    if chunk == b"VP8X":
        size = ImageSize(1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little"))
    elif chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        size = ImageSize(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    else:
        size = ImageSize(*(int.from_bytes(data[place : place + 2], "little") & 0x3FFF for place in (26, 28)))
    check_image_size(size.width_px, size.height_px, settings)
    np.empty((size.height_px, size.width_px, 2, 4), np.uint8)  # asked for and given back: a MemoryError has a name


def check_image_size(width_px: int, height_px: int, settings: RenderSettings) -> None:
    """Raise DocumentError when an image has more pixels than the job allows."""
    if width_px * height_px > settings.max_image_pixels:
        allowed = f"`limits.max_image_megapixels` allows {settings.max_image_pixels / 1e6:g} megapixels"
        raise DocumentError("too_large", f"the image has {width_px}x{height_px} px; {allowed}")


def count_frames(image: Image.Image, most: int) -> int:
    """Return how many frames there are, counted no further than one more than `most`.

    The first that cannot be found ends the count and is in it: what stands behind a damaged link is a page that fails.
    """
    for frame in range(1, most + 1):
        try:
            with convert_library_errors(f"frame {frame + 1}"):
                if not has_frame(image, frame):
                    return frame
        except DocumentError:
            return frame + 1
    return most + 1


def has_frame(image: Image.Image, frame: int) -> bool:
    try:
        image.seek(frame)
    except EOFError:
        return False
    return True


def draw_image(image: Image.Image, page_no: int, settings: RenderSettings) -> Page:
    """Return an image as a page: upright, RGB on white, resampled once."""
    # 1) what it measures, upright, in its own pixels and on paper
    check_image_size(image.width, image.height, settings)
    x_dpi, y_dpi = read_dpi(image)
    turn = find_orientation(image)
    turned = turn in SWAPPING
    if turned:
        x_dpi, y_dpi = y_dpi, x_dpi
    if image.format == DocumentKind.TIFF:
        image.load()
        turn, turned = None, False
    upright = image.size[::-1] if turned else image.size
    # 2) its place on the canvas
    width_px, height_px = square_pixels(*upright, x_dpi, y_dpi)
    canvas = fit_image(width_px, height_px, settings.budget)
    inner = fit_content(width_px, height_px, canvas)
    # 3) its pixels
    target = (inner.height_px, inner.width_px) if turned else (inner.width_px, inner.height_px)
    small = resample_image(image, target)
    pixels = pad_with_white(np.asarray(small if turn is None else small.transpose(turn)), canvas)
    # 4) the page
    width_pt, height_pt = upright[0] / x_dpi * 72, upright[1] / y_dpi * 72
    dpi = 72 * math.sqrt(inner.width_px * inner.height_px / (width_pt * height_pt))
    animated = image.format in (DocumentKind.GIF, DocumentKind.WEBP, DocumentKind.PNG) and getattr(image, "is_animated", False)
    notes = ("an animation: only its first frame is read",) if animated else ()
    return Page(page_no, pixels, dpi, width_pt, height_pt, count_visual_tokens(canvas), (), notes)


def find_orientation(image: Image.Image) -> Image.Transpose | None:
    """Return what sets an image upright, by its EXIF orientation. Pillow turns a TIFF itself, when it is loaded."""
    tags = getattr(image, "tag_v2", None) or image.getexif()
    return TURNS.get(tags.get(ORIENTATION, 1))


def read_dpi(image: Image.Image) -> tuple[float, float]:
    """Return the dpi that an image states of itself, else the assumed one."""
    try:
        x_dpi, y_dpi = (float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return ASSUMED_DPI, ASSUMED_DPI
    believable = all(20 <= value <= 10_000 for value in (x_dpi, y_dpi)) and 1 / 3 <= x_dpi / y_dpi <= 3
    return (x_dpi, y_dpi) if believable else (ASSUMED_DPI, ASSUMED_DPI)


def square_pixels(width_px: int, height_px: int, x_dpi: float, y_dpi: float) -> tuple[int, int]:
    """Return the natural size in square pixels: a fax of 204x98 dpi has half the rows it should."""
    finest = max(x_dpi, y_dpi)
    return round(width_px * finest / x_dpi), round(height_px * finest / y_dpi)


def resample_image(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """Return the image in RGB at this size, in the filter that Qwen's own processor uses.

    Large ones never exist in RGB at full size: a JPEG is decoded at 1/2, 1/4 or 1/8, others are converted and
    averaged band by band.
    """
    width, height = map(float, image.size)
    if drafted := image.draft(None, (2 * target[0], 2 * target[1])):  # only a JPEG has one, also as one of several in an MPO
        *_, width, height = drafted[1]
    block = int(max(1, min(width / target[0], height / target[1]) // REDUCE_ABOVE))
    lightness = find_levels(image)
    reduced = Image.new("RGB", (math.ceil(image.width / block), math.ceil(image.height / block)))
    for top, band in split_into_bands(image, block):
        reduced.paste(convert_to_rgb(band, lightness).reduce(block), (0, top // block))
    return reduced.resize(target, Image.Resampling.BICUBIC, box=(0, 0, width / block, height / block))


def split_into_bands(image: Image.Image, block: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """Yield an image in bands of a few million pixels, each with its top row, a multiple of `block`."""
    rows = block * max(1, BAND_PIXELS // (image.width * block))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def convert_to_rgb(band: Image.Image, lightness: tuple[float, float] | None) -> Image.Image:
    """Return a band in RGB: deep greys scaled to 0..255, transparency on white."""
    if lightness is not None:
        black, white = lightness
        values = np.nan_to_num(np.asarray(band, np.float64), nan=white)
        scaled = np.clip((values - black) / (white - black), 0, 1) * 255
        return Image.fromarray(np.round(scaled).astype(np.uint8)).convert("RGB")
    if band.has_transparency_data:
        inked = band.convert("RGBA")
        page = Image.new("RGB", band.size, "white")
        page.paste(inked, mask=inked.getchannel("A"))
        return page
    return band.getchannel("L").convert("RGB") if band.mode == "LAB" else band.convert("RGB")


def find_levels(image: Image.Image) -> tuple[float, float] | None:
    """Return the values of black and white in an image of more than 8 bits a pixel, None for all others.

    Pillow's own conversion clips at 255, which turns a 16-bit scan pure white. White is the largest value of the
    smallest depth that holds all pixels, because 12-bit scans come in 16-bit files.
    """
    if not image.mode.startswith(("I", "F")):
        return None
    low, high = 0.0, 0.0
    for _, band in split_into_bands(image):
        values = np.asarray(band, np.float64)
        low = min(low, np.min(values, where=np.isfinite(values), initial=low))
        high = max(high, np.max(values, where=np.isfinite(values), initial=high))
    white = next((float(largest) for largest in (1, 255, 1023, 4095, 16383, 65535) if high <= largest), high)
    inverted = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0
    return (white, low) if inverted else (low, white)


def pad_with_white(pixels: Pixels, canvas: ImageSize) -> Pixels:
    """Return pixels at the top left of a white canvas, or themselves where they fill it."""
    if pixels.shape[:2] == (canvas.height_px, canvas.width_px):
        return pixels
    page = np.full((canvas.height_px, canvas.width_px, 3), 0xFF, np.uint8)
    page[: pixels.shape[0], : pixels.shape[1]] = pixels
    return page


def encode_page_png(pixels: Pixels) -> bytes:
    """Return a page image as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
