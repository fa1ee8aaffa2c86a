"""Small documents made by hand for tests: PDFs object by object, images by Pillow."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

LEAF = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Contents 4 0 R>>"
ENCRYPTED_ATTACHMENTS = (
    "<</Filter/Standard/V 4/R 4/Length 128/P -4/O(oooooooooooooooooooooooooooooooo)"
    "/U(uuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuu)/CF<</StdCF<</AuthEvent/EFOpen/CFM/AESV2/Length 16>>>>"
    "/StmF/Identity/StrF/Identity/EFF/StdCF>>"
)


def make_stream(content: bytes, entries: str = "") -> bytes:
    """Return a PDF stream object."""
    return f"<<{entries}/Length {len(content)}>>stream\n".encode() + content + b"\nendstream"


def make_pdf(*objects: str | bytes) -> bytes:
    """Return a PDF of these objects, numbered from 1; the first is the catalogue."""
    body, places = b"%PDF-1.7\n", []
    for number, item in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj\n%b\nendobj\n" % (number, item if isinstance(item, bytes) else item.encode())
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(places) + 1)
    tail = b"trailer<</Root 1 0 R/Size %d>>\nstartxref\n%d\n%%%%EOF\n" % (len(places) + 1, len(body))
    return body + head + table + tail


def make_page_pdf(width: float = 200, height: float = 100, content: bytes = b"", extra: str = "", resources: str = "") -> bytes:
    """Return a PDF of one page; /F is Helvetica, more resources may be objects from number 6 on."""
    return make_pdf(
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 {width} {height}]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>{resources}>>{extra}>>",
        make_stream(content),
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    )


def make_pages_pdf(count: int) -> bytes:
    """Return a PDF of so many empty pages."""
    kids = " ".join(f"{number} 0 R" for number in range(3, 3 + count))
    page = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]>>"
    return make_pdf("<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]/Count {count}>>", *[page] * count)


def make_tree_pdf(kids: str, entries: str = "/Count 9", *leaves: str) -> bytes:
    """Return a PDF with these references to pages; the objects of the leaves have the numbers 3, 4, …, so 9 is missing."""
    return make_pdf("<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]{entries}>>", *leaves)


def make_endless_pdf(depth: int = 30) -> bytes:
    """Return a PDF whose page draws a form ten times, which draws a form ten times, and so on."""
    form = "/Type/XObject/Subtype/Form/BBox[0 0 200 100]"
    forms = [make_stream(b"/X Do " * 10, f"{form}/Resources<</XObject<</X {number} 0 R>>>>") for number in range(6, 6 + depth)]
    return make_pdf(
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Contents 4 0 R/Resources<</XObject<</X 5 0 R>>>>>>",
        make_stream(b"/X Do"),
        *forms,
        make_stream(b"0 0 9 9 re f", form),
    )


def make_one_page(content: bytes, *objects: str) -> bytes:
    return make_pdf("<</Type/Catalog/Pages 2 0 R>>", "<</Type/Pages/Kids[3 0 R]/Count 1>>", LEAF, make_stream(content), *objects)


def make_unopened_pdf() -> bytes:
    """Return a PDF of which only the attachments are encrypted: MuPDF wants their password to open it at all."""
    made = make_one_page(b"0 0 50 50 re f", ENCRYPTED_ATTACHMENTS)
    return made.replace(b"trailer<<", b"trailer<</Encrypt 5 0 R/ID[(a)(a)]")


def make_undrawn_pdf(content: bytes = b"0 0 50 50 re f ") -> bytes:
    """Return a PDF whose page saves its state more often than MuPDF allows."""
    return make_one_page(content + b"q " * 10**6)


def draw_corners(width: float, height: float, side: float) -> bytes:
    """Return content that draws a black square in each corner of a page."""
    squares = [(x, y) for x in (0, width - side) for y in (0, height - side)]
    return b" ".join(f"{x} {y} {side} {side} re f".encode() for x, y in squares)


def encode_image(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """Return a picture as a file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
