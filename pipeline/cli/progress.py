"""Progress of a run on the terminal.

A run shows its phases. On a terminal a bar stands below a line for each phase that has ended; elsewhere (files, CI, TERM=dumb) there is a
line every 30 s and at each change of phase, without control characters:

    listing             0.1 s  12 documents
    starting Ray        4.2 s
    loading the model   9.8 s
    asking             25.1 s  12/12 documents, 16 pages, 0.6 pages/s, 0 failed
    settling            1.2 s  12/12 documents
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING

from pipeline.cli.console import make_console, print_text
from pipeline.report import Phase, Progress

if TYPE_CHECKING:
    from rich.console import Console

LINE_PERIOD_S = 30.0
"""How often a run that is not shown on a terminal prints where it stands."""
DRAWS_PER_S, BAR_COLUMNS = 5, 12
COUNTING = (Phase.LISTING, Phase.ASKING, Phase.SETTLING, Phase.READING)
"""Phases that get through documents."""


class ProgressDisplay:
    """Shows where a run stands. This one shows only messages, which `--json` does not suppress."""

    def __init__(self, console: Console) -> None:
        self.console, self.lock = console, threading.RLock()
        self.newest: Progress | None = None
        self.phase_started_s = time.monotonic()
        self.is_open = True

    def update(self, now: Progress) -> None:
        """Show a new state; from any thread."""

    def print(self, text: str) -> None:
        """Print text above what changes."""
        print_text(self.console, text)

    def finish(self) -> None:
        """Show that the last phase has ended."""

    def close(self) -> None:
        """Show nothing more."""
        self.is_open = False

    def stop(self, text: str) -> None:
        """Print text as the last that this display shows; from any thread."""
        with self.lock:
            self.close()
            self.print(text)


class PhaseLines(ProgressDisplay):
    """Prints a line when a phase ends, and now and then one about the current phase."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.closed = threading.Event()
        self.start_drawing()

    def start_drawing(self) -> None:
        threading.Thread(target=self.print_periodically, daemon=True).start()

    def print_periodically(self) -> None:
        while not self.closed.wait(LINE_PERIOD_S):
            self.print_phase()

    def update(self, now: Progress) -> None:
        with self.lock:
            if not self.is_open:
                return
            before, started_s = self.newest, self.phase_started_s
            begins = before is None or before.phase is not now.phase
            if begins:
                self.phase_started_s = time.monotonic()
            self.newest = now
            self.draw(now, begins)
            if before and begins:
                self.print(format_phase(before, self.phase_started_s - started_s))

    def draw(self, now: Progress, begins: bool) -> None:
        """Show a state, of a phase that begins or goes on."""

    def print_phase(self) -> None:
        """Print the line of the current phase."""
        with self.lock:
            if self.newest and self.is_open:
                self.print(format_phase(self.newest, time.monotonic() - self.phase_started_s))

    def finish(self) -> None:
        self.print_phase()

    def close(self) -> None:
        super().close()
        self.closed.set()


class PhaseBar(PhaseLines):
    """Draws a bar below the lines of the phases that have ended."""

    def start_drawing(self) -> None:
        from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task
        from rich.progress import Progress as Bar
        from rich.table import Column
        from rich.text import Text

        class PhaseColumn(ProgressColumn):
            """What is done, and the time that is left or, while that is unknown, the time since the phase began."""

            def render(self, task: Task) -> Text:
                left_s = task.time_remaining
                clock = format_duration(task.elapsed or 0.0, 0) if left_s is None else f"{format_duration(left_s, 0)} left"
                text = Text(f"{task.description}, {clock}")
                text.truncate(max(20, console.width - BAR_COLUMNS - 5), overflow="ellipsis")  # with the spinner; two columns are for "^C"
                return text

        console = self.console
        self.bar = Bar(
            SpinnerColumn(), BarColumn(BAR_COLUMNS), PhaseColumn(Column(no_wrap=True)),
            console=self.console, transient=True, refresh_per_second=DRAWS_PER_S,
            redirect_stdout=False, redirect_stderr=False,  # Ray keeps what stands there for its exit handlers
        )  # fmt: skip
        self.task = self.bar.add_task("checking the job", total=None)
        self.bar.start()

    def draw(self, now: Progress, begins: bool) -> None:
        change = self.bar.reset if begins else self.bar.update
        description = f"{now.phase} {format_counts(now)}".rstrip()
        is_news = begins or now.documents != self.bar.tasks[0].total
        change(self.task, total=now.documents, completed=now.documents_done, description=description)
        if is_news:
            self.bar.refresh()

    def close(self) -> None:
        super().close()
        self.bar.stop()


@contextmanager
def show_progress(console: Console, quiet: bool = False, bar: bool = True) -> Iterator[ProgressDisplay]:
    """Show where a run stands while the block runs: by a bar on a terminal, else by lines; not at all if quiet."""
    kind = PhaseBar if bar and console.is_terminal and not console.is_dumb_terminal else PhaseLines
    display = ProgressDisplay(console) if quiet else kind(console)
    try:
        yield display
        display.finish()
    finally:
        display.close()


def format_phase(now: Progress, elapsed_s: float) -> str:
    """Return the line of a phase: its name, its time so far and what it has got through."""
    counts = format_counts(now) if now.phase in COUNTING else ""
    return f"{now.phase:<17} {format_duration(elapsed_s):>7}  {counts}".rstrip()


def format_counts(now: Progress) -> str:
    """Return how many documents there are and how many of them are done; while asking, also pages and failures."""
    if now.phase is Phase.LISTING:
        found = now.documents_done if now.documents is None else now.documents
        so_far = " so far" * (now.documents is None)
        return f"{found} document{'s' * (found != 1)}{so_far}" if found or not so_far else ""
    if now.documents is None:
        return ""
    documents = f"{now.documents_done}/{now.documents} documents"
    return (
        f"{documents}, {now.pages_done} pages, {now.pages_per_s:.1f} pages/s, {now.failed} failed"
        if now.phase is Phase.ASKING
        else documents
    )


def format_duration(seconds: float, decimals: int = 1) -> str:
    """Return seconds as `7.5 s` or `1:02:03`."""
    return f"{seconds:.{decimals}f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))


def show_waiting(text: str, quiet: bool) -> AbstractContextManager[object]:
    """Show on a terminal that something takes its time; messages that are printed meanwhile stand above it."""
    return nullcontext() if quiet else make_console().status(text)
