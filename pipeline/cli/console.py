"""Terminal output: reports, counts and progress on stderr, requested data on stdout.

A run shows its phases. On a terminal a bar stands below a line for each phase that has ended; elsewhere (files, CI, TERM=dumb) there is a
line every 30 s and at each change of phase, without control characters:

    listing             0.1 s  12 documents
    starting Ray        4.2 s
    loading the model   9.8 s
    asking             25.1 s  12/12 documents, 16 pages, 0.6 pages/s, 0 failed
    settling            1.2 s  12/12 documents

File names and messages from documents are printed without control characters.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from textwrap import fill, indent
from typing import IO, TYPE_CHECKING, Any, TextIO

import click

from pipeline.errors import RunError
from pipeline.report import Phase, Progress

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.output.status import RunStatus
    from pipeline.report import Report
    from pipeline.score.comparison import ComparisonResult
    from pipeline.score.evaluation import EvaluationResult, FieldScores, GroupScores
    from pipeline.score.statistics import Interval
    from pipeline.stages.preview import PreviewAnswer, PreviewFacts


LINE_PERIOD_S = 30.0
"""How often a run that is not shown on a terminal prints where it stands."""
LOG_WIDTH = 120
"""Columns of tables that are not printed on a terminal."""
DRAWS_PER_S, BAR_COLUMNS = 5, 12
COUNTING = (Phase.LISTING, Phase.ASKING, Phase.SETTLING)
"""Phases that get through documents."""
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


# ---- Progress -----------------------------------------------------------------------------------------------------


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
    if now.documents is None:
        return ""
    if now.phase is Phase.LISTING:
        return f"{now.documents} document{'s' * (now.documents != 1)}"
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


# ---- A job and a page ---------------------------------------------------------------------------------------------


def show_job(found: dict[str, Any]) -> None:
    """Print a job with all its keys, its prompt, the columns of its records, and what is left out of the grammar and the confinement."""
    import yaml

    columns = measure_terminal(sys.stdout)[0] or LOG_WIDTH
    click.echo(yaml.safe_dump({name: found[name] for name in ("job", "fingerprint")}, sort_keys=False, allow_unicode=True, width=columns))
    click.echo(
        f"{format_engine(found['engine'])}\n{format_a4_page(found['a4_page'])}\n\nprompt:\n{indent(found['prompt'], '  ')}\n\ncolumns:"
    )
    for name, kind in found["columns"].items():
        click.echo(f"  {name}: {kind}")
    cost = "makes up a value" if found["job"]["extract"]["absent"] == "forbid" else "is invalid"
    sections = {
        "kept as JSON text or narrowed": found["notes"],
        "left to the validator by the grammar": found["not_in_grammar"],
        f"warning: may not be null, so that a document that does not show it {cost}": found["not_nullable"],
        "what this machine cannot keep renderers from": found["not_confined"],
    }
    for title, notes in sections.items():
        if notes:
            click.echo(f"\n{title}:\n" + "\n".join(f"  {line}" for line in notes))


def format_engine(here: dict[str, Any]) -> str:
    """Return which engine a job has on this machine, and the memory of its model's weights where that is known."""
    sizes = [f"{here[key] / 1e9:.1f} GB {how}" for key, how in (("weights_bytes", "in bf16"), ("packed_bytes", "packed")) if here[key]]
    weights = f"; weights: {', '.join(sizes)}" if sizes else ""
    held = f", held in {here['weights']} here" if here.get("weights") else ""
    misfit = f"\nwarning: {here['misfit']}" if here["misfit"] else ""
    limits = here.get("vllm")
    steps = ""
    if limits:
        tokens = f"{limits['max_num_batched_tokens'] or 'its own number of'} tokens a step"
        kept = f"{limits['mm_processor_cache_gb']:g} GiB of preprocessed pages"
        steps = f"\nvllm on this machine: {limits['max_num_seqs']} requests at once, {tokens}, {kept}"
    return f"engine on this machine: {here['engine']} ({here['reason']}){weights}{held}{steps}{misfit}"


def format_a4_page(page: dict[str, Any]) -> str:
    """Return what an A4 page costs the job's model, and how the size of a visual token is known."""
    source = {
        "checkpoint": "as the checkpoint's image processor says",
        "job": "as model.cell_px says",
        "assumed": "assumed: the checkpoint is not on this machine, or it is a server's, of which model.cell_px says it",
    }[page["cell_px_from"]]
    return (
        f"an A4 page: {page['width_px']}×{page['height_px']} px, {page['dpi']} dpi, {page['visual_tokens']:,} visual tokens of "
        f"{page['cell_px']}×{page['cell_px']} px ({source})"
    )


def show_page(file: str, number: int, facts: PreviewFacts, prompt: str, ask: str) -> None:
    """Print what a model gets with a page."""
    click.echo(
        f"{file}, page {number} of {facts['page_count']}: {facts['width_px']}×{facts['height_px']} px, {facts['dpi']:.1f} dpi, "
        f"{facts['visual_tokens']} visual tokens, {facts['words']} words in the text layer"
    )
    for warning in facts["warnings"]:
        click.echo(strip_control_characters(f"warning: {warning}"))
    click.echo(f"\nprompt:\n{prompt}\n\n[page image]\n{ask}\n")


