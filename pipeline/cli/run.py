"""Commands `run` and `settle`: a job comes in, progress and the report of the run are shown."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.console import capture_ray_output, describe_demo_model, make_console, print_json, print_message, print_text, shorten_path
from pipeline.cli.exit_codes import call_on_signal, convert_to_exit_code
from pipeline.cli.options import CLUSTER, JOB, JSON, LIMIT, OUTPUT, RETRY, SET, SHARED, load_job
from pipeline.cli.progress import show_progress
from pipeline.report import ExitCode
from pipeline.wording import format_count

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.cli.progress import ProgressDisplay
    from pipeline.job import Job
    from pipeline.report import Report


@click.command("run")
@JOB
@OUTPUT
@LIMIT
@RETRY
@CLUSTER
@SHARED
@click.option("--log", type=click.Path(path_type=Path), help="Append what happens to a file, one line of JSON per event; - is stderr.")
@SET
@JSON
@partial(convert_to_exit_code, stopped="stopped; the answers so far are kept: run the same command again to go on")
def run_command(job_file: Path, limit: int | None, retry: str | None, log: Path | None, as_json: bool, **given: Any) -> ExitCode:
    """Ask what has not been asked yet and write the records.

    Exit codes: 0 all records extracted, 1 some failed or invalid, 2 the job is wrong and nothing was started,
    3 the run broke off and can be resumed.
    """
    job = load_job(job_file, **given)
    from pipeline.events import write_events_to

    def run(shown: ProgressDisplay) -> Report:
        from pipeline import flow

        on_demo = None if as_json else lambda replaced: shown.print(describe_demo_model(replaced))
        return flow.run(job, limit, shown.update, on_demo, retry, None if as_json else shown.print)

    with write_events_to(log):
        return show_run(run, "stopping: the answers so far are being written", as_json, bar=str(log) != "-")


@click.command("settle")
@JOB
@OUTPUT
@CLUSTER
@SHARED
@click.option(
    "--corrections",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Values that a person has put right, from `pipeline review`; they are kept with the output and apply from then on.",
)
@SET
@JSON
@partial(convert_to_exit_code, stopped="stopped; run the same command again to write all records")
def settle_command(job_file: Path, corrections: Path | None, as_json: bool, **given: Any) -> ExitCode:
    """Write the records again from what was asked already; needs no model."""
    job = load_job(job_file, **given)
    if corrections:
        keep_corrections(job, corrections, as_json)

    def settle(shown: ProgressDisplay) -> Report:
        from pipeline import flow

        return flow.settle(job, shown.update)

    return show_run(settle, "stopping", as_json)


def keep_corrections(job: Job, file: Path, as_json: bool) -> None:
    """Add a file's corrections to those of the job's output, and say how many. Raises JobError."""
    from pipeline.output import Output
    from pipeline.output.corrections import add_corrections
    from pipeline.output.sources import read_sources
    from pipeline.schema.arrow import ArrowPlan

    output = Output(job.output)
    added = add_corrections(output, file, ArrowPlan(job.schema), read_sources(output)["source"].to_pylist())
    if not as_json:
        values = sum(len(found.paths) for found in added)
        print_message(f"{format_count(values, 'value')} in {format_count(len(added), 'record')} corrected by {file}")


def show_run(work: Callable[[ProgressDisplay], Report], stopping: str, as_json: bool, bar: bool = True) -> ExitCode:
    """Run or settle with the progress and the report shown, and return the exit code. `stopping` is printed when a signal arrives."""
    with capture_ray_output() as console:
        with show_progress(console, quiet=as_json, bar=bar) as shown, call_on_signal(lambda: shown.stop(stopping)):
            report = work(shown)
        if not as_json:
            show_report(report, console)
    if as_json:
        print_json(report.as_dict())
    return report.exit_code


def show_report(ended: Report, console: Console | None = None) -> None:
    """Print the result of a run."""
    from rich.table import Table

    documents, records = format_count(ended.documents, "document"), format_count(ended.records, "record")
    table = Table(title=f"{ended.job}: {documents}, {records}", title_justify="left", show_header=False)
    for name, number in {**ended.statuses, **{f"  {kind}": n for kind, n in ended.failures.items()}}.items():
        table.add_row(name, str(number))
    if ended.partial:
        table.add_row("with pages missing", str(ended.partial))
    if ended.disagreements:
        table.add_row("with disagreements", str(ended.disagreements))
    if ended.unwitnessed:
        table.add_row("with values that no witness shows", str(ended.unwitnessed))
    if ended.alerts:
        table.add_row("with alerts about hidden or different text", str(ended.alerts))
    if ended.ocr_pages:
        table.add_row("pages read by OCR", str(ended.ocr_pages))
    if ended.ocr_failed:
        table.add_row("pages that OCR could not read", f"{ended.ocr_failed} ({ended.ocr_problem or 'a process that read pages died'})")
    table.add_row("requests asked", str(ended.requests_asked))
    if ended.rule_requests:
        table.add_row("  of them about broken rules", str(ended.rule_requests))
    if ended.reread_requests:
        table.add_row("  of them to read values again", str(ended.reread_requests))
    if ended.requests_asked:
        table.add_row("pages asked", f"{ended.pages_asked} ({ended.pages_per_s:.1f} pages/s, start-up included)")
        table.add_row("tokens read, written", f"{ended.prompt_tokens}, {ended.completion_tokens}")
    table.add_row("model", ended.model + (" (demonstration)" if ended.demonstration else ""))
    console = console or make_console()
    console.print(table)
    for file in ended.damaged:
        print_text(console, f"damaged: {file} was set aside, and its requests were asked again")
    if ended.missing:
        missing = f"documents without a record: {len(ended.missing)}, the first is {ended.missing[0]}"
        print_text(console, f"error: {missing}; run the same command again")
    output = shorten_path(ended.output)
    print_text(console, f"report: {output}/report.html")
    print_text(console, f"records: {output}/records")
