"""Picture of a run: runs README's first command in a pseudo-terminal and writes the screen at its end to docs/run.svg.

    python docs/draw_run.py

The command runs in an empty folder with copies of `jobs/` and `schemas/`, so that every request is asked. Output bytes go to a terminal
emulator (pyte), whose screen rich draws. Needs Linux or macOS and the packages of `.[dev]`; takes about a minute without a GPU.
"""

from __future__ import annotations

import codecs
import fcntl
import io
import os
import pty
import re
import shutil
import struct
import sys
import tempfile
import termios
from collections.abc import Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "run.svg"
COMMAND = ["run", "jobs/invoices.yaml"]
COLUMNS, ROWS = 100, 30


def main() -> int:
    screen = pyte.Screen(COLUMNS, ROWS)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("jobs", "schemas"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        status = run_in_terminal(Path(folder), screen)
    if status:
        print("\n".join(screen.display), file=sys.stderr)
        return status
    PICTURE.write_text(draw_screen(screen))
    return 0


def run_in_terminal(folder: Path, screen: pyte.Screen) -> int:
    """Run the command in a folder, show its output on a screen, and return its exit status."""
    stream, decoder = pyte.Stream(screen), codecs.getincrementaldecoder("utf-8")("replace")
    stream.feed(f"$ pipeline {' '.join(COMMAND)}\r\n")
    process, terminal = pty.fork()
    if not process:
        os.chdir(folder)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
        os.execve(sys.executable, [sys.executable, "-m", "pipeline.cli", *COMMAND], environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", ROWS, COLUMNS, 0, 0))
    while output := read_output(terminal):
        stream.feed(decoder.decode(output))
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def read_output(terminal: int) -> bytes:
    """Return the next bytes of output; none at the end, which Linux reports as an I/O error."""
    try:
        return os.read(terminal, 65_536)
    except OSError:
        return b""


def draw_screen(screen: pyte.Screen) -> str:
    """Return a screen as an SVG picture, without the empty lines at its end and without fonts from the network."""
    used = max(row for row, line in enumerate(screen.display) if line.strip()) + 1
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for row in range(used):
        console.print(draw_line(screen.buffer[row], len(screen.display[row].rstrip())))
    picture = console.export_svg(title=f"pipeline {' '.join(COMMAND)}", unique_id="run")
    return re.sub(r" *@font-face \{.*?\}\n", "", picture, flags=re.DOTALL)


def draw_line(line: Mapping[int, pyte.screens.Char], length: int) -> Text:
    """Return the first characters of a line, those of one style together."""
    cells = [(line[column].data, find_style(line[column])) for column in range(length)]
    return Text.assemble(*(("".join(data for data, _ in run), style) for style, run in groupby(cells, key=itemgetter(1))))


def find_style(cell: pyte.screens.Char) -> Style:
    colors = {"color": find_color(cell.fg), "bgcolor": find_color(cell.bg)}
    return Style(**colors, bold=cell.bold, italic=cell.italics, underline=cell.underscore, reverse=cell.reverse)


def find_color(name: str) -> str | None:
    """Return rich's name of one of pyte's colours: `brown`, `brightred`, or six hex digits."""
    if name == "default":
        return None
    if len(name) == 6 and set(name) <= set("0123456789abcdef"):
        return f"#{name}"
    plain = name.removeprefix("bright").replace("brown", "yellow")
    return f"bright_{plain}" if name.startswith("bright") else plain


if __name__ == "__main__":
    sys.exit(main())