def show_answer(given: PreviewAnswer) -> None:
    """Print what a model answered and what is wrong with the answer."""
    click.echo(f"answer ({given['prompt_tokens']} + {given['completion_tokens']} tokens, {given['finish_reason']}):\n{given['answer']}")
    failure = given["failure"]
    for problem in [failure["message"]] if failure and given["status"] == "failed" else given["errors"] or []:
        click.echo(f"{given['status']}: {problem}")


# ---- Ends ---------------------------------------------------------------------------------------------------------


def show_report(ended: Report, console: Console | None = None) -> None:
    """Print the result of a run."""
    from rich.table import Table

    table = Table(title=f"{ended.job}: {ended.documents} documents, {ended.records} records", title_justify="left", show_header=False)
    for name, number in {**ended.statuses, **{f"  {kind}": n for kind, n in ended.failures.items()}}.items():
        table.add_row(name, str(number))
    if ended.partial:
        table.add_row("with pages missing", str(ended.partial))
    if ended.disagreements:
        table.add_row("with disagreements", str(ended.disagreements))
    table.add_row("requests asked", str(ended.requests_asked))
    table.add_row("pages asked", f"{ended.pages_asked} ({ended.pages_per_s:.1f} pages/s, start-up included)")
    table.add_row("tokens read, written", f"{ended.prompt_tokens}, {ended.completion_tokens}")
    table.add_row("model", ended.model + (" (demonstration)" if ended.demonstration else ""))
    console = console or make_console()
    console.print(table)
    for file in ended.damaged:
        print_text(console, f"damaged: {file} was set aside, and its requests were asked again")
    if ended.missing:
        print_text(
            console, f"error: {len(ended.missing)} sources have no record, the first is {ended.missing[0]}; run the same command again"
        )
    print_text(console, f"records: {shorten_path(ended.output)}/records")


def shorten_path(output: str) -> str:
    """Return an output's path relative to the current folder, if it is inside."""
    here = Path(output)
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else output


