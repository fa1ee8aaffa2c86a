"""A renderer that hangs, crashes or balloons costs its own page, and nothing of it stays behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from made import endless_pdf, image, page_pdf, pages_pdf
from PIL import Image

from pipeline import sandbox as module
from pipeline.budget import PixelBudget, RenderSettings
from pipeline.errors import DocumentError, RunError
from pipeline.render import render
from pipeline.sandbox import Sandbox

PDFJS = Path(__file__).parents[2] / "shared/corpora/odd/pdfjs"

STUB = """
import os, sys
from types import SimpleNamespace
import numpy as np
from pipeline.records import Page
from pipeline.sandbox import serve

def draw(page_no, what):
    if page_no > 1:
        exec(what)
    said = tuple(map(str, globals().get("said", ())))
    return Page(page_no, np.zeros((28, 28, 3), np.uint8), 1.0, 1.0, 1.0, 1, (), said)

def inspect(data, settings):
    return SimpleNamespace(page_count=9, draw=lambda page_no: draw(page_no, data.decode()))

serve(int(sys.argv[1]), int(sys.argv[2]), SimpleNamespace(inspect=inspect))
"""
"""A renderer whose document is what it does at every page but the first."""


@pytest.fixture(scope="module")
def real() -> Iterator[Sandbox]:
    with Sandbox(RenderSettings(budget=PixelBudget(784, 78400), timeout_s=30)) as sandbox:
        yield sandbox


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Sandbox]:
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    with Sandbox(RenderSettings(timeout_s=30, memory_bytes=2**28)) as sandbox:
        sandbox.program = (str(script),)
        yield sandbox


def kind_of(sandbox: Sandbox, page_no: int) -> str:
    with pytest.raises(DocumentError) as caught:
        list(sandbox.pages(page_no, page_no))
    return caught.value.kind


def ended(pid: int) -> bool:
    """Wait until a process that is not our child has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with open(descriptor) as file:
        return bool(select.select([file], [], [], 30)[0])


def test_a_page_comes_out_as_it_went_in(real: Sandbox) -> None:
    data = page_pdf(content=b"1 0 0 rg 0 0 50 50 re f BT /F 20 Tf 60 60 Td (Gr\374n 1) Tj ET /Nope Do", extra="/Rotate 90")
    assert real.open(data) == 1
    (ours,), (theirs,) = real.pages(), render(data, real.settings)
    assert np.array_equal(ours.pixels, theirs.pixels)
    facts = [(p.page_no, p.dpi, p.width_pt, p.height_pt, p.visual_tokens, p.words, p.warnings) for p in (ours, theirs)]
    assert facts[0] == facts[1]
    assert len(ours.words) == 2


def test_pages_come_in_ranges(real: Sandbox) -> None:
    assert real.open(pages_pdf(7)) == 7
    assert [page.page_no for page in real.pages(3, 5)] == [3, 4, 5]
    assert [page.page_no for page in real.pages(6)] == [6, 7]


def test_an_abandoned_page_does_not_come_back_as_another(real: Sandbox) -> None:
    real.open(pages_pdf(5))
    next(real.pages(1, 5))
    assert next(real.pages(4)).page_no == 4


@pytest.mark.parametrize(("data", "kind"), [(b"", "empty"), (b"dear customer", "unrecognised"), (b"%PDF-1.7", "broken")])
def test_failures_keep_their_kind(real: Sandbox, data: bytes, kind: str) -> None:
    with pytest.raises(DocumentError) as caught:
        real.open(data)
    assert caught.value.kind == kind
    assert list(real.pages()) == []


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        ("os.abort()", "crash"),
        ("os._exit(0)", "crash"),
        ("raise SystemError('internal')", "crash"),
        ("os.kill(os.getpid(), 9)", "memory"),
        ("bytearray(2**30)", "memory"),
        ("os.kill(os.getpid(), 24)", "timeout"),
        ("os.write(int(sys.argv[1]), b'nonsense' * 99)", "crash"),
    ],
)
def test_a_renderer_that_dies_costs_one_page(stub: Sandbox, harm: str, kind: str) -> None:
    stub.open(harm.encode())
    assert kind_of(stub, 2) == kind
    assert next(stub.pages(1)).page_no == 1


def test_a_renderer_that_hangs_is_killed(stub: Sandbox) -> None:
    stub.settings = RenderSettings(timeout_s=0.5)
    stub.open(b"while True: pass")
    assert stub.child is not None
    pid = stub.child.pid
    assert kind_of(stub, 2) == "timeout"
    assert ended(pid)
    assert stub.open(b"pass") == 9


