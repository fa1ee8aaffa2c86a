"""Whatever strangers send: every file is listed once and has one outcome, and its neighbours do not notice."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pipeline.budget import PixelBudget, RenderSettings
from pipeline.errors import DocumentError
from pipeline.records import Document
from pipeline.render.sandbox import Sandbox
from pipeline.sources import find_documents, read_document
from pipeline.sources.local import convert_file_url
from tests.support.hostile_files import PASSWORD, drawn, make_hostile_files
from tests.support.pdfs import make_page_pdf

SETTINGS = RenderSettings(
    PixelBudget(784, 78_400), timeout_s=120, memory_bytes=256 * 2**20, max_pages=100, password=PASSWORD, text_layer=True
)
ENDLESS = ("forms-without-end.pdf", "content-inflates-to-60-gib.pdf", "object-stream-inflates-to-60-gib.pdf")

OUTCOMES = {
    "xref-offsets.pdf": "ok ok",
    "xref-circle.pdf": "ok ok",
    "xref-frees-the-tree.pdf": "ok ok",
    "xref-missing.pdf": "ok ok",
    "startxref-nowhere.pdf": "ok ok",
    "truncated.pdf": "broken",
    "header-only.pdf": "broken",
    "garbage-behind-header.pdf": "broken",
    "junk-before-header.pdf": "ok ok",
    "no-root.pdf": "no_pages",
    "zero-pages.pdf": "no_pages",
    "kids-missing.pdf": "no_pages",
    "tree-missing.pdf": "no_pages",
    "tree-is-a-page.pdf": "ok",
    "tree-in-a-circle.pdf": "ok",
    "tree-of-circles-only.pdf": "no_pages",
    "tree-3000-deep.pdf": "ok",
    "count-zero.pdf": "ok ok",
    "count-missing.pdf": "ok ok",
    "count-negative.pdf": "ok ok",
    "count-too-small.pdf": "ok ok",
    "count-a-billion.pdf": "ok ok",
    "kid-missing.pdf": "ok broken broken ok",
    "parent-in-a-circle.pdf": "ok",
    "pages-10000.pdf": "too_many_pages",
    "box-of-nothing.pdf": "ok",
    "box-of-10-million-points.pdf": "ok",
    "box-negative.pdf": "ok",
    "box-of-words.pdf": "ok",
    "box-infinite.pdf": "ok",
    "box-missing.pdf": "ok",
    "box-a-line.pdf": "ok",
    "userunit-huge.pdf": "ok",
    "arrays-200000-deep.pdf": "broken",
    "dictionaries-100000-deep.pdf": "broken",
    "length-of-itself.pdf": "ok",
    "length-a-lie.pdf": "ok",
    "object-number-8-million.pdf": "memory",
    "size-a-billion.pdf": "ok",
    "form-draws-itself.pdf": "ok",
    "forms-without-end.pdf": "timeout",
    "pattern-of-itself.pdf": "broken",
    "glyph-of-itself.pdf": "ok",
    "soft-mask-of-itself.pdf": "ok",
    "states-a-million.pdf": "broken",
    "operators-unknown.pdf": "ok",
    "font-missing.pdf": "ok",
    "font-not-there.pdf": "ok",
    "font-of-garbage.pdf": "ok",
    "cmap-of-itself.pdf": "ok",
    "words-30000.pdf": "ok",
    "word-of-a-million-letters.pdf": "ok",
    "warnings-50000.pdf": "ok",
    "content-inflates-to-20-mib.pdf": "ok",
    "content-inflates-to-60-gib.pdf": "timeout",
    "object-stream-inflates-to-60-gib.pdf": "timeout",
    "shapes-10-million.pdf": "memory",
    "jbig2-damaged.pdf": "ok",
    "jbig2-of-4-gigapixels.pdf": "memory",
    "jpx-damaged.pdf": "ok",
    "jpx-of-10-gigapixels.pdf": "memory",
    "jpeg-damaged.pdf": "ok",
    "fax-damaged.pdf": "ok",
    "flate-damaged.pdf": "ok",
    "filter-unknown.pdf": "ok",
    "filters-300.pdf": "ok",
    "predictor-of-8-gb.pdf": "ok",
    "image-of-nothing.pdf": "ok",
    "image-short-of-data.pdf": "ok",
    "image-of-30-gb.pdf": "ok",
    "image-masked-by-itself.pdf": "ok",
    "colours-of-themselves.pdf": "ok",
    "tint-of-itself.pdf": "ok",
    "visible-if-itself.pdf": "ok",
    "script-without-end.pdf": "ok",
    "stamp-of-itself.pdf": "ok",
    "launches-a-shell.pdf": "ok",
    "opens-a-url.pdf": "ok",
    "embeds-a-file.pdf": "ok",
    "content-elsewhere.pdf": "ok",
    "encrypted-known-password.pdf": "ok",
    "encrypted-unknown-password.pdf": "encrypted",
    "encrypted-empty-password.pdf": "ok",
    "encrypted-by-certificate.pdf": "encrypted",
    "encrypted-by-nonsense.pdf": "encrypted",
    "whole.jpeg": "ok",
    "whole.png": "ok",
    "whole.tiff": "ok",
    "whole.gif": "ok",
    "whole.webp": "ok",
    "whole.bmp": "ok",
    "truncated.jpeg": "broken",
    "truncated.png": "broken",
    "truncated.tiff": "broken",
    "truncated.gif": "broken",
    "truncated.webp": "broken",
    "truncated.bmp": "broken",
    "garbage-behind-magic.jpeg": "broken",
    "garbage-behind-magic.png": "broken",
    "garbage-behind-magic.tiff": "broken",
    "garbage-behind-magic.gif": "broken",
    "garbage-behind-magic.webp": "broken",
    "garbage-behind-magic.bmp": "broken",
    "cmyk.jpeg": "ok",
    "cmyk.tiff": "ok",
    "16-bit.png": "ok",
    "16-bit.tiff": "ok",
    "palette.png": "ok",
    "palette-with-holes.gif": "ok",
    "alpha.png": "ok",
    "grey-with-alpha.png": "ok",
    "one-bit.tiff": "ok",
    "lab.tiff": "ok",
    "animated.gif": "ok",
    "animated.webp": "ok",
    "animated.png": "ok",
    "several.mpo.jpeg": "ok",
    "pages-3.tiff": "ok ok ok",
    "pages-in-a-circle.tiff": "ok ok",
    "pages-3000.tiff": "too_many_pages",
    "second-page-nowhere.tiff": "ok broken",
    "strip-nowhere.tiff": "broken",
    "tags-a-billion.tiff": "broken",
    "of-nothing.png": "broken",
    "no-rows.png": "broken",
    "one-row-wide.png": "ok",
    "wrong-checksums.png": "ok",
    "exif-in-a-circle.jpeg": "ok",
    "100-megapixels.jpeg": "ok",
    "100-megapixels.png": "ok",
    "40-gigapixels.png": "too_large",
    "4-gigapixels.tiff": "too_large",
    "4-gigapixels.gif": "too_large",
    "4-gigapixels.jpeg": "too_large",
    "4-gigapixels.bmp": "too_large",
    "268-megapixels.webp": "memory",
    "text-of-100-mib.png": "broken",
    "empty.pdf": "empty",
    "empty.png": "empty",
    "text.pdf": "unrecognised",
    "zeros.pdf": "unrecognised",
    "random.pdf": "unrecognised",
    "zip.pdf": "unrecognised",
    "zip-of-a-pdf.pdf": "unrecognised",
    "gzip-of-a-pdf.pdf": "unrecognised",
    "svg.pdf": "unrecognised",
    "drawing.svg": "unrecognised",
    "page.html": "unrecognised",
    "book.epub": "unrecognised",
    "letter.docx": "unrecognised",
    "paper.xps": "unrecognised",
    "book.fb2": "unrecognised",
    "picture.psd": "unrecognised",
    "picture.jp2": "broken",
    "picture.eps": "unrecognised",
    "picture.ppm": "unrecognised",
    "a name with spaces.pdf": "ok",
    "a\nname\non\nlines.pdf": "ok",
    "ünïcödé 📄☃.pdf": "ok",
    "caf\udce9.pdf": "ok",
    "twin of these bytes.pdf": "ok",
}
"""What becomes of each file: of its pages in order, or of the whole."""

LIMITS = {
    "timeout": "limits.timeout_s",
    "memory": "limits.memory_mib",
    "too_large": "limits.max_image_megapixels",
    "too_many_pages": "limits.max_pages",
}


@dataclass(frozen=True)
class Seen:
    """What was seen of one file."""

    outcome: str
    messages: tuple[str, ...]
    neighbour: str
    peak_bytes: int
    """The most memory that the renderer has had, after this file; 0 when it died of it."""


def listed(folder: Path) -> dict[str, Document]:
    """Return what `find` lists in a folder, by file name."""
    rows = find_documents([str(folder)], folder.parent).to_pylist()
    return {os.path.basename(convert_file_url(row["source"])): Document(**row) for row in rows}


def outcome(document: Document, root: Path, sandbox: Sandbox) -> tuple[str, tuple[str, ...]]:
    """Return what becomes of a document's pages, or of the whole, and the messages."""
    kinds, messages = [], []
    try:
        page_count = sandbox.open(read_document(document, root, SETTINGS.max_file_bytes))
    except DocumentError as error:
        return error.kind, (error.message,)
    for page_no in range(1, page_count + 1):
        try:
            (page,) = sandbox.draw_pages(page_no, page_no)
            kinds.append("ok" if page.page_no == page_no else "misnumbered")
        except DocumentError as error:
            kinds.append(error.kind)
            messages.append(error.message)
    return " ".join(kinds), tuple(messages)


