"""What a command found -> words: reports, counts and progress on stderr, what was asked to be shown on stdout. Starts nothing.

Nothing that it writes does anything to a terminal but be read.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import RunError

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.output.status import RunStatus
    from pipeline.report import OnProgress, Progress, Report
    from pipeline.stages.preview import PreviewAnswer


PERIOD_S = 10.0
"""How often a run that nobody watches on a terminal says where it stands."""


def print_message(text: str, end: str = "\n") -> None:
    click.echo(strip_control_characters(text + end), err=True, nl=False)


def strip_control_characters(text: str) -> str:
    """Return text that does nothing to a terminal: file names and messages come from strangers."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def make_console() -> Console:
    """Return where words go: stderr, plain when it is no terminal."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)


@contextmanager
def capture_ray_output() -> Iterator[Console]:
    """Keep what Ray writes to file descriptor 2 and to sys.stdout for the case that the run breaks; sys.stderr stays the user's.

    Its core logs an error for every actor that Ray Data starts (ray#53727); what it says of workers that died, it prints to
    stdout, where data belongs. Nothing of that is anything a user could act on.
    """
    with ExitStack() as held:
        kept = held.enter_context(tempfile.TemporaryFile("w+b"))
        user = held.enter_context(os.fdopen(os.dup(2), "w", buffering=1))
        held.enter_context(redirect_stdout(held.enter_context(os.fdopen(os.dup(kept.fileno()), "w", buffering=1))))
        python, sys.stderr = sys.stderr, user
        os.dup2(kept.fileno(), 2)
        try:
            yield make_console()
        except RunError as error:
            if error.__cause__ is not None:  # Ray's own trouble; a full disk says enough by itself
                kept.seek(0)
                user.write(kept.read()[-4000:].decode(errors="replace"))
            raise
        finally:
            os.dup2(user.fileno(), 2)
            sys.stderr = python


def announce_demo_model(wanted: str) -> None:
    """Say aloud that the demonstration model answers."""
    print_message(
        f"No GPU here: the DEMONSTRATION MODEL of this package answers instead of {wanted}.\n"
        "It reads the synthetic slips of jobs/samples and little else; every record says so in `_model`."
    )


# ---- Progress -----------------------------------------------------------------------------------------------------


@contextmanager
def show_progress(console: Console, quiet: bool) -> Iterator[OnProgress | None]:
    """Show where a run stands: a bar with an estimate on a terminal, else a line every ten seconds."""
    if quiet:
        yield None
    elif console.is_terminal:
        with show_bar(console) as on_progress:
            yield on_progress
    else:
        with show_lines(console) as on_progress:
            yield on_progress


def format_pace(now: Progress) -> str:
    return f"{now.pages_done} pages, {now.pages_per_s:.1f} pages/s, {now.failed} failed"


@contextmanager
def show_bar(console: Console) -> Iterator[OnProgress]:
    """Show a bar with pages per second and an estimate."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    shown = Progress(
        SpinnerColumn(), TextColumn("documents"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.description}"), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with shown:
        task = shown.add_task("starting", total=None)
        yield lambda now: shown.update(task, total=now.documents, completed=now.documents_done, description=format_pace(now))


@contextmanager
def show_lines(console: Console) -> Iterator[OnProgress]:
    """Write a line every ten seconds, also while nothing comes: who reads a log sees that the run lives, and that it waits."""
    newest = ["starting"]
    over = threading.Event()

    def on_progress(now: Progress) -> None:
        newest[0] = f"{now.documents_done} of {now.documents} documents, {format_pace(now)}"

    def write() -> None:
        while not over.wait(PERIOD_S):
            console.print(newest[0], markup=False)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield on_progress
    finally:
        over.set()
        writer.join()


# ---- A job and a page ---------------------------------------------------------------------------------------------


def show_job(found: dict[str, Any]) -> None:
    """Show a job with all its keys, its prompt, and the columns of its records."""
    import yaml

    click.echo(yaml.safe_dump({name: found[name] for name in ("job", "fingerprint")}, sort_keys=False, allow_unicode=True, width=120))
    click.echo(f"prompt:\n{indent(found['prompt'], '  ')}\n\ncolumns:")
    for name, kind in found["columns"].items():
        click.echo(f"  {name}: {kind}")
    narrowed, left = found["notes"], found["not_in_grammar"]
    for title, notes in (("kept as JSON text or narrowed", narrowed), ("left to the validator by the grammar", left)):
        if notes:
            click.echo(f"\n{title}:\n" + "\n".join(f"  {line}" for line in notes))


def show_page(file: str, number: int, facts: dict[str, Any], prompt: str, ask: str) -> None:
    """Show what a model is given with a page."""
    click.echo(
        f"{file}, page {number} of {facts['page_count']}: {facts['width_px']}×{facts['height_px']} px, {facts['dpi']:.1f} dpi, "
        f"{facts['visual_tokens']} visual tokens, {facts['words']} words in the text layer"
    )
    for warning in facts["warnings"]:
        click.echo(strip_control_characters(f"warning: {warning}"))
    click.echo(f"\nprompt:\n{prompt}\n\n[page image]\n{ask}\n")


def show_answer(given: PreviewAnswer) -> None:
    """Show what a model answered, and what is wrong with it."""
    click.echo(f"answer ({given['prompt_tokens']} + {given['completion_tokens']} tokens, {given['finish_reason']}):\n{given['answer']}")
    failure = given["failure"]
    for problem in [failure["message"]] if failure and given["status"] == "failed" else given["errors"] or []:
        click.echo(f"{given['status']}: {problem}")


# ---- Ends ---------------------------------------------------------------------------------------------------------


def show_report(ended: Report) -> None:
    """Show the end of a run."""
    from rich.table import Table

    table = Table(title=f"{ended.job}: {ended.documents} documents, {ended.records} records", title_justify="left", show_header=False)
    for name, number in {**ended.statuses, **{f"  {kind}": n for kind, n in ended.failures.items()}}.items():
        table.add_row(name, str(number))
    table.add_row("requests asked", str(ended.requests_asked))
    table.add_row("pages asked", f"{ended.pages_asked} ({ended.pages_per_s:.1f} pages/s, start-up included)")
    table.add_row("tokens read, written", f"{ended.prompt_tokens}, {ended.completion_tokens}")
    table.add_row("model", ended.model + (" (demonstration)" if ended.demonstration else ""))
    make_console().print(table)
    for file in ended.damaged:
        print_message(f"damaged: {file} was set aside, and its requests were asked again")
    if ended.missing:
        print_message(f"error: {len(ended.missing)} sources have no record, the first is {ended.missing[0]}; run the same command again")
    print_message(f"records: {shorten_path(ended.output)}/records")


def shorten_path(output: str) -> str:
    """Return an output's place as seen from here."""
    here = Path(output)
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else output


def show_status(found: RunStatus, place: str) -> None:
    """Show where the run in an output folder stands, and which documents went worst."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "count", title=f"{found['job']} in {place}", title_justify="left")
    counts = {
        "documents": found["documents"],
        "requests": found["requests"],
        "request failures": found["request_failures"],
        "records": found["records"],
        "record failures": found["record_failures"],
    }
    for name, numbers in counts.items():
        for inner, number in numbers.items():
            table.add_row(f"{name}: {inner}", str(number))
    make_console().print(table)
    if found["worst"]:
        worst = Table("document", "failed", "invalid", "of", "kind", "what it says", title="worst documents", title_justify="left")
        for row in found["worst"]:
            cells = (row["source"], row["failed"], row["invalid"], row["requests"], row["kind"], row["message"][:200])
            worst.add_row(*(escape(strip_control_characters(str(cell)).replace("\n", "\\n")) for cell in cells))
        make_console().print(worst)
    for file in found["damaged"]:
        print_message(f"damaged: {file}; run the job again: it is set aside and its requests are asked again")
