"""Render sandbox: takes the bytes of a document and returns its pages, drawn by a child process (`worker.py`) that can be killed.

    with Sandbox(settings) as sandbox:
        page_count = sandbox.open(data)
        for page in sandbox.draw_pages(1, 4): ...

The child has one socket, the end of a pipe, a temporary file for its stderr (at most 1 MiB) and no secrets. It reads no files but
libraries, writes none, and has no network, no children, no process to signal, no core dumps, and a bounded address space (`confine.py`).
This process, which has secrets, hides its memory and environment from others of its user.

Each call has a deadline: the parent kills the child then, and a limit on CPU time ends it if the parent cannot. The child dies with
its parent, even in the middle of a page. Its messages are bounded and validated (`protocol.py`).

A child is replaced after a crash or a timeout, and after a number of documents or pages, because MuPDF caches what it has read
while a document is open. The parent holds the bytes of the open document (at most `limits.max_file_mib`) and one page. Once per
document, a call whose child crashed or lacked memory is repeated in a new child: earlier documents may have filled its memory,
or another process may have killed it, and neither is the document's fault.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from typing import TypeVar

from pipeline.budget import RenderSettings
from pipeline.errors import DocumentError, RunError
from pipeline.processes import hide_process
from pipeline.records import Page, PageMeasure
from pipeline.render import protocol
from pipeline.render.protocol import Header

DOCUMENTS_PER_PROCESS = 200
PAGES_PER_PROCESS = 1000
DEATHS_PER_DOCUMENT = 3
"""No more pages of a document are tried after it has ended this many children: 500 pages with a timeout of 60 s take 8 hours."""
TIMEOUTS_PER_DOCUMENT = 10
PAGES_PER_TIMEOUT = 10
"""All pages of a document together may take 10 times `limits.timeout_s`, plus a tenth of it for each page: 2,000 pages of 59 s
would take 33 hours."""
READING_TIMEOUTS = 5
"""Times `limits.timeout_s` that OCR of a page may take: 300 s by default, where it takes 3 to 10 s on an idle machine."""
CHILD_START_ATTEMPTS = 3
START_TIMEOUT_S = 60.0
INHERITED_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")

Result = TypeVar("Result")


class Sandbox:
    """Renderer in a child process, which is replaced when it dies. One open document at a time; not for several threads."""

    program: tuple[str, ...] = ("-m", "pipeline.render.worker")

    def __init__(self, settings: RenderSettings) -> None:
        self.settings = settings
        self.child: subprocess.Popen[bytes] | None = None
        self.documents_opened = self.pages_drawn = 0
        """By the current child."""
        self.data = b""
        self.page_count = 0
        self.deaths: list[DocumentError] = []
        """Calls of the open document that ended a child."""
        self.has_retried = False
        self.spent = 0.0
        """Time that the calls of the open document have taken, in limits of a call."""
        self.gaps: tuple[str, ...] = ()
        """What the system does not restrict in the current child, a sentence each."""

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the child and close the document."""
        self.data, self.page_count = b"", 0
        if self.child is not None:
            self.stop_child()

    def open(self, data: bytes) -> int:
        """Return the page count of a document, which stays open until the next call. Raises DocumentError; RunError if no child starts."""
        self.data, self.page_count, self.deaths, self.has_retried, self.spent = data, 0, [], False, 0.0
        self.page_count = self.retry_once(self.load_document)
        return self.page_count

    def draw_pages(self, first_page: int = 1, last_page: int | None = None) -> Iterator[Page]:
        """Yield pages of the open document in this range (1-based, last page included), each drawn when it is requested.

        Raises DocumentError for a page that fails; other pages can be drawn after that.
        """
        for page_no in range(first_page, min(last_page or self.page_count, self.page_count) + 1):
            yield self.retry_once(partial(self.draw_page, page_no))

    def measure_page(self, page_no: int) -> PageMeasure:
        """Return the measures of a page of the open document, which is not drawn. Raises DocumentError."""
        if self.child is None:
            self.load_document()
        return self.call_child(f"page {page_no}", {"measure": page_no}, b"", lambda header, _: protocol.parse_measures(header))

    def retry_once(self, attempt: Callable[[], Result]) -> Result:
        """Return the result of an attempt; the document's first crash or lack of memory repeats it in a new child."""
        try:
            return attempt()
        except DocumentError as error:
            if self.has_retried or error.kind not in ("memory", "crash"):
                raise
        self.has_retried = True
        if self.child is not None:
            self.stop_child()
        return attempt()

    def load_document(self) -> int:
        """Have the child open the document, a new child if the old one has died or is due for replacement, and return the page count."""
        if self.child is not None and (self.child.poll() is not None or self.documents_opened >= DOCUMENTS_PER_PROCESS):
            self.stop_child()
        if self.child is None:
            self.start_child()
        self.documents_opened += 1
        return self.call_child("the document", {}, self.data, lambda header, _: protocol.parse_page_count(header, self.settings.max_pages))

    def draw_page(self, page_no: int) -> Page:
        """Have the child draw a page, a new child if the old one has died or is due for replacement."""
        return self.call_for_page(page_no, {"page_no": page_no})

    def call_for_page(self, page_no: int, header: Header, timeouts: int = 1) -> Page:
        """Return the page that answers a message, within so many times `limits.timeout_s`. Raises DocumentError."""
        self.check_document_limits(page_no)
        if self.child is not None and self.pages_drawn >= PAGES_PER_PROCESS:
            self.stop_child()
        if self.child is None:
            self.load_document()
        self.pages_drawn += 1
        cell_px = self.settings.budget.cell_px
        return self.call_child(
            f"page {page_no}", header, b"", lambda answer, body: protocol.unpack_page(answer, body, page_no, cell_px), timeouts
        )

    def check_document_limits(self, page_no: int) -> None:
        """Raise DocumentError if the document has ended too many children or taken too much time to try another page."""
        if len(self.deaths) >= DEATHS_PER_DOCUMENT:
            last = self.deaths[-1]
            raise DocumentError(last.kind, f"page {page_no} was not tried: the document has ended {len(self.deaths)} renderers; {last}")
        allowed = TIMEOUTS_PER_DOCUMENT + self.page_count / PAGES_PER_TIMEOUT
        if self.spent > allowed:
            spent = f"the document has taken {self.spent:.0f} times the limit of a page; its {self.page_count} pages may take {allowed:.0f}"
            raise DocumentError("timeout", f"page {page_no} was not tried: {spent}, at this `limits.timeout_s`")

    def start_child(self) -> None:
        """Start a child, in several attempts: a machine may lack memory or processes for a moment. Raises RunError."""
        for _ in range(CHILD_START_ATTEMPTS - 1):
            with suppress(RunError):
                return self.try_start_child()
        return self.try_start_child()

    def try_start_child(self) -> None:
        """Start a child and wait until it has confined itself. Raises RunError."""
        hide_process()
        self.documents_opened = self.pages_drawn = 0
        self.resources = ExitStack()
        deadline, is_complete = time.monotonic() + START_TIMEOUT_S, False
        try:
            ours, theirs = socket.socketpair()
            self.connection = self.resources.enter_context(ours)
            with theirs:
                self.stderr_file = self.resources.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  `resources` is its context
                self.child = self.spawn_child(theirs.fileno())
            protocol.send_message(self.connection, asdict(self.settings), deadline=deadline)
            hello, _ = protocol.receive_message(self.connection, 0, deadline)
            self.gaps = tuple(map(str, hello["gaps"]))
            is_complete = True
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = self.stop_child()[1] if self.child else str(error)
            raise RunError(f"the render process does not start: {reason or error}") from None
        finally:
            if not is_complete:
                self.stop_child(grace_s=0)

    def spawn_child(self, descriptor: int) -> subprocess.Popen[bytes]:
        """Return a new child. Its stdin carries no data: it closes when this process dies (`die_when_pipe_closes`)."""
        return subprocess.Popen(
            [sys.executable, "-P", *self.program, str(descriptor)],
            pass_fds=(descriptor,),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.stderr_file,
            env=build_child_environment(),
        )

    def call_child(self, what: str, header: Header, body: bytes, parse: Callable[[Header, bytearray], Result], timeouts: int = 1) -> Result:
        """Send a message and return the parsed answer. Raises DocumentError if the child reports a failure, crashes or times out."""
        start_s, limit_s, is_complete = time.monotonic(), timeouts * self.settings.timeout_s, False
        deadline = start_s + limit_s
        try:
            protocol.send_message(self.connection, header, body, deadline=deadline)
            answer, pixels = protocol.receive_message(self.connection, protocol.compute_page_bytes(self.settings.budget.cell_px), deadline)
            result = protocol.parse_failure(answer) if "kind" in answer else parse(answer, pixels)
            is_complete = True
        except TimeoutError:
            limit = f"{limit_s:g} s ({f'{timeouts} times ' if timeouts > 1 else ''}`limits.timeout_s`)"
            self.deaths.append(DocumentError("timeout", f"{what} took more than {limit} and was given up"))
            raise self.deaths[-1] from None
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            self.deaths.append(make_death_error(what, *self.stop_child(), error))
            raise self.deaths[-1] from None
        finally:
            self.spent += (time.monotonic() - start_s) / limit_s
            # After any interruption, a Ctrl-C too, the rest of this answer must not be read as the start of the next.
            if not is_complete:
                self.stop_child(grace_s=0)
        if isinstance(result, DocumentError):
            raise result
        return result

    def stop_child(self, grace_s: float = 1.0) -> tuple[int, str]:
        """Close the connection, kill the child if it does not exit within `grace_s`, and return its exit status and the end of its stderr.

        The status of a child that had to be killed is 0.
        """
        child, self.child = self.child, None
        with self.resources:
            if child is None:
                return 0, ""
            self.connection.close()
            status = 0
            try:
                with suppress(subprocess.TimeoutExpired):
                    status = child.wait(grace_s)
            finally:
                child.kill()
                child.wait()
                assert child.stdin is not None
                child.stdin.close()
            self.stderr_file.seek(max(0, self.stderr_file.seek(0, os.SEEK_END) - 300))
            return status, " ".join(self.stderr_file.read().decode("utf-8", "replace").split())