def status_bytes(sandbox: Sandbox, name: str) -> int:
    """Return a figure of the renderer's memory, as the kernel counts it."""
    if sandbox.child is None:
        return 0
    lines = Path(f"/proc/{sandbox.child.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("hostile")
    for name, data in make_hostile_files().items():
        (made / name).write_bytes(data)
    return made


@pytest.fixture(scope="module")
def seen(folder: Path) -> Iterator[dict[str, Seen]]:
    """Every file through one sandbox, in the order of the listing, a good one behind each."""
    made = {}
    good = folder.parent / "good.pdf"
    good.write_bytes(make_page_pdf())
    (neighbour,) = listed(good).values()
    with Sandbox(SETTINGS) as sandbox:
        for name, document in listed(folder).items():
            sandbox.settings = replace(SETTINGS, timeout_s=0.5) if name in ENDLESS else SETTINGS
            became, messages = outcome(document, folder.parent, sandbox)
            peak = status_bytes(sandbox, "VmHWM")
            sandbox.settings = SETTINGS
            made[name] = Seen(became, messages, outcome(neighbour, folder.parent, sandbox)[0], peak)
        yield made


def test_every_file_is_listed_once(folder: Path) -> None:
    assert len(find_documents([str(folder)], folder)) == len(make_hostile_files())
    assert listed(folder).keys() == make_hostile_files().keys() == OUTCOMES.keys()


@pytest.mark.parametrize("name", OUTCOMES, ids=ascii)
def test_every_file_has_the_outcome_it_should(seen: dict[str, Seen], name: str) -> None:
    assert seen[name].outcome == OUTCOMES[name], seen[name].messages


def test_neighbours_do_not_notice(seen: dict[str, Seen]) -> None:
    assert {name for name, it in seen.items() if it.neighbour != "ok"} == set()


def test_a_limit_that_was_reached_is_named(seen: dict[str, Seen]) -> None:
    reached = [(kind, message) for it in seen.values() for kind in it.outcome.split() for message in it.messages if kind in LIMITS]
    assert {kind for kind, _ in reached} == LIMITS.keys()
    assert [message for kind, message in reached if LIMITS[kind] not in message] == []


def test_no_message_is_long_or_empty(seen: dict[str, Seen]) -> None:
    lengths = [len(message) for it in seen.values() for message in it.messages]
    assert 10 < min(lengths) <= max(lengths) < 1000


def test_no_file_makes_the_renderer_larger_than_it_may_be(seen: dict[str, Seen]) -> None:
    with Sandbox(SETTINGS) as sandbox:
        sandbox.start_child()
        idle = status_bytes(sandbox, "VmSize")
    assert max(it.peak_bytes for it in seen.values()) <= idle + SETTINGS.memory_bytes


def test_what_a_pdf_refers_to_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "black").write_bytes(b"0 0 200 100 re f")
    data = drawn(f"<</Length 0/F({tmp_path / 'black'})>>stream\n\nendstream".encode())
    with Sandbox(SETTINGS) as sandbox:
        sandbox.open(data)
        assert next(sandbox.draw_pages()).pixels.min() == 255


