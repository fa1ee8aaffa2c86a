"""Commands -> text and exit codes. The only room that speaks: words to stderr, data (`--json`) to stdout.

Imports what a command needs when it runs: `pipeline --help` loads neither Ray nor torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import wraps
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import click

from pipeline import __version__
from pipeline.errors import DocumentError, JobError, PipelineError, RunError
from pipeline.report import Exit

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.job import Job
    from pipeline.report import OnProgress, Report

JOB = click.argument("job_file", metavar="JOB", type=click.Path(path_type=Path))
SET = click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key of the job, e.g. --set pages.dpi=150.")
OUTPUT = click.option("--output", type=click.Path(path_type=Path), help="Folder of the results instead of the job's.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout, nothing else.")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a run as Ctrl-C does. Where Ray waits, a plain KeyboardInterrupt comes out of it."""


def guarded(command: Callable[..., Exit | None]) -> Callable[..., None]:
    """Turn what a command returns or raises into an exit code and, for an error, one sentence."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        heard = []

        def terminate(number: int, _: object) -> None:
            heard.append(number)
            raise Terminated

        listener = signal.signal(signal.SIGTERM, terminate)
        try:
            code = command(*args, **kwargs) or Exit.OK
        except JobError as error:
            say(f"error: {error}")
            code = Exit.JOB_WRONG
        except DocumentError as error:
            say(f"failed: {error}")
            code = Exit.DOCUMENTS_FAILED
        except PipelineError as error:
            say(f"error: {error}")
            code = Exit.RUN_BROKEN
        except KeyboardInterrupt:
            say("stopped; what was answered is kept: run the same command again to go on")
            code = Exit.TERMINATED if heard else Exit.INTERRUPTED
        finally:
            signal.signal(signal.SIGTERM, listener)
        sys.stdout.flush()
        sys.exit(code)

    return run


def say(text: str) -> None:
    click.echo(plain(text), err=True)


def plain(text: str) -> str:
    """Return text that does nothing to a terminal: file names and messages come from strangers."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Turn folders of PDFs and images into typed, validated Parquet with an open vision-language model."""


@main.command()
@JOB
@OUTPUT
@click.option("--limit", type=click.IntRange(min=1), help="Take only the first so many documents of the listing.")
@click.option("--retry", metavar="failed[:KIND]", help="Ask once more what failed, all or one kind of it (failed:timeout).")
@SET
@JSON
@guarded
def run(job_file: Path, output: Path | None, limit: int | None, retry: str | None, settings: tuple[str, ...], as_json: bool) -> Exit:
    """Ask what has not been asked yet and write the records.

    Exit codes: 0 all records extracted, 1 some failed or invalid, 2 the job is wrong and nothing was started,
    3 the run broke off and can be resumed.
    """
    job = load(job_file, settings, output)
    from pipeline import flow

    with quiet_core() as console, progress(console, as_json) as on_progress:
        report = flow.run(job, limit, on_progress, None if as_json else announce_demo, retry)
    return show(report, as_json)


@main.command()
@JOB
@OUTPUT
@SET
@JSON
@guarded
def settle(job_file: Path, output: Path | None, settings: tuple[str, ...], as_json: bool) -> Exit:
    """Write the records again from what was asked already; needs no model."""
    job = load(job_file, settings, output)
    from pipeline import flow

    with quiet_core():
        report = flow.settle(job)
    return show(report, as_json)


@main.command()
@JOB
@SET
@JSON
@guarded
def check(job_file: Path, settings: tuple[str, ...], as_json: bool) -> None:
    """Show the resolved job, its prompt and the columns of its records. Starts nothing."""
    job = load(job_file, settings)
    from pipeline import engines
    from pipeline.settle import columns

    notes = engines.check(job)
    described = columns(job)
    found = {"job": job.resolved(), "fingerprint": job.fingerprint, "prompt": job.system, **described, "not_in_grammar": list(notes)}
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    import yaml

    click.echo(yaml.safe_dump({"job": found["job"], "fingerprint": job.fingerprint}, sort_keys=False, allow_unicode=True, width=120))
    click.echo(f"prompt:\n{indent(job.system, '  ')}\n\ncolumns:")
    for name, kind in described["columns"].items():
        click.echo(f"  {name}: {kind}")
    for title, lines in (("kept as JSON text or narrowed", described["notes"]), ("left to the validator by the grammar", notes)):
        if lines:
            click.echo(f"\n{title}:\n" + "\n".join(f"  {line}" for line in lines))


