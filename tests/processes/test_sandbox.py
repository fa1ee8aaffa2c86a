"""Render sandbox: a child that hangs, crashes or exceeds its memory costs one page, and no process is left behind."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.budget import PixelBudget, RenderSettings
from pipeline.errors import DocumentError, RunError
from pipeline.records import Word, WordMark
from pipeline.render import protocol
from pipeline.render import sandbox as module
from pipeline.render.document import render_pages
from pipeline.render.sandbox import Sandbox
from tests.support.pdfs import encode_image, make_endless_pdf, make_page_pdf, make_pages_pdf

PDFJS = Path(__file__).parents[3] / "shared/corpora/odd/pdfjs"

STUB = """
import os, resource, socket, struct, subprocess, sys, threading, time
from types import SimpleNamespace
import numpy as np
from pipeline.records import Page
from pipeline.render.worker import serve_parent

def draw(page_no, what):
    if page_no > 1:
        exec(what)
    said = tuple(map(str, globals().get("said", ())))
    return Page(page_no, np.zeros((28, 28, 3), np.uint8), 1.0, 1.0, 1.0, 1, (), said)

def open_document(data, settings):
    return SimpleNamespace(page_count=9, draw=lambda page_no: draw(page_no, data.decode()))

serve_parent(int(sys.argv[1]), open_document)
"""
"""A worker whose documents are Python code, which it executes for every page but the first. What they need is imported before the
worker is confined."""


@pytest.fixture(scope="module")
def real() -> Iterator[Sandbox]:
    with Sandbox(RenderSettings(budget=PixelBudget(784, 78400), timeout_s=30, text_layer=True)) as sandbox:
        yield sandbox


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Sandbox]:
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    with Sandbox(RenderSettings(timeout_s=30, memory_bytes=2**28)) as sandbox:
        sandbox.program = (str(script),)
        yield sandbox


def find_failure_kind(sandbox: Sandbox, page_no: int) -> str:
    with pytest.raises(DocumentError) as caught:
        list(sandbox.draw_pages(page_no, page_no))
    return caught.value.kind


def wait_for_end(pid: int) -> bool:
    """Wait at most 5 s for a process that is not a child of this one to end, and return whether it has."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with open(descriptor) as file:
        return bool(select.select([file], [], [], 5)[0])


def test_a_page_comes_out_as_it_went_in(real: Sandbox) -> None:
    data = make_page_pdf(content=b"1 0 0 rg 0 0 50 50 re f BT /F 20 Tf 60 60 Td (Gr\374n 1) Tj ET /Nope Do", extra="/Rotate 90")
    assert real.open(data) == 1
    (ours,), (theirs,) = real.draw_pages(), render_pages(data, real.settings)
    assert np.array_equal(ours.pixels, theirs.pixels)
    facts = [(p.page_no, p.dpi, p.width_pt, p.height_pt, p.visual_tokens, p.words, p.warnings) for p in (ours, theirs)]
    assert facts[0] == facts[1]
    assert len(ours.words) == 2


def test_pages_come_in_ranges(real: Sandbox) -> None:
    assert real.open(make_pages_pdf(7)) == 7
    assert [page.page_no for page in real.draw_pages(3, 5)] == [3, 4, 5]
    assert [page.page_no for page in real.draw_pages(6)] == [6, 7]


def test_an_abandoned_page_does_not_come_back_as_another(real: Sandbox) -> None:
    real.open(make_pages_pdf(5))
    next(real.draw_pages(1, 5))
    assert next(real.draw_pages(4)).page_no == 4


@pytest.mark.parametrize(("data", "kind"), [(b"", "empty"), (b"dear customer", "unrecognised"), (b"%PDF-1.7", "broken")])
def test_failures_keep_their_kind(real: Sandbox, data: bytes, kind: str) -> None:
    with pytest.raises(DocumentError) as caught:
        real.open(data)
    assert caught.value.kind == kind
    assert list(real.draw_pages()) == []


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
    assert stub.child is not None
    pid = stub.child.pid
    assert find_failure_kind(stub, 2) == kind
    assert wait_for_end(pid)
    assert next(stub.draw_pages(1)).page_no == 1


def test_a_renderer_that_somebody_kills_costs_nothing(stub: Sandbox) -> None:
    stub.open(b"time.sleep(1)")
    assert stub.child is not None
    threading.Timer(0.5, stub.child.kill).start()
    assert [page.page_no for page in stub.draw_pages(1, 3)] == [1, 2, 3]
    assert len(stub.deaths) == 1


