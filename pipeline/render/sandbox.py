"""A document's bytes -> its pages, drawn in a process that can be killed. Knows no file format: `pipeline.render` does.

    with Sandbox(settings) as sandbox:
        page_count = sandbox.open(data)
        for page in sandbox.draw_pages(1, 4): ...

The child gets one socket and no secrets, no network, no children, no core dumps, next to nothing to write, and a bounded
address space (`confine.py`). Each call has a deadline, kept here by killing the child and there by a limit of CPU time;
it dies with its parent, in the middle of a page if need be. What it says is bounded and not believed (`wire.py`).

A fresh child takes over after a crash or a timeout, and after so many documents or pages: MuPDF keeps what it has read
of a document as long as that is open. What this side holds is the open document's bytes (`limits.max_file_mib` at most)
and one page. Once per document, a child that died or lacked memory is replaced and asked again: its predecessors may
have worn it out, or somebody may have killed it, and neither is the document's fault.
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
from pipeline.records import Page
from pipeline.render import protocol
from pipeline.render.protocol import Header

DOCUMENTS_PER_PROCESS = 200
PAGES_PER_PROCESS = 1000
DEATHS_PER_DOCUMENT = 3
"""A document that has ended so many renderers is given up: 500 pages that hang for a minute each are a night."""
PATIENCE = 10
"""A document's pages may take a tenth of `limits.timeout_s` each, taken together, and ten times that limit on top: 2,000 pages
of 59 s are a night and a day."""
CHILD_START_ATTEMPTS = 3
START_TIMEOUT_S = 60.0
PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")

Answered = TypeVar("Answered")


class Sandbox:
    """A renderer in a process of its own, replaced when it dies. One document at a time, one thread."""

    program: tuple[str, ...] = ("-m", "pipeline.render.worker")

    def __init__(self, settings: RenderSettings) -> None:
        self.settings = settings
        self.child: subprocess.Popen[bytes] | None = None
        self.documents = self.drawn = 0
        self.data = b""
        self.page_count = 0
        self.deaths: list[DocumentError] = []
        self.asked_again = False
        self.spent_s = 0.0

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
        self.data, self.page_count, self.deaths, self.asked_again, self.spent_s = data, 0, [], False, 0.0
        self.page_count = self.twice(self.load)
        return self.page_count

    def draw_pages(self, first_page: int = 1, last_page: int | None = None) -> Iterator[Page]:
        """Yield pages of the open document, each drawn when it is asked for. Raises DocumentError; others may be asked for then."""
        for page_no in range(first_page, min(last_page or self.page_count, self.page_count) + 1):
            yield self.twice(partial(self.draw, page_no))

    def twice(self, attempt: Callable[[], Answered]) -> Answered:
        """Return what an attempt returns; the document's first that finds the child dead or lacking memory is made anew in a fresh one."""
        try:
            return attempt()
        except DocumentError as error:
            if self.asked_again or error.kind not in ("memory", "crash"):
                raise
        self.asked_again = True
        if self.child is not None:
            self.end()
        return attempt()

    def load(self) -> int:
        """Have a child open the document, a fresh one where it is time for it, and return the page count."""
        if self.child is not None and (self.child.poll() is not None or self.documents >= DOCUMENTS_PER_PROCESS):
            self.end()
        if self.child is None:
            self.start_child()
        self.documents += 1
        return self.ask("the document", {}, self.data, lambda header, _: protocol.parse_page_count(header, self.settings.max_pages))

    def draw(self, page_no: int) -> Page:
        """Have a child draw a page, a fresh one where it is time for it."""
        self.check_patience(page_no)
        if self.child is not None and self.drawn >= PAGES_PER_PROCESS:
            self.end()
        if self.child is None:
            self.load()
        self.drawn += 1
        return self.ask(f"page {page_no}", {"page_no": page_no}, b"", lambda header, body: protocol.unpack_page(header, body, page_no))

    def check_patience(self, page_no: int) -> None:
        """Raise DocumentError when a document has cost enough."""
        if len(self.deaths) >= DEATHS_PER_DOCUMENT:
            last = self.deaths[-1]
            raise DocumentError(last.kind, f"page {page_no} was not tried: the document has ended {len(self.deaths)} renderers; {last}")
        allowed_s = self.settings.timeout_s * (PATIENCE + self.page_count / PATIENCE)
        if self.spent_s > allowed_s:
            spent = f"the document has taken {self.spent_s:.0f} s; its {self.page_count} pages together may take {allowed_s:.0f} s"
            raise DocumentError("timeout", f"page {page_no} was not tried: {spent} at this `limits.timeout_s`")

    def start_child(self) -> None:
        """Start a child. Tries again, because a machine that is short of memory or processes may have them a moment later."""
        for _ in range(CHILD_START_ATTEMPTS - 1):
            with suppress(RunError):
                return self.begin()
        return self.begin()

    def begin(self) -> None:
        """Start a child and wait until it has confined itself. Raises RunError."""
        self.documents = self.drawn = 0
        self.held = ExitStack()
        deadline, whole = time.monotonic() + START_TIMEOUT_S, False
        try:
            ours, theirs = socket.socketpair()
            self.connection = self.held.enter_context(ours)
            with theirs:
                self.complaints = self.held.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  `held` is its context
                self.child = self.popen(theirs.fileno())
            protocol.send_message(self.connection, asdict(self.settings), deadline=deadline)
            protocol.receive_message(self.connection, 0, deadline)
            whole = True
        except (OSError, ValueError) as error:
            why = self.end()[1] if self.child else str(error)
            raise RunError(f"the rendering process does not start: {why or error}") from None
        finally:
            if not whole:
                self.end(grace_s=0)

    def popen(self, descriptor: int) -> subprocess.Popen[bytes]:
        """Return a child. Nobody writes to its stdin: it is there to be closed when this process dies (`die_when_closed`)."""
        return subprocess.Popen(
            [sys.executable, "-P", *self.program, str(descriptor)],
            pass_fds=(descriptor,),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.complaints,
            env=build_child_environment(),
        )

    def ask(self, what: str, header: Header, body: bytes, understand: Callable[[Header, bytearray], Answered]) -> Answered:
        """Return the child's answer, understood. However the child fails, it is a DocumentError, and the child is gone."""
        asked, whole = time.monotonic(), False
        deadline = asked + self.settings.timeout_s
        try:
            protocol.send_message(self.connection, header, body, deadline)
            answer, pixels = protocol.receive_message(self.connection, protocol.MAX_PAGE_BYTES, deadline)
            said = protocol.parse_failure(answer) if "kind" in answer else understand(answer, pixels)
            whole = True
        except TimeoutError:
            limit = f"{self.settings.timeout_s:g} s (`limits.timeout_s`)"
            self.deaths.append(DocumentError("timeout", f"{what} took more than {limit} and was given up"))
            raise self.deaths[-1] from None
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            self.deaths.append(make_death_error(what, *self.end(), error))
            raise self.deaths[-1] from None
        finally:
            self.spent_s += time.monotonic() - asked
            # Whatever cut this short, a Ctrl-C too: half an answer must not be taken for the start of the next.
            if not whole:
                self.end(grace_s=0)
        if isinstance(said, DocumentError):
            raise said
        return said

    def end(self, grace_s: float = 1.0) -> tuple[int, str]:
        """Hang up, kill a child that lingers, and return its exit status (0 then) and its last words on stderr."""
        child, self.child = self.child, None
        with self.held:
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
            self.complaints.seek(max(0, self.complaints.seek(0, os.SEEK_END) - 300))
            return status, " ".join(self.complaints.read().decode("utf-8", "replace").split())


def make_death_error(what: str, status: int, last_words: str, error: Exception) -> DocumentError:
    """Say why a child ended that nobody ended."""
    if status == -signal.SIGXCPU:
        return DocumentError("timeout", f"{what} took more CPU time than `limits.timeout_s` and was given up")
    if status == -signal.SIGKILL:
        bound = "`limits.memory_mib` bounds one renderer"
        return DocumentError("memory", f"the renderer was killed at {what}, as the kernel does when memory runs out; {bound}")
    if re.search(r"MemoryError|bad_alloc|cannot allocate", last_words, re.IGNORECASE):
        return DocumentError("memory", f"the renderer ran out of memory at {what} within `limits.memory_mib`: {last_words}")
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return DocumentError("crash", f"the renderer died at {what} ({how}): {last_words or error}")


def build_child_environment() -> dict[str, str]:
    """Return the child's environment: where Python finds what its parent found, one thread, and no secrets."""
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    search = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    return kept | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