def show_status(found: RunStatus, place: str) -> None:
    """Print where the run in an output folder stands and which documents failed most."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "count", title=f"{found['job']} in {place}", title_justify="left")
    counts = {
        "documents": found["documents"],
        "requests": found["requests"],
        "request failures": found["request_failures"],
        "records": found["records"],
        "record failures": found["record_failures"],
        "records with": {name: count for name in ("partial", "disagreements") if (count := found[name])},
    }
    for name, numbers in counts.items():
        for inner, number in numbers.items():
            table.add_row(f"{name}: {inner}", str(number))
    make_console().print(table)
    if found["worst"]:
        worst = Table("document", "failed", "invalid", "of", "kind", "message", title="worst documents", title_justify="left")
        for row in found["worst"]:
            cells = (row["source"], row["failed"], row["invalid"], row["requests"], row["kind"], row["message"][:200])
            worst.add_row(*(escape(strip_control_characters(str(cell)).replace("\n", "\\n")) for cell in cells))
        make_console().print(worst)
    for file in found["damaged"]:
        print_message(f"damaged: {file}; run the job again: it is set aside and its requests are asked again")


# ---- Scores -------------------------------------------------------------------------------------------------------

REVIEWS_SHOWN = (1, 2, 5, 10, 20, 30, 50)
"""Percentages of reviewed values that are printed; the JSON has all."""
MAX_DOCUMENTS_SHOWN, MAX_CHANGES_SHOWN = 20, 3
MAX_NAMES_SHOWN = 5
ERRORS = ("wrong", "missing", "invented", "unread")
"""Outcomes that are counted in the table."""


def show_evaluation(found: EvaluationResult) -> None:
    """Print the scores of an output: by field, by group, and what a review of the least certain values leaves."""
    scores = found["scores"]
    total, counted = (
        scores["total"],
        [name for name, count in scores["total"]["outcomes"].items() if name in ERRORS and (count or name != "unread")],
    )
    rows = [[name, *list_score_cells(of, counted)] for name, of in {"all": total, **scores["fields"]}.items()]
    title = f"{found['output']}: {scores['documents']} documents, {scores['failed']} failed"
    show_table(title, ["field", "cells", "exact %", "norm. %", "ANLS %", "F1 %", *counted], rows)
    print_message(f"documents without an error: {format_interval(scores['perfect'])} %")
    ratios = f"precision {format_percent(total['precision'])} %, recall {format_percent(total['recall'])} %"
    print_message(f"values: {ratios}, F1 {format_interval(total['f1'])} %")
    if found["by"]:
        titles = [found["by"], "documents", "failed", "perfect %", "exact %", "F1 %", "AUROC"]
        show_table("by group", titles, [[value, *list_group_cells(group)] for value, group in found["groups"].items()])
    if certainty := scores["certainty"]:
        reviews = {percent: certainty["review"][percent] for percent in REVIEWS_SHOWN}
        rows = [
            [f"{percent}", f"{row['errors_left']}", format_percent(row["share_of_errors_left"]), format_percent(row["error_rate_left"], 2)]
            for percent, row in reviews.items()
        ]
        show_table("review of the least certain values", ["reviewed %", "errors left", "of all errors %", "of the rest %"], rows)
        numbers = (("AUROC", certainty["auroc"]), ("ECE", certainty["ece"]), ("Brier", certainty["brier"]))
        print_message(
            f"certainty: {', '.join(f'{name} {format_number(number)}' for name, number in numbers)}, over {certainty['values']} values "
            f"with {certainty['errors']} errors; {certainty['errors_without']} errors have no certainty"
        )
    else:
        print_message("certainty: unknown, because the ledger has no log-probabilities of these values")
    print_names("documents of the truth without a record", found["without_record"])
    print_names("records without truth", found["without_truth"])
    print_names("fields without truth", found["not_labelled"])
    print_names("keys of the truth that the schema lacks", found["not_in_schema"])


def show_comparison(found: ComparisonResult) -> None:
    """Print what differs between two outputs: statuses, fields, documents, and with a truth which is better."""
    title = f"A {found['a']}, B {found['b']}: {found['documents']} documents, {found['changed']} differ"
    titles = ["field", "same", "changed", "became null", "became a value"]
    show_table(title, titles, [[field, *map(str, counts.values())] for field, counts in found["fields"].items()])
    if any(row["a"] != row["b"] for row in found["statuses"]):
        show_table("statuses", ["A", "B", "documents"], [[row["a"], row["b"], str(row["documents"])] for row in found["statuses"]])
    rows = []
    for document in found["worst"][:MAX_DOCUMENTS_SHOWN]:
        name = document["source"] + (f" page {document['page']}" if document["page"] else "")
        status = f"{document['status_a']} → {document['status_b']}; " * (document["status_a"] != document["status_b"])
        shown = [f"{change['path'].removeprefix('$.')}: {change['a']} → {change['b']}" for change in document["changes"]]
        more = [f"{len(shown) - MAX_CHANGES_SHOWN} more"] * (len(shown) > MAX_CHANGES_SHOWN)
        rows.append([name, str(len(shown)), status + "; ".join([*shown[:MAX_CHANGES_SHOWN], *more])])
    if rows:
        show_table("worst documents", ["document", "changes", "A → B"], rows)
    print_names("only in A", found["only_in_a"])
    print_names("only in B", found["only_in_b"])
    if truth := found["truth"]:
        print_message(f"right in {truth['documents']} documents: A {format_interval(truth['a'])} %, B {format_interval(truth['b'])} %")
        points = f"{truth['difference_points']:+.2f} points ({truth['low_points']:+.2f} to {truth['high_points']:+.2f})"
        judged = (
            f"worse by more than {truth['max_drop_points']:g}"
            if truth["has_dropped"]
            else f"within the {truth['max_drop_points']:g} allowed"
        )
        print_message(f"B less A: {points}, {judged}")


def show_table(title: str, titles: list[str], rows: list[list[str]]) -> None:
    """Print rows of text from documents and outputs as a table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(strip_control_characters(title)), title_justify="left")
    for name in titles:
        table.add_column(escape(name), overflow="fold")
    for row in rows:
        table.add_row(*(escape(strip_control_characters(cell).replace("\n", "\\n")) for cell in row))
    make_console().print(table)


def list_score_cells(scores: FieldScores, counted: list[str]) -> list[str]:
    """Return a field's scores as the cells of a table's row; `counted` are outcomes."""
    shares = (scores["normalized"], scores["anls"], scores["f1"])
    counts = [str(scores["outcomes"][name]) for name in counted]
    return [str(scores["cells"]), format_interval(scores["exact"]), *(format_percent(share["value"]) for share in shares), *counts]


def list_group_cells(group: GroupScores) -> list[str]:
    """Return a group's scores as the cells of a table's row."""
    shares = [format_interval(score) for score in (group["perfect"], group["total"]["exact"], group["total"]["f1"])]
    certainty = group["certainty"]
    return [str(group["documents"]), str(group["failed"]), *shares, format_number(certainty["auroc"] if certainty else None)]


def format_interval(score: Interval) -> str:
    """Return a share and its interval in percent: `97.4 (95.2–98.6)`."""
    if score["value"] is None:
        return "–"
    return f"{format_percent(score['value'])} ({format_percent(score['low'])}–{format_percent(score['high'])})"


def format_percent(share: float | None, decimals: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{decimals}f}"


def format_number(number: float | None) -> str:
    return "–" if number is None else f"{number:.3f}"


def print_names(title: str, names: list[str]) -> None:
    """Print how many names there are and the first of them, if any."""
    if names:
        more = f", and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
        print_message(f"{title}: {len(names)} ({', '.join(names[:MAX_NAMES_SHOWN])}{more})")
