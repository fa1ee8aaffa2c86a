"""Second TIFF renderer, on tifffile and imagecodecs: takes the bytes of a TIFF that Pillow cannot decode and returns its pages.

What Pillow lacks: most samples of 6, 10 to 14, 24 or 32 bits, most floats, separate planes of 16 bits, YCbCr without JPEG, LogLuv and
compressions that its libtiff was built without. A page is decoded to samples, converted to 8-bit RGB on white band by band, and
drawn as any other image (`images.py`). What tifffile does not decode (subsampled YCbCr without JPEG, old-style JPEG, LogLuv) is
decoded by imagecodecs' libtiff.

Imports: 60 ms and 8 MiB in each renderer, all of it at its start, because a confined renderer may not be able to open files later.
Memory: the samples of a page, whole and as they are stored, and 3 bytes a pixel.
"""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

try:
    import imagecodecs
    import tifffile
except ImportError:
    imagecodecs = tifffile = None  # type: ignore[assignment]

from pipeline.budget import RenderSettings
from pipeline.errors import DocumentError
from pipeline.records import Page, Pixels
from pipeline.render.fallback import OpenPages
from pipeline.render.images import BAND_PIXELS, ORIENTATION, check_image_size, draw_image, find_white
from pipeline.version import DISTRIBUTION

RENDERER = "tifffile"
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 282, 283, 296
MIN_IS_WHITE, MIN_IS_BLACK, RGB, PALETTE, MASK, SEPARATED, YCBCR, CIELAB, ICCLAB, ITULAB = 0, 1, 2, 3, 4, 5, 6, 8, 9, 10
GREYS = (MIN_IS_WHITE, MIN_IS_BLACK, MASK)
COLOUR_SAMPLES = {**dict.fromkeys((*GREYS, PALETTE), 1), **dict.fromkeys((RGB, YCBCR, CIELAB, ICCLAB), 3), SEPARATED: 4}
"""PhotometricInterpretation -> samples per pixel without alpha and other extra ones."""
JPEG_COMPRESSIONS = (6, 7, 33007, 34892)
"""Compressions whose decoder returns RGB for YCbCr."""
OLD_JPEG = 6
LIBTIFF_PHOTOMETRICS = (ITULAB, 32844, 32845)
"""Those that only libtiff decodes: besides ITULAB, LogL and LogLuv."""
ASSOCIATED_ALPHA, UNASSOCIATED_ALPHA = 1, 2
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
LEFT_BY_LIBTIFF = {5: 5, 6: 7, 7: 5, 8: 7}
"""Orientation -> the one that is left to do: libtiff flips an image, but does not swap width and height."""
MAX_SAMPLES = 32
CODECS = "deflate jpeg2k jpeg8 jpegsof3 lerc ljpeg lzma lzw tiff webp zlib zstd ccittfax4".split()
if imagecodecs:
    for codec in CODECS:
        getattr(imagecodecs, f"{codec}_decode")  # imagecodecs loads the library of a codec when its function is first looked up
LAB_WHITE = (0.9642, 1.0, 0.8249)
"""X, Y, Z of white under D50, to which CIELAB in a TIFF refers."""
XYZ_TO_RGB = ((3.1339, -1.6169, -0.4906), (-0.9788, 1.9161, 0.0335), (0.0719, -0.2290, 1.4052))
"""X, Y, Z under D50 -> linear sRGB, adapted by Bradford's method (http://www.brucelindbloom.com/index.html?Eqn_RGB_XYZ_Matrix.html)."""
Samples = NDArray[Any]
"""(height, width, samples per pixel) as stored, of any type of number."""


def open_tiff(data: bytes, settings: RenderSettings) -> OpenPages:
    """Return the pages of a TIFF. Raises DocumentError and tifffile's errors."""
    if tifffile is None:
        needed = f"this kind of TIFF may need the packages tifffile and imagecodecs: pip install '{DISTRIBUTION}[formats]'"
        raise DocumentError("unsupported", needed)
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # it writes a line for each damaged tag
    file = tifffile.TiffFile(io.BytesIO(data))
    page_count = count_tiff_pages(file, settings.max_pages)
    if not page_count:
        raise DocumentError("broken", "the TIFF has no pages")
    return OpenPages(page_count, lambda page_no: draw_tiff_page(file.pages[page_no - 1], data, page_no, settings))


def count_tiff_pages(file: Any, most: int) -> int:
    """Return the number of pages, at most `most` + 1."""
    for index in range(most + 1):
        try:
            file.pages[index]
        except IndexError:
            return index
    return most + 1


