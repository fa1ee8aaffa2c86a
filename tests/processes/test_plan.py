"""`pipeline plan` measures documents without drawing them: the same sizes and tokens as a run, whatever the document."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pymupdf
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline.budget import RenderSettings
from pipeline.cli import main
from pipeline.render.document import measure_drawn_page
from pipeline.render.sandbox import Sandbox
from tests.support.workspace import Workspace

SAMPLES = sorted((Path(__file__).parents[2] / "jobs/samples").glob("*/*.*"))


def draw_odd_pdf() -> bytes:
    """Return a PDF with a rotated page, a cropped one, a strip and a page of minute print."""
    document = pymupdf.open()
    document.new_page(width=595, height=842).set_rotation(90)
    document.new_page(width=595, height=842).set_cropbox(pymupdf.Rect(100, 100, 300, 700))
    document.new_page(width=2000, height=60)
    page = document.new_page(width=595, height=842)
    for line in range(40):
        page.insert_text((40, 40 + 12 * line), "small print of a contract that nobody reads", fontsize=4)
    return bytes(document.tobytes())


def save_image(size: tuple[int, int], kind: str, **more: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "white").save(buffer, kind, **more)
    return buffer.getvalue()


def make_turned_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return save_image((1000, 400), "JPEG", exif=exif, dpi=(100, 200))


ODD = {
    "odd.pdf": draw_odd_pdf,
    "turned.jpg": make_turned_jpeg,
    "turned.tiff": lambda: save_image((1000, 400), "TIFF", tiffinfo={0x0112: 8}, dpi=(204, 98)),
    "frames.tiff": lambda: save_image((300, 400), "TIFF", save_all=True, append_images=[Image.new("L", (900, 200))]),
    "tiny.png": lambda: save_image((3, 5), "PNG"),
}


@pytest.mark.parametrize("name", [*ODD, *(file.name for file in SAMPLES if file.suffix != ".jsonl")])
def test_a_measured_page_is_the_drawn_one(name: str) -> None:
    data = ODD[name]() if name in ODD else next(file for file in SAMPLES if file.name == name).read_bytes()
    with Sandbox(RenderSettings()) as sandbox:
        count = sandbox.open(data)
        measured = [sandbox.measure_page(page_no) for page_no in range(1, count + 1)]
        assert measured == [measure_drawn_page(page) for page in sandbox.draw_pages()]


def test_the_plan_of_a_folder(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.put("a.pdf")
    workspace.put("again.pdf", (workspace.inputs / "a.pdf").read_bytes())
    workspace.put("odd.pdf", draw_odd_pdf())
    workspace.put("broken.pdf", b"%PDF-1.7 and nothing else")
    found = CliRunner().invoke(main, ["plan", str(workspace.file), "--json"], catch_exceptions=False)
    assert found.exit_code == 0
    plan = json.loads(found.stdout)
    assert (plan["documents"], plan["pages"], plan["requests"], plan["duplicates"]) == (4, 5, 2, ["in/again.pdf"])
    assert [kind.split("/")[0] for kind in plan["failures"]] == ["render"]
    assert plan["prompt_tokens"]["source"] == "the model's tokenizer"
    shown = CliRunner().invoke(main, ["plan", str(workspace.file), "--price", "2"], catch_exceptions=False).stderr
    assert "files with the bytes of another, asked once: 1 (in/again.pdf)" in shown
    assert not (tmp_path / "out").exists()


def test_minute_print_is_warned_of(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    document = pymupdf.open("pdf", draw_odd_pdf())
    document.select([3])
    workspace.put("small.pdf", bytes(document.tobytes()))
    shown = CliRunner().invoke(main, ["plan", str(workspace.file)], catch_exceptions=False).stderr
    assert "100% of 1 sampled pages have print of less than 8 px at this size of page; raise pages.max_pixels" in " ".join(shown.split())
