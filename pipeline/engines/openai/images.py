"""Image encoder: turns a page's pixels into a PNG or JPEG file.

A page without colour is written in grey, with a third of the bytes; read as RGB, it has the same pixels again.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

try:
    from isal.isal_zlib import compress
except ImportError:
    from zlib import compress

from pipeline.records import Pixels

ImageFormat = Literal["png", "jpeg"]
Values = NDArray[np.uint8]
"""(height, width, 3) in colour, (height, width) in grey."""

PNG_LEVEL = 1
"""Of `isal`: a page takes 1.1 ms of CPU. zlib's fastest level, where `isal` is not installed, takes 5.5 ms for as many bytes."""
NO_FILTER = 0
"""The PNG filter of all rows. Differences from the row above would make a printed page's file 12 % larger, a photograph's 10 % smaller."""
JPEG_QUALITY = 90
SAMPLED_ROWS = 16
"""Every 16th row is looked at first: most pages with colour have some there."""


def encode_page(pixels: Pixels, image_format: ImageFormat) -> bytes:
    """Return a page as an image file. PNG keeps every pixel, JPEG is smaller for scans."""
    values = reduce_to_grey(pixels)
    return encode_png(values) if image_format == "png" else encode_jpeg(values)


def reduce_to_grey(pixels: Pixels) -> Values:
    """Return a page's grey values if it has no colour, else the page itself."""
    return pixels[..., 0] if is_grey(pixels[::SAMPLED_ROWS]) and is_grey(pixels) else pixels


def is_grey(pixels: Pixels) -> bool:
    """Say whether all pixels have three equal values."""
    red, green, blue = (pixels[..., at] for at in range(3))
    return np.array_equal(red, green) and np.array_equal(red, blue)


def encode_jpeg(values: Values) -> bytes:
    """Return an image as JPEG, without chroma subsampling."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def encode_png(values: Values) -> bytes:
    """Return an image as PNG (ISO/IEC 15948), with one filter for all rows."""
    height_px, width_px = values.shape[:2]
    rows = values.reshape(height_px, -1)
    lines = np.empty((height_px, 1 + rows.shape[1]), np.uint8)
    lines[:, 0], lines[:, 1:] = NO_FILTER, rows
    head = struct.pack(">IIBBBBB", width_px, height_px, 8, 2 if values.ndim == 3 else 0, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            *build_png_chunk(b"IHDR", head),
            *build_png_chunk(b"IDAT", compress(lines.data, PNG_LEVEL)),
            *build_png_chunk(b"IEND", b""),
        )
    )


def build_png_chunk(kind: bytes, data: bytes) -> Iterator[bytes]:
    """Yield the parts of a PNG chunk: length, kind, data, checksum."""
    yield from (struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))