def test_a_worn_out_renderer_is_replaced_before_a_document_lacks_memory(stub: Sandbox) -> None:
    stub.open(b"global worn; worn = bytearray(200 * 2**20)")
    next(stub.draw_pages(2))
    stub.open(b"bytearray(200 * 2**20)")
    assert next(stub.draw_pages(2)).page_no == 2


HONEST = {"page_no": 2, "shape": [28, 28, 3], "words": ["a"], "marks": [3], "warnings": ["b"], "dpi": 1, "width_pt": 1, "height_pt": 1}
HONEST["renderer"] = "pdfium"
BODY = bytes(28 * 28 * 3) + np.array([1.0, 2, 3, 4]).tobytes()
LIES: dict[str, dict[str, Any]] = {
    "another page": {"page_no": 3},
    "half a cell": {"shape": [14, 56, 3]},
    "less than it sent": {"shape": [28, 56, 3]},
    "nothing": {"shape": [0, 28, 3]},
    "a turned page": {"shape": [3, 28, 28]},
    "no shape": {"shape": None},
    "words that are none": {"words": [1]},
    "words without places": {"words": ["a", "b"], "marks": [0, 0]},
    "places without words": {"words": [], "marks": []},
    "words without marks": {"marks": []},
    "words with a mark that is none": {"marks": [99]},
    "words with a mark that is no number": {"marks": [[]]},
    "an endless number": {"dpi": 10**400},
    "no renderer": {"renderer": None},
    "a renderer with a long name": {"renderer": "a" * 100},
}


def test_a_page_is_unpacked() -> None:
    page = protocol.unpack_page(HONEST, bytearray(BODY), 2, 28)
    assert (page.words, page.renderer) == ((Word("a", 1, 2, 3, 4, WordMark.NO_INK),), "pdfium")
    without = protocol.unpack_page(HONEST | {"words": [], "marks": []}, bytearray(BODY[:-32]), 2, 28)
    assert without.words == ()


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_renderer_is_not_believed(lie: dict[str, Any]) -> None:
    with pytest.raises((KeyError, OverflowError, TypeError, ValueError)):
        protocol.unpack_page(HONEST | lie, bytearray(BODY), 2, 28)


