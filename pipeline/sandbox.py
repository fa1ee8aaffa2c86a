"""A document's bytes -> its pages, drawn in a process that can be killed. Knows no file format: `render.py` does.

    with Sandbox(settings) as sandbox:
        page_count = sandbox.open(data)
        for page in sandbox.pages(1, 4): ...

The child gets one socket and no secrets, no network where the kernel lets it go, no core dumps, next to nothing to
write, and a bounded address space. Each call has a deadline, kept here by killing the child and there by a limit of
CPU time. A message is a JSON header and raw bytes behind their lengths; nothing is ever unpickled. After a crash or a
timeout, and after `DOCUMENTS_PER_PROCESS` documents, a fresh child takes over.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.budget import CELL_AREA, MAX_TOKENS, PixelBudget, RenderSettings
from pipeline.errors import DocumentError, RunError
from pipeline.records import Page, Word

DOCUMENTS_PER_PROCESS = 200
DEATHS_PER_DOCUMENT = 3
"""A document that has ended so many renderers is given up: 500 pages that hang for a minute each are a night."""
START_TIMEOUT_S = 60.0
MAX_PAGE_BYTES = 3 * CELL_AREA * MAX_TOKENS
MAX_HEADER_BYTES = 16 * 2**20
LENGTHS = struct.Struct(">IQ")
PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")

Header = dict[str, Any]


class Sandbox:
    """A renderer in a process of its own, replaced when it dies. One document at a time, one thread."""

    program: tuple[str, ...] = ("-m", "pipeline.sandbox")

    def __init__(self, settings: RenderSettings) -> None:
        self.settings = settings
        self.child: subprocess.Popen[bytes] | None = None
        self.documents = 0
        self.data = b""
        self.page_count = 0
        self.deaths: list[DocumentError] = []

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child and forget the document."""
        self.data, self.page_count = b"", 0
        if self.child is not None:
            self.end()

    def open(self, data: bytes) -> int:
        """Return a document's page count; it stays open until the next. Raises DocumentError; RunError if no child starts."""
        self.data, self.page_count, self.deaths = data, 0, []
        self.page_count = self.load()
        return self.page_count

    def pages(self, first_page: int = 1, last_page: int | None = None) -> Iterator[Page]:
        """Yield pages of the open document, each drawn when it is asked for. Raises DocumentError; others may be asked for then."""
        for page_no in range(first_page, min(last_page or self.page_count, self.page_count) + 1):
            if len(self.deaths) >= DEATHS_PER_DOCUMENT:
                last = self.deaths[-1]
                raise DocumentError(last.kind, f"page {page_no} was not tried: the document has ended {len(self.deaths)} renderers; {last}")
            if self.child is None:
                self.load()
            header, pixels = self.ask(f"page {page_no}", {"page_no": page_no})
            yield unpack(header, pixels)

    def load(self) -> int:
        """Have a child open the document, a fresh one where it is time for it, and return the page count."""
        if self.child is not None and (self.child.poll() is not None or self.documents >= DOCUMENTS_PER_PROCESS):
            self.end()
        if self.child is None:
            self.start()
        self.documents += 1
        answer, _ = self.ask("the document", {}, self.data)
        return int(answer["page_count"])

    def start(self) -> None:
        """Start a child and wait until it has confined itself."""
        self.connection, theirs = socket.socketpair()
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the child: `end` closes it
        arguments = [sys.executable, "-P", *self.program, str(theirs.fileno()), str(os.getpid())]
        with theirs:
            self.child = subprocess.Popen(
                arguments,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.complaints,
                env=environment(),
            )
        self.documents = 0
        # The kernel's "die with your parent" means the parent's thread: promised only by one that lives as long.
        settings = asdict(self.settings) | {"tied": threading.current_thread() is threading.main_thread()}
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            send(self.connection, settings, deadline=deadline)
            receive(self.connection, 0, deadline)
        except (OSError, ValueError):
            raise RunError(f"the rendering process does not start: {self.end()[1] or 'it says nothing'}") from None

    def ask(self, what: str, header: Header, body: bytes = b"") -> tuple[Header, bytearray]:
        """Return the child's answer. However the child fails, it is a DocumentError, and the child is gone."""
        deadline = time.monotonic() + self.settings.timeout_s
        whole = False
        try:
            send(self.connection, header, body, deadline)
            answer, pixels = receive(self.connection, MAX_PAGE_BYTES, deadline)
            whole = True
        except TimeoutError:
            limit = f"{self.settings.timeout_s:g} s (`limits.timeout_s`)"
            self.deaths.append(DocumentError("timeout", f"{what} took more than {limit} and was given up"))
            raise self.deaths[-1] from None
        except (OSError, ValueError):
            self.deaths.append(died(what, *self.end()))
            raise self.deaths[-1] from None
        finally:
            # Whatever cut this short, a Ctrl-C too: half an answer must not be taken for the start of the next.
            if not whole and self.child is not None:
                self.end(grace_s=0)
        if "kind" in answer:
            raise DocumentError(answer["kind"], answer["message"])
        return answer, pixels

    def end(self, grace_s: float = 1.0) -> tuple[int, str]:
        """Hang up, kill a child that lingers, and return its exit status (0 then) and its last words on stderr."""
        assert self.child is not None
        self.connection.close()
        try:
            status = self.child.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
            status = 0
        self.child = None
        with self.complaints as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 300))
            return status, " ".join(file.read().decode("utf-8", "replace").split())


