"""Image renderer on Pillow: takes the bytes of an image and returns its pages, which are drawn one by one.

Memory: an image is decoded whole, with 1 to 4 bytes a pixel (an AVIF 8, a WebP 16), except a JPEG or JPEG 2000, which is decoded at
1/2, 1/4 or 1/8 of its size if that is enough; it never exists in RGB at full size. So 100 megapixels take 1.6 MB as a JPEG and
400 MB as a PNG. The size in a header is compared with the limit before a decoder allocates anything.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

try:
    from pillow_heif import register_heif_opener
except ImportError:
    register_heif_opener = None  # type: ignore[assignment]

from pipeline.budget import ImageSize, RenderSettings, count_visual_tokens, fit_content, fit_image
from pipeline.errors import DocumentError
from pipeline.records import Page, PageMeasure, Pixels
from pipeline.render.errors import MAX_WARNINGS, clean_text, convert_library_errors
from pipeline.render.fallback import OpenPages
from pipeline.version import DISTRIBUTION


class DocumentKind(StrEnum):
    """The supported kinds of documents. Each value except PDF is Pillow's name of the format."""

    PDF = "PDF"
    PNG = "PNG"
    JPEG = "JPEG"
    TIFF = "TIFF"
    WEBP = "WEBP"
    GIF = "GIF"
    BMP = "BMP"
    JPEG2000 = "JPEG2000"
    AVIF = "AVIF"
    HEIF = "HEIF"


READERS = (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
"""Pillow's modules for these formats, and those that it imports with the first image, whatever its format. They are imported here
because a confined renderer opens no files (`confine.py`)."""
FIRST_FRAME = "an animation: only its first frame is read"
ANIMATION_NOTES: dict[str, str] = {
    **dict.fromkeys((DocumentKind.GIF, DocumentKind.WEBP, DocumentKind.PNG, DocumentKind.AVIF), FIRST_FRAME),
    DocumentKind.HEIF: "several images: only the primary one is read",
}
ASSUMED_DPI = 200.0
BAND_PIXELS = 4_000_000
REDUCE_ABOVE = 3
"""Before it is resampled, a much larger image is averaged in whole blocks to this many times the target size: Pillow's
`reducing_gap`, for which 3.0 gives nearly the result of no reduction."""
ORIENTATION = 0x0112
IMAGE_WIDTH, IMAGE_LENGTH = 256, 257
PHOTOMETRIC = 0x0106
BITS_PER_SAMPLE, PLANAR_CONFIGURATION, SAMPLE_FORMAT = 258, 284, 339
UNSIGNED = 1
SEPARATE_PLANES = 2
Transpose = Image.Transpose
TRANSPOSES = (
    Transpose.FLIP_LEFT_RIGHT,
    Transpose.ROTATE_180,
    Transpose.FLIP_TOP_BOTTOM,
    Transpose.TRANSPOSE,
    Transpose.ROTATE_270,
    Transpose.TRANSVERSE,
    Transpose.ROTATE_90,
)
TRANSPOSE_BY_ORIENTATION = dict(enumerate(TRANSPOSES, 2))
"""EXIF orientation -> the transpose that makes the image upright."""
SWAPPING_TRANSPOSES = TRANSPOSES[3:]
"""The transposes that swap width and height."""
ISPE = re.compile(rb"ispe\0\0\0\0(.{8})", re.DOTALL)
"""The box of an AVIF or HEIF file that holds the width and height of one of its images: of the whole picture, a tile or a thumbnail."""
JP2_IHDR = re.compile(rb"\0\0\0\x16ihdr(.{8})", re.DOTALL)
J2K_SIZ = re.compile(rb"\xff\x4f\xff\x51.{4}(.{16})", re.DOTALL)
J2K_COD = re.compile(rb"\xff\x52\0.{6}(.)", re.DOTALL)
"""The segment of a JPEG 2000 codestream that holds how often it can be halved."""
DECODER_BYTES = {DocumentKind.JPEG2000: 5, DocumentKind.AVIF: 4, DocumentKind.HEIF: 4}
"""Kind -> about how many bytes per pixel and channel its decoder needs, which reports a lack of memory as damage."""


def open_image(data: bytes, settings: RenderSettings, kind: DocumentKind) -> OpenPages:
    """Return the pages of an image.

    The frames of a TIFF are pages; of an animation only the first frame is read, of a HEIF only its primary image. Raises
    DocumentError and Pillow's errors.
    """
    # Pillow's own check for decompression bombs warns at 89 and raises at 179 megapixels; `max_image_pixels` replaces it.
    Image.MAX_IMAGE_PIXELS = None
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # documents are drawn side by side in other processes
    check_header(data, kind, settings)
    if kind is DocumentKind.HEIF:
        register_heif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=[kind])
        first_frame = image.tell()  # the primary image of a HEIF, otherwise 0
        page_count, is_complete = count_frames(image, settings.max_pages) if kind is DocumentKind.TIFF else (1, True)
    decoded_shape = (*image.size, len(image.getbands()), DECODER_BYTES.get(kind, 2))
    levels = count_halvings(data) if kind is DocumentKind.JPEG2000 else 0

    def draw(page_no: int) -> Page:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            image.seek(first_frame + page_no - 1)
            try:
                page = draw_image(image, page_no, settings, levels)
            except (OSError, ValueError, RuntimeError):
                if "progressive" in image.info or kind in DECODER_BYTES:
                    # Such a decoder holds an image whole, and reports a lack of memory as damage; this raises MemoryError instead.
                    np.empty(decoded_shape, np.uint8)
                raise
        texts = dict.fromkeys(clean_text(str(warning.message)) for warning in caught)
        return replace(page, warnings=(*page.warnings, *texts)[:MAX_WARNINGS])

    def measure(page_no: int) -> PageMeasure:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.seek(first_frame + page_no - 1)
            return measure_image(image, settings)

    return OpenPages(page_count, draw, is_complete, measure)