@pytest.mark.parametrize("body", [BODY[:-32], BODY[:-1], BODY + b"a", BODY[:-8] + np.array([np.nan]).tobytes()])
def test_the_places_of_words_are_not_believed(body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  each of them says something else
        protocol.unpack_page(HONEST, bytearray(body), 2, 28)


@pytest.mark.parametrize("count", [0, -1, 11, 10**18, 1.5, "3", None])
def test_a_page_count_is_not_believed(count: Any) -> None:
    with pytest.raises(ValueError, match="a document of"):
        protocol.parse_page_count({"page_count": count}, 10)


@pytest.mark.parametrize("kind", ["", "a kind of mine", "x" * 100, ["broken"], None])
def test_a_failure_has_a_short_kind(kind: Any) -> None:
    with pytest.raises(ValueError, match="a failure of the kind"):
        protocol.parse_failure({"kind": kind, "message": "because"})


@pytest.mark.parametrize("text", [b"[" * 100_000, b"3", b"{", b"\xff", b'{"a": 1' + b"0" * 5000 + b"}"])
def test_a_header_is_not_believed(text: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(protocol.LENGTHS.pack(len(text), 0) + text)
        with pytest.raises(ValueError):  # noqa: PT011  each of them says something else
            protocol.receive_message(ours, 0)


def test_what_a_renderer_sends_instead_of_a_page_costs_one_page(stub: Sandbox) -> None:
    stub.open(b"from pipeline.render.protocol import send_message; send_message(socket.socket(fileno=os.dup(int(sys.argv[1]))), {'a': 1})")
    assert find_failure_kind(stub, 2) == "crash"
    assert next(stub.draw_pages(1)).page_no == 1


@pytest.mark.parametrize("lengths", [(2**31, 0), (2, 2**40)])
def test_a_renderer_cannot_make_its_parent_hold_more_than_a_page(stub: Sandbox, lengths: tuple[int, int]) -> None:
    stub.open(f"os.write(int(sys.argv[1]), struct.pack('>IQ', *{lengths}) + b'{{}}' * 99)".encode())
    assert find_failure_kind(stub, 2) == "crash"


def test_a_long_message_is_cut(stub: Sandbox) -> None:
    stub.open(b"from pipeline.errors import DocumentError; raise DocumentError('broken', 'x' * 3_000_000)")
    with pytest.raises(DocumentError, match=r"^x{1000}$"):
        list(stub.draw_pages(2))


def test_a_renderer_that_goes_on_talking_is_killed(stub: Sandbox) -> None:
    stub.open(b"fd = int(sys.argv[1]); os.write(fd, bytes(2) + b'A' + bytes(9))\nwhile True: os.write(fd, b' '), time.sleep(.01)")
    stub.settings = RenderSettings(timeout_s=0.5)
    assert find_failure_kind(stub, 2) == "timeout"


def test_a_renderer_has_a_limit_of_cpu_time_of_its_own(tmp_path: Path) -> None:
    with Sandbox(RenderSettings(timeout_s=0.5)) as sandbox:
        sandbox.start_child()
        sandbox.settings = RenderSettings(timeout_s=60)
        sandbox.open(make_endless_pdf())
        assert find_failure_kind(sandbox, 1) == "timeout"
        assert "CPU" in sandbox.deaths[0].message


def test_a_renderer_that_hangs_is_killed(stub: Sandbox) -> None:
    stub.settings = RenderSettings(timeout_s=0.5)
    stub.open(b"while True: pass")
    assert stub.child is not None
    pid = stub.child.pid
    assert find_failure_kind(stub, 2) == "timeout"
    assert wait_for_end(pid)
    assert stub.open(b"pass") == 9


def test_an_interrupted_call_leaves_no_answer_behind(stub: Sandbox) -> None:
    stub.open(b"time.sleep(60)")
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        list(stub.draw_pages(2))
    assert stub.child is None
    assert next(stub.draw_pages(1)).page_no == 1


def test_a_document_that_ends_every_renderer_is_given_up(stub: Sandbox) -> None:
    stub.open(b"os.abort()")
    assert [find_failure_kind(stub, page_no) for page_no in range(2, 6)] == ["crash"] * 4
    assert len(stub.deaths) == module.DEATHS_PER_DOCUMENT


def test_a_document_whose_pages_are_all_slow_is_given_up(stub: Sandbox) -> None:
    stub.open(b"pass")
    assert 0 < stub.spent < 1
    stub.spent = 12
    with pytest.raises(DocumentError, match=r"page 3 was not tried: .* 12 times the limit of a page; its 9 pages may take 11"):
        list(stub.draw_pages(3))
    stub.open(b"pass")
    assert next(stub.draw_pages(3)).page_no == 3


def test_a_real_page_without_end_times_out() -> None:
    with Sandbox(RenderSettings(timeout_s=1)) as sandbox:
        assert sandbox.open(make_endless_pdf()) == 1
        assert find_failure_kind(sandbox, 1) == "timeout"


@pytest.mark.parametrize(("mode", "kind", "options"), [("L", "PNG", {}), ("RGBA", "PNG", {}), ("L", "JPEG", {"progressive": True})])
def test_a_real_image_larger_than_the_memory_allowed_fails(mode: str, kind: str, options: dict[str, bool]) -> None:
    with Sandbox(RenderSettings(memory_bytes=16 * 2**20)) as sandbox:
        sandbox.open(encode_image(Image.new(mode, (5000, 5000)), kind, **options))
        assert find_failure_kind(sandbox, 1) == "memory"
        assert sandbox.open(make_page_pdf()) == 1


def test_a_100_megapixel_photograph_is_served_in_little_memory() -> None:
    photograph = encode_image(Image.new("L", (10_000, 10_000), 200), "JPEG")
    with Sandbox(RenderSettings(memory_bytes=96 * 2**20)) as sandbox:
        sandbox.open(photograph)
        assert np.all(next(sandbox.draw_pages()).pixels == 200)


def test_a_killed_renderer_is_replaced(real: Sandbox) -> None:
    real.open(make_page_pdf())
    assert real.child is not None
    real.child.kill()
    real.child.wait()
    assert real.open(make_page_pdf()) == 1


def test_a_renderer_is_replaced_after_some_documents(real: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DOCUMENTS_PER_PROCESS", 2)
    pids = []
    for _ in range(5):
        real.open(make_page_pdf())
        assert real.child is not None
        pids.append(real.child.pid)
    assert len(set(pids[-4:])) == 2


def test_a_renderer_is_replaced_after_some_pages(real: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGES_PER_PROCESS", 2)
    real.close()
    real.open(make_pages_pdf(5))
    pids = [(page.page_no, real.child.pid) for page in real.draw_pages() if real.child is not None]
    assert [page_no for page_no, _ in pids] == [1, 2, 3, 4, 5]
    assert [pids.index(next(p for p in pids if p[1] == pid)) for _, pid in pids] == [0, 0, 2, 2, 4]


def test_a_renderer_that_does_not_start_at_once_is_tried_again(stub: Sandbox, tmp_path: Path) -> None:
    (script,) = stub.program
    marker = tmp_path / "tried"
    Path(script).write_text(f"import os; os.path.exists({str(marker)!r}) or (open({str(marker)!r}, 'w').close(), os._exit(1))\n{STUB}")
    assert stub.open(b"pass") == 9


def test_a_renderer_that_does_not_start_says_why() -> None:
    sandbox = Sandbox(RenderSettings())
    sandbox.program = ("-c", "import no_such_module")
    with pytest.raises(RunError, match="No module named 'no_such_module'"):
        sandbox.open(make_page_pdf())


def test_the_child_sees_no_secrets(stub: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hush")
    stub.open(b"global said; said = tuple(os.environ.values()) + tuple(sys.argv)")
    said = next(stub.draw_pages(2)).warnings
    assert len(said) > 3
    assert not any("hush" in text for text in said)


def test_the_child_loads_neither_torch_nor_ray(stub: Sandbox) -> None:
    (script,) = stub.program
    Path(script).write_text(f"from pipeline.render import document\n{STUB}")
    stub.open(b"global said; said = tuple(sys.modules)")
    loaded = set(next(stub.draw_pages(2)).warnings)
    assert "pymupdf" in loaded
    assert not {"torch", "ray", "transformers", "pyarrow", "pydantic"} & loaded


ATTEMPTS = {
    "write a large file": "os.write(2, b'x' * 2**21) > 2**20 or os.abort()",
    "dump core": "resource.getrlimit(resource.RLIMIT_CORE)[0] or os.abort()",
    "open a socket": "socket.socket()",
    "open a local socket": "socket.socket(socket.AF_UNIX)",
    "start a program": "subprocess.run(['true'])",
    "start a process": "os.fork() or os._exit(0)",
    "become a program": "os.execv('/bin/sleep', ['sleep', '60'])",
}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems only lend some of these limits")
@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS)
def test_the_child_is_confined(stub: Sandbox, attempt: str) -> None:
    stub.open(attempt.encode())
    assert find_failure_kind(stub, 2) == "crash"


def test_the_child_may_start_threads(stub: Sandbox) -> None:
    stub.open(b"import threading; t = threading.Thread(target=exec, args=('global said; said = [1]', globals())); t.start(); t.join()")
    assert next(stub.draw_pages(2)).warnings == ("1",)


ORPHAN = """
import os, sys, threading, time
from pipeline.budget import RenderSettings
from pipeline.render.sandbox import Sandbox
from tests.support.pdfs import make_endless_pdf

def work():
    global sandbox
    sandbox = Sandbox(RenderSettings())
    sandbox.open(make_endless_pdf())
    print(sandbox.child.pid, flush=True)
    threading.Timer(1, lambda: os._exit(1) if "exit" in sys.argv else os.kill(os.getpid(), 9)).start()
    next(sandbox.draw_pages())

threading.Thread(target=work, daemon=True).start() if "thread" in sys.argv else print(end="")
time.sleep(60) if "thread" in sys.argv else work()
"""
"""A parent that ends in the middle of a page."""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the child ends with its CPU time")
@pytest.mark.parametrize("how", ["kill main", "kill thread", "exit thread"])
def test_the_child_dies_with_its_parent_in_the_middle_of_a_page(how: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.run([sys.executable, "-c", ORPHAN, *how.split()], capture_output=True, text=True, check=False, env=environment)
    assert parent.returncode == (1 if "exit" in how else -signal.SIGKILL)
    assert wait_for_end(int(parent.stdout))


@pytest.mark.skipif(not PDFJS.exists(), reason="the shared corpora are not here")
def test_odd_pdfs_are_pages_or_document_errors(real: Sandbox) -> None:
    files = sorted(PDFJS.glob("*.pdf"))[::12]
    outcomes = []
    for file in files:
        try:
            pages = list(real.draw_pages(1, 3)) if real.open(file.read_bytes()) else []
            outcomes.append(len(pages) > 0)
        except DocumentError as error:
            outcomes.append(bool(error.kind) and bool(error.message))
    assert outcomes == [True] * len(files)
