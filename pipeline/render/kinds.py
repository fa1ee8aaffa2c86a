"""The kinds of document that can be read. Knows nothing else."""

from enum import StrEnum


class Kind(StrEnum):
    """Each value is Pillow's name for it, but for PDF."""

    PDF = "PDF"
    PNG = "PNG"
    JPEG = "JPEG"
    TIFF = "TIFF"
    WEBP = "WEBP"
    GIF = "GIF"
    BMP = "BMP"