def draw_tiff_page(page: Any, data: bytes, page_no: int, settings: RenderSettings) -> Page:
    """Return a page of a TIFF: upright, RGB on white, resampled once. Raises DocumentError if it is larger than allowed."""
    check_image_size(page.imagewidth, page.imagelength, settings)
    if page.samplesperpixel > MAX_SAMPLES or page.imagedepth != 1:
        raise DocumentError("broken", f"page {page_no} has {page.samplesperpixel} samples per pixel and a depth of {page.imagedepth}")
    check_strips(page, len(data))
    orientation = page.tags.valueof(ORIENTATION, 1)
    if is_left_to_libtiff(page):
        pixels = decode_with_libtiff(data, page_no)
        orientation = LEFT_BY_LIBTIFF.get(orientation, 1)
    else:
        pixels = convert_samples(read_samples(page), page)
    image = Image.fromarray(pixels)
    image.getexif()[ORIENTATION] = orientation
    if dpi := read_tiff_dpi(page):
        image.info["dpi"] = dpi
    return replace(draw_image(image, page_no, settings), renderer=RENDERER)


def check_strips(page: Any, file_bytes: int) -> None:
    """Raise DocumentError if a strip or tile is missing or lies beyond the end of the file: the decoders would leave it black.

    Of old-style JPEG only the beginning counts, because many of these files state wrong lengths.
    """
    strips = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    for place, (offset, length) in enumerate(strips, 1):
        if not offset or offset + (1 if page.compression == OLD_JPEG else max(length, 1)) > file_bytes:
            raise DocumentError("broken", f"strip {place} of {len(strips)} lies at byte {offset} of {file_bytes}, with {length} bytes")


def is_left_to_libtiff(page: Any) -> bool:
    """Return whether tifffile does not decode a page that libtiff does."""
    if page.photometric in LIBTIFF_PHOTOMETRICS or page.compression == OLD_JPEG:
        return True
    return bool(page.photometric == YCBCR and page.is_subsampled and page.compression not in JPEG_COMPRESSIONS)


def read_samples(page: Any) -> Samples:
    """Return the decoded samples of a page. Raises tifffile's errors."""
    samples = page.asarray(squeeze=False, maxworkers=1)  # (planes, depth, height, width, samples per plane)
    if page.bitspersample == 24 and samples.dtype == np.uint32 and page.parent.byteorder == "<":
        samples = samples >> 16 | samples & 0xFF00 | (samples & 0xFF) << 16  # tifffile reads them as big-endian in any file
    if samples.dtype == np.int8:
        samples = samples.view(np.uint8)  # as libtiff and Pillow do: real files are tagged wrongly
    decoded: Samples = np.moveaxis(samples[:, 0], 0, -1).reshape(*samples.shape[2:4], -1) if samples.shape[-1] == 1 else samples[0, 0]
    return decoded


def decode_with_libtiff(data: bytes, page_no: int) -> Pixels:
    """Return a page as libtiff converts it to RGB, on white. Raises imagecodecs' errors."""
    rgba = Image.fromarray(np.asarray(imagecodecs.tiff_decode(data, page_no - 1, asrgb=True))).convert("RGBA")
    page = Image.new("RGB", rgba.size, "white")
    page.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(page)


def read_tiff_dpi(page: Any) -> tuple[Any, Any] | None:
    """Return the horizontal and vertical dpi that a page states, None if it states none."""
    if page.tags.valueof(RESOLUTION_UNIT, 2) not in (2, 3):
        return None
    per_inch = 2.54 if page.tags.valueof(RESOLUTION_UNIT, 2) == 3 else 1
    try:
        x_dpi, y_dpi = (
            numerator / denominator * per_inch for numerator, denominator in map(page.tags.valueof, (X_RESOLUTION, Y_RESOLUTION))
        )
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return x_dpi, y_dpi


# ---- Samples to colours -------------------------------------------------------------------------------------------


