"""JPEG 2000, AVIF, HEIF, odd TIFFs and PDFs in a confined renderer: bombs and damage are failures, and no library comes late."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.budget import PixelBudget, RenderSettings
from pipeline.errors import DocumentError
from pipeline.render.sandbox import Sandbox
from tests.support.pdfs import encode_image, make_page_pdf, make_unopened_pdf
from tests.support.tiffs import LONG, RGB, SHORT, assemble_tiff, write_tiff

pytest.importorskip("pillow_heif").register_heif_opener()
tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")
SETTINGS = RenderSettings(PixelBudget(784, 78_400), memory_bytes=512 * 2**20, timeout_s=60)
NOISE = Image.effect_noise((560, 420), 90).convert("RGB")
VAST = struct.pack(">II", 10**5, 10**5)


def claim_size(data: bytes, marker: bytes, size: bytes = VAST) -> bytes:
    """Return an image whose header has this size directly behind a marker."""
    place = data.index(marker) + len(marker)
    return data[:place] + size + data[place + len(size) :]


def make_tiff(bits: int = 10) -> bytes:
    return write_tiff((np.asarray(NOISE).astype(np.uint16) << 2) + 3, bits, RGB)


WHOLE = {
    "jp2": encode_image(NOISE, "JPEG2000"),
    "j2k": encode_image(NOISE, "JPEG2000", no_jp2=True),
    "avif": encode_image(NOISE, "AVIF"),
    "heic": encode_image(NOISE, "HEIF"),
    "heic of tiles": encode_image(NOISE.resize((1120, 840)), "HEIF", tile_size=512),
    "tiff": make_tiff(),
}
HEADER = {256: (LONG, [10**5]), 257: (LONG, [10**5]), 258: (SHORT, [10] * 3), 259: (SHORT, [1]), 262: (SHORT, [RGB]), 277: (SHORT, [3])}
BOMBS = {
    "jp2": claim_size(WHOLE["jp2"], b"ihdr"),
    "jp2, in its codestream": claim_size(WHOLE["jp2"], b"\xff\x4f\xff\x51\0\x2f\0\0"),
    "j2k": claim_size(WHOLE["j2k"], b"\xff\x4f\xff\x51\0\x2f\0\0"),
    "avif": claim_size(WHOLE["avif"], b"ispe\0\0\0\0"),
    "heic": claim_size(WHOLE["heic"], b"ispe\0\0\0\0"),
    "tiff": assemble_tiff([bytes(1000)], HEADER),
    "tiff, old-style JPEG": assemble_tiff([bytes(1000)], {**HEADER, 258: (SHORT, [8] * 3), 259: (SHORT, [6]), 262: (SHORT, [6])}),
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SETTINGS) as made:
        yield made


def find_kind(sandbox: Sandbox, data: bytes) -> str:
    """Return "ok", or the kind of the failure; a good document opens after it, in the same renderer."""
    try:
        sandbox.open(data)
        list(sandbox.draw_pages())
        kind = "ok"
    except DocumentError as error:
        kind = error.kind
    child = sandbox.child
    assert child is not None
    assert sandbox.open(make_page_pdf()) == 1
    assert sandbox.child is child
    return kind


@pytest.mark.parametrize("name", WHOLE)
def test_it_is_drawn_in_a_confined_process(sandbox: Sandbox, name: str) -> None:
    sandbox.open(WHOLE[name])
    (page,) = sandbox.draw_pages()
    assert page.renderer == ("tifffile" if name == "tiff" else "")
    assert page.pixels.std() > 5


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_of_ten_gigapixels_is_not_decoded(sandbox: Sandbox, name: str) -> None:
    assert find_kind(sandbox, BOMBS[name]) == "too_large"


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_broken(sandbox: Sandbox, name: str, share: float) -> None:
    assert find_kind(sandbox, WHOLE[name][: int(share * len(WHOLE[name]))]) == "broken"


@pytest.mark.parametrize("name", ["avif", "heic"])
def test_a_header_that_lies_costs_no_more_than_the_memory_allowed(sandbox: Sandbox, name: str) -> None:
    lie = claim_size(WHOLE[name], b"ispe\0\0\0\0", struct.pack(">II", 16_000, 16_000))
    assert find_kind(sandbox, lie) in ("memory", "broken")


def test_a_tiff_larger_than_the_memory_allowed_fails() -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((4000, 4000, 3), np.uint32), photometric="rgb", compression="deflate")
    with Sandbox(RenderSettings(memory_bytes=64 * 2**20)) as sandbox:
        sandbox.open(file.getvalue())
        with pytest.raises(DocumentError) as caught:
            list(sandbox.draw_pages())
    assert caught.value.kind == "memory"


LATE = """
import sys
from pathlib import Path
from pipeline.budget import RenderSettings
from pipeline.render.document import render_pages

files = [Path(name).read_bytes() for name in sys.argv[1:]]
sys.addaudithook(lambda event, args: event in ("open", "ctypes.dlopen") and print("late", event, args[0]))
for data in files:
    print(next(render_pages(data, RenderSettings())).renderer or "first")
"""


def test_no_library_is_loaded_after_the_confinement(tmp_path: Path) -> None:
    """A confined renderer may not be allowed to open a file: all that it imports, it imports before."""
    for codec in ("deflate", "lzw", "lzma", "zstd", "packbits", "jpeg2000", "lerc", "webp"):
        samples = np.asarray(NOISE).astype(np.uint8 if codec == "webp" else np.uint16 if codec == "jpeg2000" else np.uint32)
        tifffile.imwrite(tmp_path / f"{codec}.tif", samples, photometric="rgb", compression=codec)
    files = [*tmp_path.iterdir()]
    for name, data in {**WHOLE, "pdf": make_unopened_pdf()}.items():
        files.append(tmp_path / name)
        files[-1].write_bytes(data)
    # Pillow imports its readers with the first TIFF; that is its own affair.
    warm = "import PIL.Image; PIL.Image.init()\n"
    ran = subprocess.run([sys.executable, "-c", warm + LATE, *map(str, files)], capture_output=True, text=True, check=True)
    assert "late" not in ran.stdout
    assert ran.stdout.split().count("tifffile") == 9
    assert ran.stdout.split().count("pdfium") == 1
