"""Terminal output: messages on stderr, requested data on stdout, each without what Ray prints.

File names and messages from documents are printed without control characters.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import IO, TYPE_CHECKING, TextIO

import click

from pipeline.errors import RunError

if TYPE_CHECKING:
    from rich.console import Console


LOG_WIDTH = 120
"""Columns of tables that are not printed on a terminal."""
TAIL_BYTES = 4000
"""What is printed of Ray's output when Ray breaks a run."""
COLOR = re.compile(r"\x1b\[[0-9;]*m")
SURROGATE = re.compile("[\ud800-\udfff]")
"""What bytes of a file's name that are not UTF-8 become in Python. A stream cannot write it."""


@dataclass
class OwnStreams:
    """Streams that only this command writes to, once detach_streams has set them."""

    stdout: TextIO | None = None
    stderr: TextIO | None = None


OWN = OwnStreams()


def print_message(text: str, end: str = "\n") -> None:
    """Print text on stderr; on a terminal, lines are broken between words."""
    stderr = OWN.stderr or sys.stderr
    click.echo(wrap_text(strip_control_characters(text), stderr) + end, file=stderr, nl=False)


def print_data(text: str) -> None:
    """Print text on stdout."""
    click.echo(text, file=OWN.stdout or sys.stdout)


def print_json(found: object) -> None:
    """Print an object as JSON on stdout."""
    text = json.dumps(found, indent=2, ensure_ascii=False)
    print_data(SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def strip_control_characters(text: str) -> str:
    """Return text that cannot control a terminal: file names and messages come from documents."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def wrap_text(text: str, stream: IO[str]) -> str:
    """Return text whose lines are as wide as the stream's terminal at most, long words such as paths apart; unchanged without one."""
    if (columns := measure_terminal(stream)[0]) == 0:
        return text
    lines = text.split("\n")
    return "\n".join(
        line if len(line) <= columns else fill(line, columns, break_long_words=False, break_on_hyphens=False) for line in lines
    )


def measure_terminal(stream: IO[str]) -> tuple[int, int]:
    """Return the columns and rows of the terminal that a stream writes to; zeros without one."""
    try:
        columns, rows = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):  # no terminal; no descriptor
        return 0, 0
    return columns or 80, rows or 24


def erase_line() -> None:
    """Erase the current line of a terminal: what is left of a bar whose process was killed."""
    if measure_terminal(sys.stderr)[0] > 0 and os.environ.get("TERM") != "dumb":
        sys.stderr.write("\r\x1b[2K")


def make_console(stream: TextIO | None = None) -> Console:
    """Return a console on a stream, stderr by default. Only a terminal gets control characters."""
    from rich.console import Console, ConsoleDimensions

    file = stream or sys.stderr
    on_terminal = measure_terminal(file)[0] > 0

    class StreamConsole(Console):
        """Measures its own stream's terminal, as descriptors 0 to 2 may be none. Never hides the cursor: a killed run would leave it so."""

        @property  # type: ignore[misc]  # nothing sets it
        def size(self) -> ConsoleDimensions:
            return ConsoleDimensions(*measure_terminal(file)) if on_terminal else ConsoleDimensions(LOG_WIDTH, 25)

        def show_cursor(self, show: bool = True) -> bool:
            return False

    return StreamConsole(file=file, highlight=False, force_terminal=on_terminal)


def print_text(console: Console, text: str) -> None:
    """Print text as print_message does, above what a live display shows."""
    console.print(wrap_text(strip_control_characters(text), console.file), markup=False, soft_wrap=True)


def detach_streams() -> None:
    """Prepare a process that Ray runs in: sys.stdout and sys.stderr get descriptors of their own, and 1 and 2 lead nowhere.

    Descriptors 1 and 2 are those that Ray's C++ code and Ray's processes write to.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        stream.flush()
        own = os.fdopen(os.dup(number), "w", buffering=1, encoding=stream.encoding, errors=stream.errors)
        setattr(sys, name, own)
        setattr(OWN, name, own)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.close(nothing)


@contextmanager
def capture_ray_output() -> Iterator[Console]:
    """Capture what is written to descriptors 1 and 2, sys.stdout and sys.stderr; yield a console on stderr as it was.

    Ray logs an error for every actor that Ray Data starts (ray#53727) and prints messages about processes that end, none of which a user
    could act on. Only when Ray breaks the run, the end of what was captured is printed. After detach_streams, sys.stdout and sys.stderr
    lead nowhere from then on: Ray's threads and exit handlers go on printing.
    """
    before, console = (sys.stdout, sys.stderr), make_console(sys.stderr)
    with ExitStack() as held:
        captured = held.enter_context(tempfile.TemporaryFile("w+b"))
        python = held.enter_context(os.fdopen(os.dup(captured.fileno()), "w", buffering=1))
        for number in (1, 2):
            held.callback(os.close, kept := os.dup(number))
            held.callback(os.dup2, kept, number)
            os.dup2(captured.fileno(), number)
        sys.stdout = sys.stderr = python
        try:
            yield console
        except RunError as error:
            if error.__cause__ is not None:  # Ray's fault; the message about a full disk, for one, needs no more
                captured.seek(max(0, captured.seek(0, os.SEEK_END) - TAIL_BYTES))
                if tail := COLOR.sub("", captured.read().decode(errors="replace")).strip():
                    print_text(console, tail)
            raise
        finally:
            sys.stdout, sys.stderr = (open(os.devnull, "w"),) * 2 if OWN.stderr else before  # noqa: SIM115  until the process ends


def describe_demo_model(replaced: str) -> str:
    """Return the notice that the demonstration model answers."""
    return (
        f"No GPU here: the DEMONSTRATION MODEL of this package answers instead of {replaced}.\n"
        "It reads the synthetic slips of jobs/samples; every other document fails with generate/demo."
    )


def shorten_path(output: str) -> str:
    """Return an output's path relative to the current folder, if it is inside."""
    here = Path(output)
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else output
