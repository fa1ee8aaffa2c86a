"""Progress of a run in a terminal, a notebook or a log.

A run shows its phases. On a terminal and in a notebook a bar stands below a line for each phase that has ended; elsewhere (files, CI,
TERM=dumb) there is a line every 30 s and at each change of phase, without control characters:

    listing             0.1 s  40 documents
    starting Ray        4.2 s
    loading the model   9.8 s
    asking             30.0 s  12/40 documents, 16 pages, 0.5 pages/s, 1 failed (render/broken), engine busy 93 %, 70 s left
    asking             91.3 s  40/40 documents, 52 pages, 0.6 pages/s, 1 failed (render/broken), engine busy 97 %
    settling            1.2 s  40/40 documents
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from pipeline.cli.console import make_console, print_text, strip_control_characters
from pipeline.report import Phase, Progress
from pipeline.wording import format_count, format_duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

LINE_PERIOD_S = 30.0
"""How often a run that is not shown on a terminal prints where it stands."""
DRAWS_PER_S, BAR_COLUMNS = 5, 12
NOTEBOOK_PERIOD_S = 0.5
"""A notebook's output is replaced no more often."""
MAX_KINDS = 3
"""Kinds of failure that are named."""
LINE_ORDER = ("documents", "pages", "speed", "failed", "busy", "left")
BAR_ORDER = ("documents", "left", "failed", "speed", "pages", "busy")
"""What a bar leaves out where it is too wide, from the end."""
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
            self.print_phase(is_over=False)

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

    def print_phase(self, is_over: bool) -> None:
        """Print the line of the current phase."""
        with self.lock:
            if self.newest and self.is_open:
                self.print(format_phase(self.newest, time.monotonic() - self.phase_started_s, is_over))

    def finish(self) -> None:
        self.print_phase(is_over=True)

    def close(self) -> None:
        super().close()
        self.closed.set()


class PhaseBar(PhaseLines):
    """Draws a bar below the lines of the phases that have ended."""

    def start_drawing(self) -> None:
        self.bar = self.make_bar()
        self.bar.start()

    def make_bar(self) -> Bar:
        """Return a bar that is not drawn yet."""
        from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task
        from rich.progress import Progress as Bar
        from rich.table import Column
        from rich.text import Text

        display = self

        class PhaseColumn(ProgressColumn):
            """What is done, and the time that is left or, while that is unknown, the time since the phase began."""

            def render(self, task: Task) -> Text:
                room = max(20, display.console.width - BAR_COLUMNS - 5)  # with the spinner; two columns are for "^C"
                text = Text(format_bar(display.newest, task.elapsed or 0.0, room))
                text.truncate(room, overflow="ellipsis")
                return text

        bar = Bar(
            SpinnerColumn(), BarColumn(BAR_COLUMNS), PhaseColumn(Column(no_wrap=True)),
            console=self.console, transient=True, refresh_per_second=DRAWS_PER_S,
            redirect_stdout=False, redirect_stderr=False,  # Ray keeps what stands there for its exit handlers
        )  # fmt: skip
        bar.add_task("", total=None)
        return bar

    def draw(self, now: Progress, begins: bool) -> None:
        task = self.bar.tasks[0]
        total = None if now.is_listing else now.documents
        is_news = begins or total != task.total
        change = self.bar.reset if begins else self.bar.update
        change(task.id, total=total, completed=now.documents_done)
        if is_news:
            self.bar.refresh()

    def close(self) -> None:
        super().close()
        self.bar.stop()


class PhaseNotebook(PhaseBar):
    """Draws lines and bar as one output of a notebook's cell, which is replaced as the run goes on."""

    def start_drawing(self) -> None:
        from IPython.display import display

        self.bar, self.lines, self.drawn_s = self.make_bar(), list[str](), 0.0
        self.output: Any = display(self.make_picture(), display_id=True)  # type: ignore[no-untyped-call]  # IPython has no types for it

    def make_picture(self) -> Any:
        """Return what the output shows now: rich converts it to HTML and text."""
        from rich.console import Group
        from rich.jupyter import JupyterMixin
        from rich.text import Text

        parts = [*map(Text, self.lines), *([self.bar.get_renderable()] if self.is_open else [])]

        class Picture(JupyterMixin):
            def __rich__(self) -> Group:
                return Group(*parts)

        return Picture()

    def print(self, text: str) -> None:
        self.lines.append(strip_control_characters(text))
        self.output.update(self.make_picture())

    def draw(self, now: Progress, begins: bool) -> None:
        super().draw(now, begins)
        if begins or time.monotonic() > self.drawn_s + NOTEBOOK_PERIOD_S:
            self.drawn_s = time.monotonic()
            self.output.update(self.make_picture())

    def close(self) -> None:
        super().close()
        self.output.update(self.make_picture())


