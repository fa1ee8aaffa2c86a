"""Conversion of the rendering libraries' errors and messages to DocumentErrors and short texts; imports none of these libraries.

The output of a renderer is bounded: 300 characters a message and 20 warnings a page here; 20,000 words and 200,000
characters of text layer a page in `pdf.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import DocumentError

MAX_WARNINGS = 20
MAX_CHARS = 300
ALLOCATION = re.compile(
    r"\b[mc]alloc\b|\brealloc\b|bad_alloc|(out of|not enough|insufficient) memory|memory error|error allocating"
    r"|(cannot|can't|could not|couldn't|unable to|failed to) allocate(?! \d+ bytes for profile)|\balloc\w* .*fail",
    re.IGNORECASE,
)
"""Matches the messages of a library that cannot allocate memory.

Not lcms's about an ICC profile, which it also sends for an empty one ("Couldn't allocate 0 bytes for profile"): MuPDF goes on with the
colour space's alternate.
"""


@contextmanager
def convert_library_errors(failed: str) -> Iterator[None]:
    """Convert any exception of a rendering library to a DocumentError whose message begins with `failed`.

    The only `except Exception` of the renderer: the libraries' exceptions have no common base class (`FzErrorBase` is not even
    a RuntimeError, and Pillow's readers raise eight classes, struct.error and AssertionError among them).
    """
    try:
        yield
    except DocumentError:
        raise
    except Exception as error:
        text = re.sub(r"<\S+ object at 0x\w+>", "it", " ".join(str(error)[: 10 * MAX_CHARS].split()))
        reason = clean_text(f"{type(error).__name__}: {text}")
        if isinstance(error, MemoryError) or ALLOCATION.search(reason):
            raise DocumentError("memory", f"{failed} within `limits.memory_mib`: {reason}") from None
        raise DocumentError("broken", f"{failed}: {reason}") from None


def clean_text(text: str, most_chars: int = MAX_CHARS) -> str:
    """Return the beginning of a text from a library, with "?" for characters that UTF-8 cannot encode."""
    return text[:most_chars].encode("utf-8", "replace").decode("utf-8")