def register_heif() -> None:
    """Have Pillow read HEIF, as phones write it. Raises DocumentError where the package for it is not installed."""
    if register_heif_opener is None:
        raise DocumentError("unsupported", f"HEIF images (HEIC) need the package pillow-heif: pip install '{DISTRIBUTION}[formats]'")
    register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)


def check_header(data: bytes, kind: DocumentKind, settings: RenderSettings) -> None:
    """Raise DocumentError if the header of an image whose decoder allocates early, or has limits of its own, claims too many pixels."""
    if kind is DocumentKind.WEBP:
        check_webp(data, settings)
    elif kind in (DocumentKind.AVIF, DocumentKind.HEIF):
        check_boxes(data)
        for width_px, height_px in (struct.unpack(">II", found) for found in ISPE.findall(data)):
            check_image_size(width_px, height_px, settings)
    elif kind is DocumentKind.JPEG2000:
        if header := JP2_IHDR.search(data):
            height_px, width_px = struct.unpack(">II", header[1])
            check_image_size(width_px, height_px, settings)
        if header := J2K_SIZ.search(data):
            right, bottom, left, top = struct.unpack(">4I", header[1])
            check_image_size(right - left, bottom - top, settings)


def check_boxes(data: bytes) -> None:
    """Raise DocumentError if an AVIF or HEIF file ends before its last box does: libheif leaves out the tiles that are missing."""
    place = 0
    while place + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, place)
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if size == 0:  # to the end of the file
            return
        place += max(size, 8)
        if place > len(data):
            raise DocumentError("broken", f"the file is cut off: its box {name!r} ends at byte {place}, the file at byte {len(data)}")


def count_halvings(data: bytes) -> int:
    """Return how often a JPEG 2000 image can be halved while it is decoded: the levels of its wavelet transform."""
    start = J2K_SIZ.search(data)
    found = J2K_COD.search(data, start.end(), start.end() + 2**16) if start else None
    return min(found[1][0], 3) if found else 0