def died(what: str, status: int, last_words: str) -> DocumentError:
    """Say why a child ended that nobody ended."""
    if status == -signal.SIGXCPU:
        return DocumentError("timeout", f"{what} took more CPU time than `limits.timeout_s` and was given up")
    if status == -signal.SIGKILL:
        return DocumentError("memory", f"the renderer was killed at {what}, as the kernel does when memory runs out")
    if re.search(r"MemoryError|bad_alloc|cannot allocate", last_words, re.IGNORECASE):
        return DocumentError("memory", f"the renderer ran out of memory at {what}: {last_words}")
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return DocumentError("crash", f"the renderer died at {what} ({how}) {last_words}".rstrip())


def environment() -> dict[str, str]:
    """Return the child's environment: where Python finds what its parent found, one thread, and no secrets."""
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    search = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    return kept | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


# ---- Messages -----------------------------------------------------------------------------------------------------


def send(connection: socket.socket, header: Header, body: bytes | memoryview = b"", deadline: float | None = None) -> None:
    """Write one message. Raises TimeoutError, OSError when the other side is gone."""
    text = json.dumps(header).encode()
    for part in (LENGTHS.pack(len(text), len(body)) + text, body):
        connection.settimeout(left(deadline))
        connection.sendall(part)


def receive(connection: socket.socket, most_bytes: int, deadline: float | None = None) -> tuple[Header, bytearray]:
    """Read one message. Raises TimeoutError, OSError when the other side is gone, ValueError for nonsense."""
    header_bytes, body_bytes = LENGTHS.unpack(read_exactly(connection, LENGTHS.size, deadline))
    if header_bytes > MAX_HEADER_BYTES or body_bytes > most_bytes:
        raise ValueError(f"a message of {header_bytes} + {body_bytes} bytes")
    header = json.loads(read_exactly(connection, header_bytes, deadline))
    if not isinstance(header, dict):
        raise ValueError("a header that is no object")
    return header, read_exactly(connection, body_bytes, deadline)


def read_exactly(connection: socket.socket, count: int, deadline: float | None) -> bytearray:
    """Return so many bytes."""
    buffer = bytearray(count)
    rest = memoryview(buffer)
    while rest:
        connection.settimeout(left(deadline))
        got = connection.recv_into(rest)
        if not got:
            raise ConnectionResetError("the other side hung up")
        rest = rest[got:]
    return buffer


def left(deadline: float | None) -> float | None:
    """Return the seconds until a deadline; never 0, which would mean not to wait at all."""
    return None if deadline is None else max(1e-3, deadline - time.monotonic())


def pack(page: Page) -> Header:
    """Return what there is to say of a page beside its pixels."""
    words = [(word.text, word.x0_pt, word.y0_pt, word.x1_pt, word.y1_pt) for word in page.words]
    scalars = {name: getattr(page, name) for name in ("page_no", "dpi", "width_pt", "height_pt", "visual_tokens", "warnings")}
    return scalars | {"shape": page.pixels.shape, "words": words}


def unpack(header: Header, body: bytearray) -> Page:
    """Return the page that was packed. Raises DocumentError when the child sent something else."""
    try:
        pixels = np.frombuffer(body, np.uint8).reshape(header.pop("shape"))
        words = tuple(Word(*word) for word in header.pop("words"))
        return Page(pixels=pixels, words=words, warnings=tuple(header.pop("warnings")), **header)
    except (KeyError, TypeError, ValueError) as error:
        raise DocumentError("crash", f"the renderer sent no page: {error}") from None


# ---- The child's side ---------------------------------------------------------------------------------------------


def serve(descriptor: int, parent_pid: int, renderer: Any) -> None:
    """Answer the parent until it hangs up. `renderer` is `pipeline.render`, or has its `inspect`."""
    connection = socket.socket(fileno=descriptor)
    given, _ = receive(connection, 0)
    tied = given.pop("tied")
    settings = RenderSettings(budget=PixelBudget(**given.pop("budget")), **given)
    confine(settings, parent_pid, tied)
    send(connection, {})
    opened: Any = None
    with suppress(ConnectionError):
        while True:
            header, body = receive(connection, sys.maxsize)
            limit_cpu(settings.timeout_s)
            try:
                if "page_no" in header:
                    page = opened.draw(header["page_no"])
                    send(connection, pack(page), memoryview(page.pixels).cast("B"))
                else:
                    opened = None
                    opened = renderer.inspect(bytes(body), settings)
                    send(connection, {"page_count": opened.page_count})
            except DocumentError as error:
                send(connection, {"kind": error.kind, "message": error.message})


def confine(settings: RenderSettings, parent_pid: int, tied: bool) -> None:
    """Give up what a renderer does not need. What this kernel or system does not know is left as it is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 2**20), (resource.RLIMIT_NOFILE, 64)):
        cap(limit, most)
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    die_with_parent, no_new_privileges, new_network, new_user = 1, 38, 0x40000000, 0x10000000
    if tied:
        libc.prctl(die_with_parent, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:
            sys.exit("the parent is gone")
    libc.prctl(no_new_privileges, 1, 0, 0, 0)
    if libc.unshare(new_network) != 0:
        libc.unshare(new_network | new_user)
    with open("/proc/self/statm") as file:
        idle_bytes = int(file.read().split()[0]) * resource.getpagesize()
    cap(resource.RLIMIT_AS, idle_bytes + settings.memory_bytes)


def limit_cpu(timeout_s: float) -> None:
    """Let the kernel end this process when one call has used its time, should the parent be unable to."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cap(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + timeout_s) + 2)


def cap(limit: int, most: int) -> None:
    """Set a limit of this process, or keep a tighter one that it was born with."""
    _, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    from pipeline import render

    serve(int(sys.argv[1]), int(sys.argv[2]), render)