@main.command()
@JOB
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--page", type=click.IntRange(min=1), default=1, show_default=True, help="Page to look at.")
@click.option("--png", type=click.Path(path_type=Path), help="Write the exact image that the model sees.")
@click.option("--no-answer", is_flag=True, help="Do not load the model.")
@SET
@JSON
@guarded
def preview(job_file: Path, file: Path, page: int, png: Path | None, no_answer: bool, settings: tuple[str, ...], as_json: bool) -> Exit:
    """Show one page as the model sees it, and what the model answers."""
    job = load(job_file, settings)
    from pipeline import preview as room

    seen = room.look(job, file, page)
    if png:
        room.write_png(seen, png)
    if not as_json:
        facts = seen.facts
        click.echo(
            f"{file}, page {page} of {facts['page_count']}: {facts['width_px']}×{facts['height_px']} px, {facts['dpi']:.1f} dpi, "
            f"{facts['visual_tokens']} visual tokens, {facts['words']} words in the text layer"
        )
        for warning in facts["warnings"]:
            click.echo(plain(f"warning: {warning}"))
        click.echo(f"\nprompt:\n{job.system}\n\n[page image]\n{seen.ask}\n")
    answer = {} if no_answer else room.answer(job, seen, None if as_json else announce_demo)
    if as_json:
        click.echo(json.dumps({**seen.facts, "prompt": job.system, "ask": seen.ask, **answer}, indent=2, ensure_ascii=False))
    elif answer:
        click.echo(
            f"answer ({answer['prompt_tokens']} + {answer['completion_tokens']} tokens, {answer['finish_reason']}):\n{answer['answer']}"
        )
        for problem in [answer["failure"]["message"]] if answer["status"] == "failed" else answer["errors"]:
            click.echo(f"{answer['status']}: {problem}")
    return Exit.DOCUMENTS_FAILED if answer.get("failure") else Exit.OK


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@JSON
@guarded
def status(folder: Path, as_json: bool) -> None:
    """Show where the run in an output folder stands, and which documents went worst. Starts nothing."""
    from pipeline.sink import Output
    from pipeline.status import count

    found = count(Output(folder))
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "count", title=f"{found['job']} in {folder}", title_justify="left")
    for name in ("documents", "requests", "request_failures", "records", "record_failures"):
        for inner, number in found[name].items():
            table.add_row(f"{name.replace('_', ' ')}: {inner}", str(number))
    terminal().print(table)
    if found["worst"]:
        worst = Table("document", "failed", "invalid", "of", "kind", "what it says", title="worst documents", title_justify="left")
        for row in found["worst"]:
            cells = (row["source"], row["failed"], row["invalid"], row["requests"], row["kind"], row["message"][:200])
            worst.add_row(*(escape(plain(str(cell)).replace("\n", "\\n")) for cell in cells))
        terminal().print(worst)
    for file in found["damaged"]:
        say(f"damaged: {file}; run the job again: it is set aside and its requests are asked again")


def load(job_file: Path, settings: tuple[str, ...], output: Path | None = None) -> Job:
    from pipeline.job import Job

    return Job.load(job_file, settings, output)


def terminal() -> Console:
    """Return where words go: stderr, plain when it is no terminal."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)


@contextmanager
def quiet_core() -> Iterator[Console]:
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
            yield terminal()
        except RunError as error:
            if error.__cause__ is not None:  # Ray's own trouble; a full disk says enough by itself
                kept.seek(0)
                user.write(kept.read()[-4000:].decode(errors="replace"))
            raise
        finally:
            os.dup2(user.fileno(), 2)
            sys.stderr = python


def announce_demo(wanted: str) -> None:
    """Say aloud that the demonstration model answers."""
    say(
        f"No GPU here: the DEMONSTRATION MODEL of this package answers instead of {wanted}.\n"
        "It reads the synthetic slips of jobs/samples and little else; every record says so in `_model`."
    )


@contextmanager
def progress(console: Console, quiet: bool) -> Iterator[OnProgress | None]:
    """Show a bar with pages per second and an estimate, on a terminal only."""
    if quiet or not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    bar = Progress(
        SpinnerColumn(), TextColumn("documents"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.description}"), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("starting", total=None)
        yield lambda now: bar.update(
            task,
            total=now.documents,
            completed=now.documents_done,
            description=f"{now.pages_done} pages, {now.pages_per_s:.1f} pages/s, {now.failed} failed",
        )


def show(report: Report, as_json: bool) -> Exit:
    """Show the end of a run."""
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return report.exit_code
    from rich.table import Table

    table = Table(title=f"{report.job}: {report.documents} documents, {report.records} records", title_justify="left", show_header=False)
    for name, number in {**report.statuses, **{f"  {kind}": n for kind, n in report.failures.items()}}.items():
        table.add_row(name, str(number))
    table.add_row("requests asked", str(report.requests_asked))
    table.add_row("pages asked", f"{report.pages_asked} ({report.pages_per_s:.1f} pages/s, start-up included)")
    table.add_row("tokens read, written", f"{report.prompt_tokens}, {report.completion_tokens}")
    table.add_row("model", report.model + (" (demonstration)" if report.demonstration else ""))
    terminal().print(table)
    for file in report.damaged:
        say(f"damaged: {file} was set aside, and its requests were asked again")
    if report.missing:
        say(f"error: {len(report.missing)} sources have no record, the first is {report.missing[0]}; run the same command again")
    records = Path(report.output) / "records"
    say(f"records: {records.relative_to(Path.cwd()) if records.is_relative_to(Path.cwd()) else records}")
    return report.exit_code


def start() -> None:
    """The program `pipeline`: what starts Ray is watched, so that its end has a name whatever ends it."""
    if sys.argv[1:2] not in (["run"], ["settle"]):
        main()
        return
    from pipeline.watch import watched

    sys.exit(watched(status_of, broken_off))


def status_of() -> int:
    """Return the exit code with which the command line ends."""
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else bool(end.code)
    finally:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what Ray has to say while it ends does not belong behind the data
    return Exit.OK


def broken_off(how: str) -> int:
    say(f"error: the run's process is gone: {how}; what was answered is kept: run the same command again to go on")
    return Exit.RUN_BROKEN


if __name__ == "__main__":
    start()