def check_webp(data: bytes, settings: RenderSettings) -> None:
    """Raise DocumentError if a WebP's canvas is larger than allowed, MemoryError if there is no memory for it.

    Pillow allocates the canvas twice when it opens the file, and reports a lack of memory as it does damage: "could not create
    decoder object".
    """
    chunk = data[12:16]
    if chunk == b"VP8X":
        size = ImageSize(1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little"))
    elif chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        size = ImageSize(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    else:
        size = ImageSize(*(int.from_bytes(data[offset : offset + 2], "little") & 0x3FFF for offset in (26, 28)))
    check_image_size(size.width_px, size.height_px, settings)
    np.empty((size.height_px, size.width_px, 2, 4), np.uint8)  # allocated and freed at once


def check_image_size(width_px: int, height_px: int, settings: RenderSettings) -> None:
    """Raise DocumentError if an image has more pixels than the job allows."""
    if width_px * height_px > settings.max_image_pixels:
        allowed = f"`limits.max_image_megapixels` allows {settings.max_image_pixels / 1e6:g} megapixels"
        raise DocumentError("too_large", f"the image has {width_px}x{height_px} px; {allowed}")


def count_frames(image: Image.Image, most: int) -> tuple[int, bool]:
    """Return the number of frames, at most `most` + 1, and whether all of them can be read.

    A frame that cannot be read ends the count and is included in it, so that it becomes a page that fails.
    """
    for frame in range(1, most + 1):
        try:
            with convert_library_errors(f"frame {frame + 1}"):
                if not has_frame(image, frame):
                    return frame, True
        except DocumentError:
            return frame + 1, False
    return most + 1, True


def has_frame(image: Image.Image, frame: int) -> bool:
    try:
        image.seek(frame)
    except EOFError:
        return False
    return True


def draw_image(image: Image.Image, page_no: int, settings: RenderSettings, halvings: int = 0) -> Page:
    """Return an image as a page: upright, RGB on white, resampled once. Raises DocumentError if it is larger than allowed.

    A JPEG 2000 image can be decoded at half its size this many times over (`halvings`).
    """
    # 1) size upright, in its own pixels, and dpi
    check_image_size(image.width, image.height, settings)
    x_dpi, y_dpi = read_dpi(image)
    transpose = find_transpose(image)
    is_swapped = transpose in SWAPPING_TRANSPOSES
    if is_swapped:
        x_dpi, y_dpi = y_dpi, x_dpi
    if image.format == DocumentKind.TIFF:
        check_tiff_layout(image)
        image.load()  # Pillow makes a TIFF upright when it loads it
        transpose, is_swapped = None, False
    upright = image.size[::-1] if is_swapped else image.size
    # 2) size of the canvas, and of the image on it
    width_px, height_px = square_pixels(*upright, x_dpi, y_dpi)
    canvas = fit_image(width_px, height_px, settings.budget)
    inner = fit_content(width_px, height_px, canvas)
    # 3) pixels
    target = (inner.height_px, inner.width_px) if is_swapped else (inner.width_px, inner.height_px)
    small = resample_image(image, target, halvings)
    pixels = pad_with_white(np.asarray(small if transpose is None else small.transpose(transpose)), canvas)
    # 4) page
    width_pt, height_pt = upright[0] / x_dpi * 72, upright[1] / y_dpi * 72
    dpi = 72 * math.sqrt(inner.width_px * inner.height_px / (width_pt * height_pt))
    notes = (note,) if (note := ANIMATION_NOTES.get(image.format or "")) and getattr(image, "is_animated", False) else ()
    return Page(page_no, pixels, dpi, width_pt, height_pt, count_visual_tokens(canvas, settings.budget.cell_px), (), notes)


def measure_image(image: Image.Image, settings: RenderSettings) -> PageMeasure:
    """Return an image's measures as `draw_image` would draw it, from its header. Raises DocumentError if it is larger than allowed."""
    check_image_size(image.width, image.height, settings)
    x_dpi, y_dpi = read_dpi(image)
    is_swapped = find_transpose(image) in SWAPPING_TRANSPOSES
    if is_swapped:
        x_dpi, y_dpi = y_dpi, x_dpi
    tags = getattr(image, "tag_v2", {})
    stored = (int(tags[IMAGE_WIDTH]), int(tags[IMAGE_LENGTH])) if tags else image.size  # some versions of Pillow turn the size, others not
    upright = stored[::-1] if is_swapped else stored
    width_px, height_px = square_pixels(*upright, x_dpi, y_dpi)
    canvas = fit_image(width_px, height_px, settings.budget)
    inner = fit_content(width_px, height_px, canvas)
    width_pt, height_pt = upright[0] / x_dpi * 72, upright[1] / y_dpi * 72
    dpi = 72 * math.sqrt(inner.width_px * inner.height_px / (width_pt * height_pt))
    return PageMeasure(width_pt, height_pt, canvas.width_px, canvas.height_px, dpi, count_visual_tokens(canvas))


def check_tiff_layout(image: Image.Image) -> None:
    """Raise DocumentError for a TIFF whose samples Pillow 13 decodes, without an error, to other colours than those in the file."""
    tags, codecs = getattr(image, "tag_v2", {}), {tile.codec_name for tile in getattr(image, "tile", ())}
    bits = max(tags.get(BITS_PER_SAMPLE, (1,)))
    if bits > 8 and tags.get(PLANAR_CONFIGURATION) == SEPARATE_PLANES and len(image.getbands()) > 1 and "raw" in codecs:
        raise DocumentError("broken", f"Pillow cannot decode separate planes of {bits} bits that are not compressed")


def find_transpose(image: Image.Image) -> Image.Transpose | None:
    """Return the transpose that makes an image upright by its EXIF orientation, None if it is upright."""
    tags = getattr(image, "tag_v2", None) or image.getexif()
    return TRANSPOSE_BY_ORIENTATION.get(tags.get(ORIENTATION, 1))


def read_dpi(image: Image.Image) -> tuple[float, float]:
    """Return the horizontal and vertical dpi in an image's metadata, or 200 if they are missing or implausible."""
    try:
        x_dpi, y_dpi = (float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return ASSUMED_DPI, ASSUMED_DPI
    is_plausible = all(20 <= value <= 10_000 for value in (x_dpi, y_dpi)) and 1 / 3 <= x_dpi / y_dpi <= 3
    return (x_dpi, y_dpi) if is_plausible else (ASSUMED_DPI, ASSUMED_DPI)


def square_pixels(width_px: int, height_px: int, x_dpi: float, y_dpi: float) -> tuple[int, int]:
    """Return the size of an image in square pixels: a fax of 204x98 dpi has half the rows of one of 204x204 dpi."""
    finest = max(x_dpi, y_dpi)
    return round(width_px * finest / x_dpi), round(height_px * finest / y_dpi)


def resample_image(image: Image.Image, target: tuple[int, int], halvings: int = 0) -> Image.Image:
    """Return the image in RGB at this size, with the filter of Qwen's own processor (bicubic).

    A large image never exists in RGB at full size: a JPEG or JPEG 2000 is decoded at 1/2, 1/4 or 1/8, others are converted and
    averaged band by band.
    """
    width, height = map(float, image.size)
    if isinstance(image, Jpeg2KImagePlugin.Jpeg2KImageFile) and image.tile:
        scale = min(width / target[0], height / target[1]) / 2
        image.reduce = min(halvings, int(math.log2(max(1.0, scale))))
        image.load()
        width, height = map(float, image.size)
    if drafted := image.draft(None, (2 * target[0], 2 * target[1])):  # JPEG only, also in an MPO of several
        *_, width, height = drafted[1]
    block = int(max(1, min(width / target[0], height / target[1]) // REDUCE_ABOVE))
    levels = find_levels(image)
    reduced = Image.new("RGB", (math.ceil(image.width / block), math.ceil(image.height / block)))
    for top, band in split_into_bands(image, block):
        reduced.paste(convert_to_rgb(band, levels).reduce(block), (0, top // block))
    return reduced.resize(target, Image.Resampling.BICUBIC, box=(0, 0, width / block, height / block))


def split_into_bands(image: Image.Image, block: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """Yield an image in bands of a few million pixels, each with the number of its top row, a multiple of `block`."""
    rows = block * max(1, BAND_PIXELS // (image.width * block))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def convert_to_rgb(band: Image.Image, levels: tuple[float, float] | None) -> Image.Image:
    """Return a band in RGB: greys of more than 8 bits are scaled to 0..255 by `levels`, transparency becomes white."""
    if levels is not None:
        black, white = levels
        values = np.nan_to_num(np.asarray(band, np.float64), nan=white)
        scaled = np.clip((values - black) / (white - black), 0, 1) * 255
        return Image.fromarray(np.round(scaled).astype(np.uint8)).convert("RGB")
    if band.has_transparency_data:
        rgba = band.convert("RGBA")
        page = Image.new("RGB", band.size, "white")
        page.paste(rgba, mask=rgba.getchannel("A"))
        return page
    return band.getchannel("L").convert("RGB") if band.mode == "LAB" else band.convert("RGB")


def find_levels(image: Image.Image) -> tuple[float, float] | None:
    """Return the values of black and white in a grey image of more than 8 bits a pixel, None for other images.

    Pillow's own conversion clips at 255, which makes a 16-bit scan pure white.
    """
    if not image.mode.startswith(("I", "F")):
        return None
    low, high = 0.0, 0.0
    for _, band in split_into_bands(image):
        values = np.asarray(band, np.float64)
        low = min(low, np.min(values, where=np.isfinite(values), initial=low))
        high = max(high, np.max(values, where=np.isfinite(values), initial=high))
    white, tags = find_white(high), getattr(image, "tag_v2", {})
    if low < 0 and tags.get(BITS_PER_SAMPLE) == (32,) and tags.get(SAMPLE_FORMAT, (UNSIGNED,)) == (UNSIGNED,):
        raise DocumentError("broken", "Pillow cannot decode unsigned samples of 32 bits that are larger than a signed one")
    inverted = tags.get(PHOTOMETRIC) == 0
    return (white, low) if inverted else (low, white)


def find_white(high: float) -> float:
    """Return the value of white in an image whose largest value is `high`.

    It is the largest value of the smallest bit depth that holds all pixels, because 12-bit scans are stored in 16-bit files.
    """
    return next((float(largest) for largest in (1, 255, 1023, 4095, 16383, 65535) if high <= largest), high)


def pad_with_white(pixels: Pixels, canvas: ImageSize) -> Pixels:
    """Return the pixels at the top left of a white canvas, or unchanged if they fill it."""
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


def encode_page_jpeg(pixels: Pixels, quality: int = 65) -> bytes:
    """Return a page image as a JPEG file: a tenth of a PNG's size, for people to look at."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()