def convert_samples(samples: Samples, page: Any) -> Pixels:
    """Return a page's samples as RGB on white. Raises DocumentError for a photometric interpretation that is not known."""
    photometric, colours = int(page.photometric), COLOUR_SAMPLES.get(int(page.photometric))
    if colours is None or samples.shape[2] < colours:
        raise DocumentError("broken", f"{samples.shape[2]} samples of the photometric interpretation {photometric}")
    if photometric == YCBCR and page.compression in JPEG_COMPRESSIONS:
        photometric = RGB
    levels = find_sample_levels(samples[..., 0] if photometric in GREYS else None, page)
    extras = [int(kind) for kind in page.extrasamples]
    alpha = next((place for place, kind in enumerate(extras, colours) if kind in (ASSOCIATED_ALPHA, UNASSOCIATED_ALPHA)), None)
    pixels = np.empty((*samples.shape[:2], 3), np.uint8)
    rows = max(1, BAND_PIXELS // (4 * samples.shape[1]))
    for top in range(0, len(samples), rows):
        band = samples[top : top + rows]
        rgb = convert_colours(band[..., :colours], photometric, page, levels)
        if alpha is not None and alpha < samples.shape[2]:
            opacity = scale_samples(band[..., alpha : alpha + 1], find_sample_levels(None, page))
            rgb = (rgb if extras[alpha - colours] == ASSOCIATED_ALPHA else rgb * opacity) + 1 - opacity
        pixels[top : top + rows] = np.round(np.clip(rgb, 0, 1) * 255)
    return pixels


def convert_colours(band: Samples, photometric: int, page: Any, levels: tuple[float, float]) -> NDArray[Any]:
    """Return the colour samples of a band as RGB between 0 and 1."""
    if photometric == PALETTE:
        colours = np.asarray(page.colormap, np.float32)
        return (colours[:, np.minimum(band[..., 0], colours.shape[1] - 1)] // (256 if colours.max() > 255 else 1) / 255).transpose(1, 2, 0)
    if photometric in (CIELAB, ICCLAB):
        return convert_lab(band, photometric, page.bitspersample)
    values = scale_samples(band, levels)
    if photometric in GREYS:
        return np.repeat(1 - values if photometric == MIN_IS_WHITE else values, 3, axis=2)
    if photometric == SEPARATED:
        rgb: Samples = (1 - values[..., :3]) * (1 - values[..., 3:])
        return rgb
    if photometric == YCBCR:
        light, blue, red = values[..., 0], values[..., 1] - 128 / 255, values[..., 2] - 128 / 255
        return np.stack([light + 1.402 * red, light - 0.344136 * blue - 0.714136 * red, light + 1.772 * blue], axis=2)
    return values


def find_sample_levels(greys: Samples | None, page: Any) -> tuple[float, float]:
    """Return the sample values of black and white (of none and all of an ink).

    They are the ends of the stated range. But a grey scan of 16 or 32 bits often uses only 12 of them, and floats have no range: there
    white follows from the largest value, as in `images.find_levels`. Other floats are taken to lie between 0 and 1.
    """
    bits, kind = page.bitspersample, int(page.sampleformat)
    if kind == FLOAT or (bits in (16, 32) and kind == UNSIGNED):
        if greys is None:
            return 0.0, 1.0 if kind == FLOAT else 2.0**bits - 1
        finite = np.isfinite(greys)
        low = min(0.0, float(np.min(greys, where=finite, initial=0)))
        return low, find_white(float(np.max(greys, where=finite, initial=0)))
    return (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if kind == SIGNED and bits > 8 else (0.0, 2.0**bits - 1)


def scale_samples(band: Samples, levels: tuple[float, float]) -> NDArray[Any]:
    """Return samples as numbers between 0 and 1; what is no number is 1."""
    black, white = levels
    values = np.nan_to_num(band.astype(np.float64), nan=white)
    return np.clip((values - black) / ((white - black) or 1), 0, 1).astype(np.float32)


def convert_lab(band: Samples, photometric: int, bits: int) -> NDArray[Any]:
    """Return CIELAB samples of 8 or 16 bits as sRGB between 0 and 1.

    L* has the full range of the unsigned sample. a* and b* are signed numbers, in ICCLAB with an offset (TIFF 6.0, section 23;
    TIFF Technical Note 4). Of 16 bits the high byte counts whole units.
    """
    unit = 2.0 ** (bits - 8)
    stored = band.astype(np.float64)
    light = stored[..., 0] % 2**bits / (0xFF00 if (photometric, bits) == (ICCLAB, 16) else 2**bits - 1) * 100
    if photometric == ICCLAB:
        green_red, blue_yellow = ((stored[..., place] - 128 * unit) / unit for place in (1, 2))
    else:
        green_red, blue_yellow = (((stored[..., place] + 128 * unit) % 2**bits - 128 * unit) / unit for place in (1, 2))
    y = (light + 16) / 116
    roots = np.stack([y + green_red / 500, y, y - blue_yellow / 200], axis=2)
    xyz = np.where(roots > 6 / 29, roots**3, (roots - 4 / 29) * 3 * (6 / 29) ** 2) * LAB_WHITE
    linear = np.clip(xyz @ np.transpose(XYZ_TO_RGB), 0, 1)
    rgb: Samples = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).astype(np.float32)
    return rgb
