"""What MuPDF and Pillow raise and say -> DocumentErrors and short texts. Knows neither of them.

Whatever leaves the renderer is bounded here and in its neighbours: 300 characters a message, 20 warnings a page; 20,000
words and 200,000 characters of text layer a page (`pdf.py`).
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
    r"|(cannot|can't|could not|couldn't|unable to|failed to) allocate|\balloc\w* .*fail",
    re.IGNORECASE,
)
"""What a library says when it gets no memory."""


@contextmanager
def convert_library_errors(failed: str) -> Iterator[None]:
    """Turn whatever MuPDF or Pillow raises into a DocumentError.

    The one place that catches everything: what they raise comes from unrelated families (`FzErrorBase` is not even a
    RuntimeError, Pillow's readers raise eight classes, struct.error and AssertionError among them).
    """
    try:
        yield
    except DocumentError:
        raise
    except Exception as error:
        said = re.sub(r"<\S+ object at 0x\w+>", "it", " ".join(str(error)[: 10 * MAX_CHARS].split()))
        reason = clean_text(f"{type(error).__name__}: {said}")
        if isinstance(error, MemoryError) or ALLOCATION.search(reason):
            raise DocumentError("memory", f"{failed} within `limits.memory_mib`: {reason}") from None
        raise DocumentError("broken", f"{failed}: {reason}") from None


def clean_text(text: str, most_chars: int = MAX_CHARS) -> str:
    """Return the beginning of a foreign text as what UTF-8 can hold."""
    return text[:most_chars].encode("utf-8", "replace").decode("utf-8")
