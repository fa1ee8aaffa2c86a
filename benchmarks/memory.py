"""How much memory do many small files and one long document take? Prints a table; needs no GPU, no Ray and no weights.

    python benchmarks/memory.py [--files 100000] [--pages 5000]

Each figure is the peak of real memory (VmHWM, as the kernel counts it) of a process of its own, less what the same process
had before it began. What the parent of a renderer holds beside these is the bytes of the open document, `limits.max_file_mib`
at most. Returns 1 when a bound is broken.

The long document has on each page its own picture of one megapixel, its own font, fifty lines of text and a warning: what
a renderer that keeps anything from page to page would be found out by.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

KIB, MIB = 1024, 2**20
BASE_BYTES, LISTED_BYTES = 16 * MIB, 1 * KIB
"""Driver: libraries that wake up, and per file its name, size and version as Arrow, and as Python objects while they are sorted."""
PARENT_BYTES = 64 * MIB
"""Parent of a renderer, beside the document: pages and messages, one at a time."""
CHILD_BYTES = 512 * MIB
"""Renderer, all in all, the document included."""
GROWTH_BYTES = 64 * MIB
"""Renderer, what the second half of a long document may add to its first."""


def main() -> int:
    """Print the table; return 1 when something takes more than its bound."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--pages", type=int, default=5_000)
    parser.add_argument("--only", choices=("listing", "drawing"), help="measure this, in this process, and print bytes")
    chosen = parser.parse_args()
    if chosen.only:
        print(*(listing(chosen.files) if chosen.only == "listing" else drawing(chosen.pages)))
        return 0
    (listed,) = alone("listing", chosen.files, chosen.pages)
    document, parent, child, half = alone("drawing", chosen.files, chosen.pages)
    rows = [
        (f"driver, {chosen.files:,} files listed", listed, BASE_BYTES + LISTED_BYTES * chosen.files),
        (f"parent, {chosen.pages:,} pages of a document of {document / MIB:.0f} MiB", parent, document + PARENT_BYTES),
        ("renderer of these pages", child, CHILD_BYTES),
        ("renderer, what the second half of the pages added", child - half, GROWTH_BYTES),
    ]
    print(f"{'':58}{'peak MiB':>10}{'bound MiB':>10}")
    for name, used, bound in rows:
        print(f"{name:58}{used / MIB:10.1f}{bound / MIB:10.1f}{'' if used <= bound else '  TOO MUCH'}")
    return int(any(used > bound for _, used, bound in rows))


def alone(what: str, files: int, pages: int) -> list[int]:
    """Return what a measurement prints in a process of its own."""
    command = [sys.executable, __file__, "--only", what, "--files", str(files), "--pages", str(pages)]
    return [int(text) for text in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


def peak_bytes(pid: int | str = "self") -> int:
    """Return the most real memory that a process has had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * KIB


def listing(count: int) -> tuple[int]:
    """Return what listing a folder of so many small files adds to a process."""
    from pipeline.sources import find_documents

    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            place = Path(folder, f"batch-{number // 1000:04}")
            place.mkdir(exist_ok=True)
            (place / f"invoice-{number:07}.pdf").write_bytes(b"%PDF-1.7\n")
        (Path(folder) / "one.pdf").touch()
        find_documents(["one.pdf"], Path(folder))
        idle = peak_bytes()
        table = find_documents(["."], Path(folder))
        assert len(table) == count + 1
        return (peak_bytes() - idle,)


def drawing(count: int) -> tuple[int, int, int, int]:
    """Return the bytes of a long document, what drawing it adds to the parent, and the renderer's peak, at the end and half way."""
    from pipeline.budget import RenderSettings
    from pipeline.render.sandbox import Sandbox

    with tempfile.TemporaryFile() as file:
        for piece in long_document(count):
            file.write(piece)
        size = file.tell()
        peaks = []
        with Sandbox(RenderSettings(max_pages=count, max_file_bytes=2**31)) as sandbox:
            sandbox.start_child()
            idle = peak_bytes()
            file.seek(0)
            assert sandbox.open(file.read()) == count
            for page in sandbox.draw_pages():
                assert sandbox.child is not None
                assert len(page.words) > 100
                peaks.append(peak_bytes(sandbox.child.pid))
                del page
        return size, peak_bytes() - idle, max(peaks), max(peaks[: count // 2])


def long_document(count: int) -> Iterator[bytes]:
    """Yield a PDF of so many pages piece by piece: 4 objects a page, from number 3 on."""
    places: list[int] = []
    written = 0

    def numbered(body: bytes) -> bytes:
        nonlocal written
        piece = b"%d 0 obj\n%b\nendobj\n" % (len(places) + 1, body)
        places.append(written)
        written += len(piece)
        return piece

    def stream(entries: bytes, data: bytes) -> bytes:
        data = zlib.compress(data, 1)
        return b"<<%b/Filter/FlateDecode/Length %d>>stream\n%b\nendstream" % (entries, len(data), data)

    written = len(head := b"%PDF-1.7\n")
    yield head
    yield numbered(b"<</Type/Catalog/Pages 2 0 R>>")
    yield numbered(b"<</Type/Pages/Count %d/Kids[%b]>>" % (count, b" ".join(b"%d 0 R" % (3 + 4 * number) for number in range(count))))
    shape = b"/Type/XObject/Subtype/Image/Width 1000/Height 1000/BitsPerComponent 8/ColorSpace/DeviceGray"
    for number in range(count):
        first = 3 + 4 * number
        resources = b"/Font<</F %d 0 R>>/XObject<</X %d 0 R>>" % (first + 2, first + 3)
        yield numbered(b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents %d 0 R/Resources<<%b>>>>" % (first + 1, resources))
        lines = b"".join(b"1 0 0 1 40 %d Tm (Line %d of page %d) Tj " % (800 - 12 * line, line, number) for line in range(50))
        yield numbered(stream(b"", b"q 99 0 0 99 400 40 cm /X Do Q /None%d Do BT /F 10 Tf %b ET" % (number, lines)))
        yield numbered(b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Name/F%d>>" % number)
        yield numbered(stream(shape, bytes([number % 256]) * 1_000_000))
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    yield b"xref\n0 %d\n0000000000 65535 f \n%b" % (len(places) + 1, table)
    yield b"trailer<</Root 1 0 R/Size %d>>\nstartxref\n%d\n%%%%EOF\n" % (len(places) + 1, written)


if __name__ == "__main__":
    raise SystemExit(main())
