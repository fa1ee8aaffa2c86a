"""TIFF writer of the tests: samples of any depth and layout, uncompressed, independent of the library under test."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_IS_WHITE, MIN_IS_BLACK, RGB, PALETTE, SEPARATED, YCBCR, CIELAB, ICCLAB = 0, 1, 2, 3, 5, 6, 8, 9
SHORT, LONG, RATIONAL = 3, 4, 5
COUNT_FORMATS = {SHORT: "H", LONG: "I", RATIONAL: "II"}
Tag = tuple[int, Sequence[int]]
"""Type and values of a tag; a rational is two values."""


def pack_samples(samples: NDArray[Any], bits: int) -> bytes:
    """Return rows of samples (height, width, samples per pixel), each row padded to whole bytes; whole bytes are little-endian."""
    if bits == 24:
        return samples.astype("<u4").reshape(-1, 1).view(np.uint8)[:, :3].tobytes()
    if samples.dtype.kind == "f" or bits in (8, 16, 32, 64):
        return samples.astype(samples.dtype.newbyteorder("<")).tobytes()
    rows = samples.reshape(len(samples), -1).astype(np.uint32)
    planes = rows[:, :, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint32) & 1
    return np.packbits(planes.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def write_tiff(
    samples: NDArray[Any],
    bits: int,
    photometric: int = MIN_IS_BLACK,
    *,
    sample_format: int = 1,
    is_planar: bool = False,
    tags: Mapping[int, Tag] | None = None,
) -> bytes:
    """Return a TIFF of one page of these samples (height, width, samples per pixel)."""
    height, width, count = samples.shape
    strips = [pack_samples(samples[..., plane : plane + 1], bits) for plane in range(count)] if is_planar else [pack_samples(samples, bits)]
    return assemble_tiff(
        strips,
        {
            256: (LONG, [width]),
            257: (LONG, [height]),
            258: (SHORT, [bits] * count),
            259: (SHORT, [1]),
            262: (SHORT, [photometric]),
            277: (SHORT, [count]),
            278: (LONG, [height]),
            284: (SHORT, [2 if is_planar else 1]),
            339: (SHORT, [sample_format] * count),
            **(tags or {}),
        },
    )


def assemble_tiff(strips: Sequence[bytes], tags: Mapping[int, Tag]) -> bytes:
    """Return a TIFF of one page whose strips begin at byte 8, and whose tags are these and the strips' places."""
    return join_pages([(strips, tags)])


def join_pages(pages: Sequence[tuple[Sequence[bytes], Mapping[int, Tag]]]) -> bytes:
    """Return a TIFF of these pages, each of its strips and its tags."""
    body = bytearray(b"II*\0" + bytes(4))
    link = 4
    for strips, tags in pages:
        places = []
        for strip in strips:
            places.append(len(body))
            body += strip + b"\0" * (len(strip) % 2)
        entries = {**tags, 273: (LONG, places), 279: (LONG, [len(strip) for strip in strips])}
        body[link : link + 4] = struct.pack("<I", len(body))
        directory, beyond = struct.pack("<H", len(entries)), b""
        for tag, (kind, values) in sorted(entries.items()):
            count = len(values) // len(COUNT_FORMATS[kind])
            value = struct.pack("<" + COUNT_FORMATS[kind] * count, *values)
            if len(value) > 4:
                place = len(body) + 2 + 12 * len(entries) + 4 + len(beyond)
                beyond += value + b"\0" * (len(value) % 2)
                value = struct.pack("<I", place)
            directory += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
        link = len(body) + len(directory)
        body += directory + bytes(4) + beyond
    return bytes(body)
