"""Pseudo-terminal: runs a command as a terminal of a given size would, and records every screen it shows, each with its time.

The screen is read by pyte, from the bytes that the command writes. It is larger than the terminal that the command is given, so that
a line that is too wide is seen as one, and nothing scrolls away.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pyte

PAPER_COLUMNS, PAPER_LINES = 400, 400
CTRL_C = b"\x03"
PATIENCE_S = 120.0
TAKE_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
"""Makes the terminal the controlling one of the new session, so that its Ctrl-C becomes a signal, and starts the command."""


@dataclass(frozen=True)
class TerminalScreen:
    """What is on a screen from `at_s` on, counted from the start of the command."""

    at_s: float
    lines: tuple[str, ...]
    """From the top to the last line that has text, without trailing spaces."""

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def last(self) -> str:
        """The last line that has text."""
        return self.lines[-1] if self.lines else ""


class Terminal:
    """A command in a terminal of its own: `with Terminal([...]) as terminal`. What is still running at the end is killed."""

    def __init__(
        self,
        command: Sequence[str | Path],
        columns: int = 80,
        rows: int = 24,
        folder: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """`variables` are set in the command's environment; NO_COLOR, COLUMNS and LINES of this process are not passed on."""
        hidden = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "CI"}
        inherited = {name: value for name, value in os.environ.items() if name not in hidden}
        self.paper = pyte.Screen(PAPER_COLUMNS, PAPER_LINES)
        self.stream = pyte.ByteStream(self.paper)
        self.bytes, self.lines, self.screens = bytearray(), list[str](), list[TerminalScreen]()
        self.master, terminal = os.openpty()
        self.resize(columns, rows)
        self.started_s = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-ISc", TAKE_TERMINAL, *command],
            stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, cwd=folder,
            env={**inherited, "TERM": "xterm-256color", **(variables or {})},
        )  # fmt: skip
        os.close(terminal)
        self.changed = threading.Condition()
        self.closed = False
        self.pressed_s = self.ended_s = 0.0
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join(PATIENCE_S)
        os.close(self.master)

    def read(self) -> None:
        """Record what the command writes until every process has closed the terminal."""
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # EIO: nothing has the terminal open
                data = b""
            with self.changed:
                if data:
                    self.bytes += data
                    for drawn in re.split(rb"(?=\r)", data):  # a line that is drawn again begins with a carriage return
                        self.stream.feed(drawn)
                        self.record()
                else:
                    self.closed = True
                self.changed.notify_all()
            if not data:
                return

    def record(self) -> None:
        """Take what has changed on the paper as a new screen."""
        for row in sorted(self.paper.dirty):
            cells = self.paper.buffer[row]
            self.lines += [""] * (row + 1 - len(self.lines))
            self.lines[row] = "".join(cells[column].data for column in range(max(cells, default=-1) + 1)).rstrip()
        self.paper.dirty.clear()
        shown = tuple(self.lines)
        while shown and not shown[-1]:
            shown = shown[:-1]
        if shown != self.screen.lines:
            self.screens.append(TerminalScreen(self.now_s, shown))

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.started_s

    @property
    def screen(self) -> TerminalScreen:
        """What is shown now."""
        return self.screens[-1] if self.screens else TerminalScreen(0.0, ())

    def resize(self, columns: int, rows: int = 24) -> None:
        """Give the terminal this size; the kernel sends SIGWINCH to the command."""
        self.columns = columns
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        """Press keys; `pressed_s` is when."""
        os.write(self.master, keys)
        self.pressed_s = self.now_s

    def wait_for(self, wanted: str | Callable[[TerminalScreen], object], timeout_s: float = PATIENCE_S) -> TerminalScreen:
        """Return the first screen, from now on, that has this text. Raises AssertionError where none comes in time."""
        has = (lambda screen: wanted in screen.text) if isinstance(wanted, str) else wanted
        with self.changed:
            self.changed.wait_for(lambda: has(self.screen) or self.closed, timeout_s)
            assert has(self.screen), f"not seen: {wanted}; the screen is\n{self.screen.text}"
            return self.screen

    def wait_for_end(self, timeout_s: float = PATIENCE_S) -> int:
        """Return the exit code, when the command has ended and nothing has the terminal open. Raises TimeoutExpired, AssertionError."""
        code = self.process.wait(timeout_s)
        self.ended_s = self.now_s
        self.reader.join(timeout_s)
        assert self.closed, f"something still has the terminal open; the screen is\n{self.screen.text}"
        return code

    @property
    def text(self) -> str:
        """Everything that was written, with its control characters."""
        return self.bytes.decode(errors="replace")

    def find_first(self, text: str) -> TerminalScreen:
        """Return the first screen that had this text. Raises AssertionError where none had."""
        for screen in self.screens:
            if text in screen.text:
                return screen
        raise AssertionError(f"no screen had {text!r}; the last is\n{self.screen.text}")

    def list_wide_lines(self, columns: int | None = None, since_s: float = 0.0) -> list[str]:
        """Return the lines of all screens that do not fit."""
        return [line for line in self.list_lines(since_s) if len(line) > (columns or self.columns)]

    def list_lines(self, since_s: float = 0.0) -> Iterable[str]:
        """Return every line that ever was on a screen, once, in the order of their first appearance."""
        return dict.fromkeys(line for screen in self.screens if screen.at_s >= since_s for line in screen.lines)