@contextmanager
def show_progress(console: Console | None = None, quiet: bool = False, bar: bool = True) -> Iterator[ProgressDisplay]:
    """Show where a run stands while the block runs: by a bar on a terminal and in a notebook, else by lines; not at all if quiet.

    `console` is one on stderr by default. `update` of what this yields is the `on_progress` of a run.
    """
    console = console or make_console()
    display = ProgressDisplay(console) if quiet else choose_display(console, bar)(console)
    try:
        yield display
        display.finish()
    finally:
        display.close()


def choose_display(console: Console, bar: bool) -> type[PhaseLines]:
    """Return how progress is shown on a console."""
    if bar and console.is_terminal and not console.is_dumb_terminal:
        return PhaseBar
    return PhaseNotebook if bar and is_in_notebook() else PhaseLines


def is_in_notebook() -> bool:
    """Say whether this process runs a notebook's cells."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def format_phase(now: Progress, elapsed_s: float, is_over: bool = True) -> str:
    """Return the line of a phase: its name, its time so far and what it has got through; unless it is over, the time that is left."""
    counts = format_counts(now, [name for name in LINE_ORDER if name != "left" or not is_over]) if now.phase in COUNTING else ""
    return f"{now.phase:<17} {format_duration(elapsed_s):>7}  {counts}".rstrip()


def format_bar(now: Progress | None, elapsed_s: float, room: int) -> str:
    """Return what stands beside a bar, at most so many columns of it: phase, counts, and the time that is left or has passed."""
    if now is None:
        return f"checking the job, {format_duration(elapsed_s, 0)}"
    passed = [format_duration(elapsed_s, 0)] if now.remaining_s is None else []
    for shown in range(len(BAR_ORDER), -1, -1):
        text = ", ".join([f"{now.phase} {format_counts(now, BAR_ORDER[:shown])}".rstrip(), *passed])
        if len(text) <= room:
            break
    return text


def format_counts(now: Progress, order: Sequence[str] = LINE_ORDER) -> str:
    """Return how many documents there are and how many of them are done, and these other counts as far as the phase has them."""
    if now.phase is Phase.LISTING:
        found = now.documents_done if now.documents is None else now.documents
        so_far = " so far" * (now.documents is None)
        return f"{format_count(found, 'document')}{so_far}" if found or not so_far else ""
    if now.documents is None:
        return ""
    parts = {"documents": f"{now.documents_done}/{now.documents} documents{' so far' * now.is_listing}"}
    if now.phase in COUNTING and now.remaining_s:
        parts["left"] = f"{format_duration(now.remaining_s, 0)} left"
    if now.phase is Phase.ASKING:
        parts |= {"pages": f"{now.pages_done} pages", "speed": f"{now.pages_per_s:.1f} pages/s", "failed": format_failures(now)}
        if now.engine_busy_share is not None:
            parts["busy"] = f"engine busy {now.engine_busy_share:.0%}".replace("%", " %")
    return ", ".join(parts[name] for name in order if name in parts)


def format_failures(now: Progress) -> str:
    """Return how many requests failed, with the most frequent kinds: `5 failed (render/broken 3, generate/loop 2)`."""
    kinds = sorted(now.failures.items(), key=lambda one: -one[1])
    named = [f"{kind} {count}" if len(kinds) > 1 else kind for kind, count in kinds[:MAX_KINDS]] + ["…"] * (len(kinds) > MAX_KINDS)
    return f"{now.failed} failed" + (f" ({', '.join(named)})" if named else "")


def show_waiting(text: str, quiet: bool) -> AbstractContextManager[object]:
    """Show on a terminal that something takes its time; messages that are printed meanwhile stand above it."""
    return nullcontext() if quiet else make_console().status(text)
