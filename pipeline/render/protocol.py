"""Message protocol between sandbox and render worker: two lengths, a JSON header and a body of raw bytes.

The body of a page has its pixels and, after them, the boxes of its words: numbers as text would take longer than all else here.

Nothing is unpickled, and the parent validates everything that the child sends: a malformed page is a ValueError.
The memory that a child can make its parent hold is bounded: `MAX_HEADER_BYTES` for words, warnings and messages together (at
worst a few hundred MiB of Python objects while they are parsed), `MAX_TOKENS` visual tokens for pixels.
"""

from __future__ import annotations

import json
import re
import socket
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.budget import MAX_TOKENS, ImageSize, count_visual_tokens
from pipeline.deadline import compute_time_left
from pipeline.errors import DocumentError
from pipeline.records import WORD_MARKS, Page, PageMeasure, Word

MAX_HEADER_BYTES = 4 * 2**20
MAX_MESSAGE_CHARS = 1000
LENGTHS = struct.Struct(">IQ")
BOXES, BOX_BYTES = np.dtype("<f8"), 32
"""Of a word: its corners x0, y0, x1, y1 in points, 8 bytes each."""
MIN_WORD_BYTES = 6
"""Of a header, that a word takes at least: `"a",0,`."""
KIND = re.compile("[a-z_]{1,32}")
RENDERER = re.compile("[a-z]{0,32}")

Header = dict[str, Any]


def send_message(connection: socket.socket, header: Header, *body: bytes | memoryview, deadline: float | None = None) -> None:
    """Send one message, whose body is given in parts. Raises TimeoutError, or OSError if the other side has closed the connection."""
    text = json.dumps(header, ensure_ascii=False).encode()
    for part in (LENGTHS.pack(len(text), sum(map(len, body))) + text, *body):
        connection.settimeout(None if deadline is None else compute_time_left(deadline))
        connection.sendall(part)


def receive_message(connection: socket.socket, most_bytes: int, deadline: float | None = None) -> tuple[Header, bytearray]:
    """Return the header and body of one message, whose body has at most `most_bytes`.

    Raises TimeoutError, OSError if the other side has closed the connection, ValueError for a malformed message.
    """
    header_bytes, body_bytes = LENGTHS.unpack(read_exactly(connection, LENGTHS.size, deadline))
    if header_bytes > MAX_HEADER_BYTES or body_bytes > most_bytes:
        raise ValueError(f"a message of {header_bytes} + {body_bytes} bytes")
    try:
        header = json.loads(read_exactly(connection, header_bytes, deadline))
    except RecursionError:
        raise ValueError("a header that is too deep") from None
    if not isinstance(header, dict):
        raise ValueError("a header that is no object")
    return header, read_exactly(connection, body_bytes, deadline)


def read_exactly(connection: socket.socket, count: int, deadline: float | None) -> bytearray:
    """Return the next `count` bytes. Raises TimeoutError, or OSError if the other side has closed the connection."""
    buffer = bytearray(count)
    rest = memoryview(buffer)
    while rest:
        connection.settimeout(None if deadline is None else compute_time_left(deadline))
        received = connection.recv_into(rest)
        if not received:
            raise ConnectionResetError("the other side hung up")
        rest = rest[received:]
    return buffer


def pack_page(page: Page) -> tuple[Header, memoryview, bytes]:
    """Return the header of a page, its pixels, and the boxes of its words."""
    boxes = np.array([word[1:5] for word in page.words], BOXES)
    scalars = {name: getattr(page, name) for name in ("page_no", "dpi", "width_pt", "height_pt", "warnings", "renderer")}
    words = {"words": [word.text for word in page.words], "marks": [word.mark for word in page.words]}
    return {**scalars, "shape": page.pixels.shape, **words}, page.pixels.data.cast("B"), boxes.tobytes()


def compute_page_bytes(cell_px: int) -> int:
    """Return the most bytes that a page of whole cells and its words take."""
    return 3 * cell_px * cell_px * MAX_TOKENS + MAX_HEADER_BYTES // MIN_WORD_BYTES * BOX_BYTES


def unpack_page(header: Header, body: bytearray, page_no: int, cell_px: int) -> Page:
    """Return the page in a message, an image of whole cells.

    Raises KeyError, TypeError, ValueError or OverflowError if it is not the page asked for.
    """
    height_px, width_px, colours = header["shape"]
    if header["page_no"] != page_no or colours != 3 or height_px % cell_px or width_px % cell_px or min(height_px, width_px) < 1:
        raise ValueError(f"page {header['page_no']} of {width_px}x{height_px}x{colours} in place of page {page_no}")
    if not RENDERER.fullmatch(header["renderer"]):
        raise ValueError(f"a page by the renderer {header['renderer'][:50]!r}")
    count = height_px * width_px * 3
    pixels = np.frombuffer(body, np.uint8, count).reshape(height_px, width_px, 3)
    words = parse_words(header["words"], header["marks"], np.frombuffer(body, BOXES, offset=count))
    measures = {name: float(header[name]) for name in ("dpi", "width_pt", "height_pt")}
    tokens = count_visual_tokens(ImageSize(width_px, height_px), cell_px)
    warnings = tuple(map(str, header["warnings"]))
    return Page(page_no, pixels, visual_tokens=tokens, words=words, warnings=warnings, renderer=header["renderer"], **measures)


def parse_measures(header: Header) -> PageMeasure:
    """Return the measures in an answer. Raises KeyError, TypeError, ValueError or OverflowError if they are none of a page."""
    found = header["measures"]
    width_px, height_px, tokens = (int(found[name]) for name in ("width_px", "height_px", "visual_tokens"))
    if min(width_px, height_px, tokens) < 1 or tokens > MAX_TOKENS:
        raise ValueError(f"a page of {width_px}x{height_px} px and {tokens} tokens")
    return PageMeasure(float(found["width_pt"]), float(found["height_pt"]), width_px, height_px, float(found["dpi"]), tokens)


def parse_words(texts: list[str], marks: list[int], boxes: NDArray[np.float64]) -> tuple[Word, ...]:
    """Return the words in a message. Raises TypeError or ValueError."""
    if len(texts) != len(marks) or not all(type(text) is str for text in texts) or not {*marks} <= {*WORD_MARKS}:
        raise ValueError(f"{len(texts)} words with {len(marks)} marks, or something else in their place")
    if not np.isfinite(boxes).all():
        raise ValueError("a word that is nowhere")
    corners = boxes.reshape(len(texts), 4).T.tolist()
    return tuple(map(Word, texts, *corners, (WORD_MARKS[mark] for mark in marks)))


def parse_page_count(header: Header, most: int) -> int:
    """Return the page count in an answer. Raises KeyError or ValueError if it is missing or not between 1 and `most`."""
    count = header["page_count"]
    if not isinstance(count, int) or not 1 <= count <= most:
        raise ValueError(f"a document of {count!r} pages")
    return count


def parse_failure(header: Header) -> DocumentError:
    """Return the failure in an answer. Raises KeyError or ValueError if it is missing or malformed."""
    kind, message = str(header["kind"]), str(header["message"])
    if not KIND.fullmatch(kind):
        raise ValueError(f"a failure of the kind {kind[:50]!r}")
    return DocumentError(kind, message[:MAX_MESSAGE_CHARS])