def test_an_interrupted_call_leaves_no_answer_behind(stub: Sandbox) -> None:
    stub.open(b"os.kill(os.getppid(), 2); import time; time.sleep(60)")
    with pytest.raises(KeyboardInterrupt):
        list(stub.pages(2))
    assert stub.child is None
    assert next(stub.pages(1)).page_no == 1


def test_a_document_that_ends_every_renderer_is_given_up(stub: Sandbox) -> None:
    stub.open(b"os.abort()")
    assert [kind_of(stub, page_no) for page_no in range(2, 6)] == ["crash"] * 4
    assert len(stub.deaths) == module.DEATHS_PER_DOCUMENT


def test_a_real_page_without_end_times_out() -> None:
    with Sandbox(RenderSettings(timeout_s=1)) as sandbox:
        assert sandbox.open(endless_pdf()) == 1
        assert kind_of(sandbox, 1) == "timeout"


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_a_real_image_larger_than_the_memory_allowed_fails(mode: str) -> None:
    with Sandbox(RenderSettings(memory_bytes=16 * 2**20)) as sandbox:
        sandbox.open(image(Image.new(mode, (5000, 5000)), "PNG", compress_level=1))
        assert kind_of(sandbox, 1) == "memory"
        assert sandbox.open(page_pdf()) == 1


def test_a_100_megapixel_photograph_is_served_in_little_memory() -> None:
    photograph = image(Image.new("L", (10_000, 10_000), 200), "JPEG")
    with Sandbox(RenderSettings(memory_bytes=96 * 2**20)) as sandbox:
        sandbox.open(photograph)
        assert np.all(next(sandbox.pages()).pixels == 200)


def test_a_killed_renderer_is_replaced(real: Sandbox) -> None:
    real.open(page_pdf())
    assert real.child is not None
    real.child.kill()
    real.child.wait()
    assert real.open(page_pdf()) == 1


def test_a_renderer_is_replaced_after_some_documents(real: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DOCUMENTS_PER_PROCESS", 2)
    pids = []
    for _ in range(5):
        real.open(page_pdf())
        assert real.child is not None
        pids.append(real.child.pid)
    assert len(set(pids[-4:])) == 2


def test_a_renderer_that_does_not_start_says_why() -> None:
    sandbox = Sandbox(RenderSettings())
    sandbox.program = ("-c", "import no_such_module")
    with pytest.raises(RunError, match="No module named 'no_such_module'"):
        sandbox.open(page_pdf())


def test_the_child_sees_no_secrets(stub: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hush")
    stub.open(b"global said; said = tuple(os.environ.values()) + tuple(sys.argv)")
    said = next(stub.pages(2)).warnings
    assert len(said) > 3
    assert not any("hush" in text for text in said)


def test_the_child_loads_neither_torch_nor_ray(stub: Sandbox) -> None:
    stub.open(b"from pipeline import render; global said; said = tuple(sys.modules)")
    loaded = set(next(stub.pages(2)).warnings)
    assert "pymupdf" in loaded
    assert not {"torch", "ray", "transformers", "pyarrow", "pydantic"} & loaded


ATTEMPTS = {
    "write a large file": "import tempfile; tempfile.TemporaryFile(buffering=0).write(b'x' * 2**21) > 2**20 or os.abort()",
    "dump core": "import resource; resource.getrlimit(resource.RLIMIT_CORE)[0] or os.abort()",
}


@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS)
def test_the_child_is_confined(stub: Sandbox, attempt: str) -> None:
    stub.open(attempt.encode())
    assert kind_of(stub, 2) == "crash"


ORPHAN = """
import json, os, signal
from pipeline.budget import RenderSettings
from pipeline.sandbox import Sandbox
sandbox = Sandbox(RenderSettings())
sandbox.start()
print(json.dumps(sandbox.child.pid), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_child_dies_with_its_parent() -> None:
    parent = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, check=False)
    assert parent.returncode == -signal.SIGKILL
    assert ended(json.loads(parent.stdout))


@pytest.mark.skipif(not PDFJS.exists(), reason="the shared corpora are not here")
def test_odd_pdfs_are_pages_or_document_errors(real: Sandbox) -> None:
    files = sorted(PDFJS.glob("*.pdf"))[::12]
    outcomes = []
    for file in files:
        try:
            pages = list(real.pages(1, 3)) if real.open(file.read_bytes()) else []
            outcomes.append(len(pages) > 0)
        except DocumentError as error:
            outcomes.append(bool(error.kind) and bool(error.message))
    assert outcomes == [True] * len(files)