def test_paths_that_are_no_files_are_rows_and_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "circle").symlink_to(folder)
    (folder / "device").symlink_to("/dev/zero")
    (folder / "dangling.pdf").symlink_to("gone.pdf")
    os.mkfifo(folder / "pipe.pdf")
    for name in ("vanishing.pdf", "changing.pdf", "a.pdf", "b.pdf"):
        (folder / name).write_bytes(make_page_pdf())
    documents = listed(folder)
    (folder / "vanishing.pdf").unlink()
    (folder / "changing.pdf").write_bytes(make_page_pdf(300))
    with Sandbox(SETTINGS) as sandbox:
        outcomes = {name: outcome(document, tmp_path, sandbox)[0] for name, document in documents.items()}
    expected = {"loop": "unreadable", "device": "outside", "dangling.pdf": "vanished", "pipe.pdf": "unreadable"}
    assert outcomes == expected | {"vanishing.pdf": "vanished", "changing.pdf": "changed", "a.pdf": "ok", "b.pdf": "ok"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(make_page_pdf())
    (tmp_path / "a.pdf").chmod(0)
    (document,) = listed(tmp_path).values()
    with Sandbox(SETTINGS) as sandbox:
        assert outcome(document, tmp_path.parent, sandbox)[0] == "unreadable"


# ---- Mutants ------------------------------------------------------------------------------------------------------

KINDS = {"ok", "broken", "memory", "timeout", "crash", "encrypted", "no_pages", "too_many_pages", "too_large", "unrecognised", "empty"}
SLOW = (*ENDLESS, "word-of-a-million-letters.pdf", "shapes-10-million.pdf", "object-number-8-million.pdf", "jpx-of-10-gigapixels.pdf")


def mutant(data: bytes, rng: random.Random) -> bytes:
    """Return a file with some bytes changed, cut out, doubled or moved."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 5, 20))):
        place, length = rng.randrange(len(changed) + 1), rng.choice((1, 1, 1, 4, 50))
        piece = rng.choice(
            (rng.randbytes(length), bytes(length), b"\xff" * length, changed[place : place + length] * 2, b"", b"-1", b"99999999")
        )
        changed[place : place + (length if rng.random() < 0.9 else 0)] = piece
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.05 else changed)


def mutants(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(seed)
    names = sorted(name for name, data in make_hostile_files().items() if 0 < len(data) < 20_000 and name not in SLOW)
    for _ in range(count):
        name = rng.choice(names)
        yield name, mutant(make_hostile_files()[name], rng)


def test_mutants_are_pages_or_document_errors() -> None:
    kinds: set[str] = set()
    with Sandbox(replace(SETTINGS, timeout_s=2, max_pages=10)) as sandbox:
        for _, data in mutants(1, 150):
            try:
                sandbox.open(data)
                kinds |= {"ok" for _ in sandbox.draw_pages(1, 3)}
            except DocumentError as error:
                kinds.add(error.kind if error.message else "silence")
    assert {"ok", "broken"} <= kinds <= KINDS