class ReadingSandbox(Sandbox):
    """Sandbox whose child also reads pages by OCR: the models are loaded when it starts, not for each page. It needs the extra `ocr`."""

    program = ("-m", "pipeline.render.reading_worker")

    def read_page(self, page_no: int) -> Page:
        """Return a page of the open document with the words that OCR reads on it, and one cell of its pixels; it is drawn once more.

        Raises DocumentError, of the kind `timeout` after `READING_TIMEOUTS` times `limits.timeout_s`.
        """
        header = {"read": page_no, "limit_s": READING_TIMEOUTS * self.settings.timeout_s}
        return self.retry_once(partial(self.call_for_page, page_no, header, READING_TIMEOUTS))


def describe_confinement() -> tuple[str, ...]:
    """Return a sentence for each restriction of renderers that this machine does not grant, as one says that is started for it.

    Raises RunError if no renderer starts.
    """
    with Sandbox(RenderSettings()) as sandbox:
        sandbox.start_child()
        return sandbox.gaps


def make_death_error(what: str, status: int, stderr_text: str, error: Exception) -> DocumentError:
    """Return the error for a child that ended by itself, by its exit status and the end of its stderr."""
    if status == -signal.SIGXCPU:
        return DocumentError("timeout", f"{what} took more CPU time than `limits.timeout_s` and was given up")
    if status == -signal.SIGKILL:
        bound = "`limits.memory_mib` bounds one renderer"
        return DocumentError("memory", f"the renderer was killed at {what}, as the kernel does when memory runs out; {bound}")
    if re.search(r"MemoryError|bad_alloc|cannot allocate", stderr_text, re.IGNORECASE):
        return DocumentError("memory", f"the renderer ran out of memory at {what} within `limits.memory_mib`: {stderr_text}")
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return DocumentError("crash", f"the renderer died at {what} ({how}): {stderr_text or error}")


def build_child_environment() -> dict[str, str]:
    """Return the child's environment: the parent's module search path, one thread for numeric libraries, and no secrets."""
    inherited = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
    search_path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    return inherited | {"PYTHONPATH": search_path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
