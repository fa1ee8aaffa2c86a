"""Command line: the commands of `pipeline`, their options and exit codes. Messages go to stderr, data (`--json`) to stdout.

Each command imports what it needs when it runs: `pipeline --help` loads neither Ray nor torch.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from pipeline.cli.console import (
    capture_ray_output,
    describe_demo_model,
    detach_streams,
    erase_line,
    print_json,
    print_message,
    show_answer,
    show_comparison,
    show_evaluation,
    show_job,
    show_page,
    show_progress,
    show_report,
    show_status,
    show_waiting,
)
from pipeline.cli.exit_codes import CommandError, CommandGroup, ErrorKind, Terminated, call_on_signal, convert_to_exit_code
from pipeline.errors import RunError
from pipeline.processes import hide_process
from pipeline.report import ExitCode
from pipeline.scratch import PRIVATE_UMASK
from pipeline.version import __version__

if TYPE_CHECKING:
    from pipeline.cli.console import ProgressDisplay
    from pipeline.cluster.submit import JobServer
    from pipeline.job import Job
    from pipeline.report import Report


JOB = click.argument("job_file", metavar="JOB", type=click.Path(path_type=Path))
SET = click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key of the job, e.g. --set pages.dpi=150.")
OUTPUT = click.option("--output", metavar="DIR", help="Folder of the results instead of the job's.")
LIMIT = click.option("--limit", type=click.IntRange(min=1), help="Take only the first so many documents of the listing.")
RETRY = click.option("--retry", metavar="failed[:KIND]", help="Ask once more what failed, all or one kind of it (failed:timeout).")
SHARED = click.option("--shared-filesystem", is_flag=True, help="The cluster's machines have the job's local paths at the same place.")
CLUSTER = click.option("--address", metavar="ADDRESS", help="Ray cluster to join instead of the job's: auto or HOST:6379.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print data, or the error, as JSON on stdout, nothing else.")
NUMBER_TOLERANCE = click.option(
    "--number-tolerance",
    metavar="N",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Numbers up to N apart are the same as the true ones.",
)
DATE_TOLERANCE = click.option(
    "--date-tolerance-days",
    metavar="N",
    type=click.IntRange(min=0),
    default=0,
    help="Dates up to N days apart are the same as the true ones.",
)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Turn folders of PDFs and images into typed, validated Parquet with an open vision-language model."""


@main.command("run")
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


@main.command("settle")
@JOB
@OUTPUT
@CLUSTER
@SHARED
@SET
@JSON
@partial(convert_to_exit_code, stopped="stopped; run the same command again to write all records")
def settle_command(job_file: Path, as_json: bool, **given: Any) -> ExitCode:
    """Write the records again from what was asked already; needs no model."""
    job = load_job(job_file, **given)

    def settle(shown: ProgressDisplay) -> Report:
        from pipeline import flow

        return flow.settle(job, shown.update)

    return show_run(settle, "stopping", as_json)


@main.command("submit")
@click.argument("job_file", metavar="[JOB]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--address", required=True, envvar="RAY_API_SERVER_ADDRESS", metavar="URL", help="The cluster's job server: http://HEAD:8265."
)
@click.option("--follow", is_flag=True, help="Print the run's log as it grows, wait for its end, and end with its exit code.")
@click.option("--attach", metavar="ID", help="Follow a run that was submitted before.")
@click.option("--stop", metavar="ID", help="Stop a run that was submitted before; submitted again, the job goes on.")
@SHARED
@OUTPUT
@LIMIT
@RETRY
@click.option("--log", type=click.File("a", "utf-8", lazy=False), help="Append what happens to a file here, with --follow or --attach.")
@SET
@JSON
@convert_to_exit_code
def submit_command(job_file: Path | None, address: str, attach: str | None, stop: str | None, as_json: bool, **given: Any) -> ExitCode:
    """Start a run of JOB on a cluster, by its job server, and print the submission's id. The run goes on without this command.

    What is sent is the job, its schema and this package. Documents, models and output must be where the cluster reaches them.
    """
    if sum(bool(wanted) for wanted in (job_file, attach, stop)) != 1:
        raise click.UsageError("submit takes one of JOB, --attach ID and --stop ID.")
    limit, retry, log, wait = (given.pop(name) for name in ("limit", "retry", "log", "follow"))
    if log and not (attach or wait):
        raise click.UsageError("--log needs --follow or --attach ID: it writes the events of a followed run.")
    job = load_job(job_file, **given) if job_file else None
    from pipeline.cluster.submit import JobServer

    server = JobServer(address)
    if stop:
        status = server.stop(stop).value
        if as_json:
            print_json({"submission_id": stop, "status": status})
        else:
            print_message(f"{stop} has ended: {status}; the answers so far are kept: submit the job again to go on")
        return ExitCode.OK
    chosen = [f"--limit={limit}"] * bool(limit) + [f"--retry={retry}"] * bool(retry) + ["--log=-"] * bool(log)
    run = send_submission(server, job, chosen) if job else str(attach)
    if job and not as_json:
        click.echo(run)
    if attach or wait:
        return follow_submission(server, run, log, as_json)
    if as_json:
        print_json({"submission_id": run})
    return ExitCode.OK


def send_submission(server: JobServer, job: Job, arguments: list[str]) -> str:
    """Start a run on a cluster and return its id; print which secrets it has to find there."""
    from pipeline.cluster.bundle import list_secret_variables

    run = server.submit(job, arguments)
    if names := list_secret_variables(job):
        print_message(f"not sent: {' and '.join(names)}; the cluster's own environment must have what the job reads from there")
    return run


def follow_submission(server: JobServer, run: str, log: TextIO | None, as_json: bool) -> ExitCode:
    """Print a run's log to its end and return its exit code. Ctrl-C ends the printing, not the run.

    The JSON has the submission's id also beside an error: the run may go on.
    """
    from pipeline.cluster.submit import LogSplitter, read_exit_code

    shown = LogSplitter(lambda text: print_message(text.replace("\t", " "), end=""), log)
    try:
        code, word = read_exit_code(server.follow(run, shown.write))
    except KeyboardInterrupt as stop:
        code = ExitCode.TERMINATED if isinstance(stop, Terminated) else ExitCode.INTERRUPTED
        back = f"pipeline submit --address {server.address}"
        word = f"no longer following; the run goes on: `{back} --attach {run}` follows it again, `{back} --stop {run}` stops it"
    except RunError as error:
        code, word = ExitCode.RUN_BROKEN, f"error: {error}"
    if word:
        print_message(word)
    if as_json:
        kind = REMOTE_ERRORS.get(code)
        message = word.removeprefix("error: ") or f"the run on the cluster ended with exit code {int(code)}; its log says why"
        failed = {"error": CommandError(kind, message).fields} if kind else {}
        print_json({"submission_id": run, **failed, "exit_code": int(code)})
    return code


REMOTE_ERRORS = {
    ExitCode.JOB_WRONG: ErrorKind.JOB,
    ExitCode.RUN_BROKEN: ErrorKind.RUN,
    ExitCode.INTERRUPTED: ErrorKind.INTERRUPTED,
    ExitCode.TERMINATED: ErrorKind.TERMINATED,
}
"""The kind of error that the exit code of a run on a cluster means."""


@main.command("check")
@JOB
@SET
@JSON
@convert_to_exit_code
def check_command(job_file: Path, settings: tuple[str, ...], as_json: bool) -> None:
    """Show the resolved job, its prompt, the columns of its records, and what this machine cannot keep renderers from. Starts no run."""
    job = load_job(job_file, settings)
    from pipeline import engines
    from pipeline.engines import limits, model_files
    from pipeline.render.sandbox import describe_confinement
    from pipeline.schema.request_schema import list_required_leaves
    from pipeline.stages.settle import list_record_columns

    notes = engines.check_engine(job)
    described = list_record_columns(job)
    found = {
        "job": job.dump_keys(),
        "fingerprint": job.fingerprint,
        "engine": limits.describe_engine(job),
        "a4_page": model_files.describe_a4_page(job),
        "prompt": job.system_message,
        **described,
        "not_in_grammar": list(notes),
        "not_nullable": list_required_leaves(job.schema),
        "not_confined": list(describe_confinement()),
    }
    if as_json:
        print_json(found)
        return
    show_job(found)


@main.command("preview")
@JOB
@click.argument("file")
@click.option("--page", type=click.IntRange(min=1), default=1, show_default=True, help="Page to look at.")
@click.option("--png", type=click.Path(path_type=Path), help="Write the exact image that the model sees.")
@click.option("--no-answer", is_flag=True, help="Do not load the model.")
@SET
@JSON
@convert_to_exit_code
def preview_command(
    job_file: Path, file: str, page: int, png: Path | None, no_answer: bool, settings: tuple[str, ...], as_json: bool
) -> ExitCode:
    """Show one page as the model sees it, and what the model answers."""
    job = load_job(job_file, settings)
    from pipeline.engines.model_files import resolve_cell_px
    from pipeline.stages.preview import ask_preview, render_preview, write_preview_png

    job = resolve_cell_px(job)
    seen = render_preview(job, file, page)
    if png:
        write_preview_png(seen, png)
    if not as_json:
        show_page(seen.facts["file"], page, seen.facts, job.system_message, seen.ask)
    answer = None
    if not no_answer:
        on_demo = None if as_json else lambda replaced: print_message(describe_demo_model(replaced))
        with show_waiting("asking the model", quiet=as_json):
            answer = ask_preview(job, seen, on_demo)
    if as_json:
        print_json({**seen.facts, "prompt": job.system_message, "ask": seen.ask, **(answer or {})})
    elif answer:
        show_answer(answer)
    return ExitCode.DOCUMENTS_FAILED if answer and answer["failure"] else ExitCode.OK


@main.command("status")
@click.argument("folder", metavar="DIR")
@JSON
@convert_to_exit_code
def status_command(folder: str, as_json: bool) -> None:
    """Show where the run in an output folder stands, and which documents went worst. Starts nothing."""
    from pipeline.output import Output
    from pipeline.output.status import read_status
    from pipeline.storage.location import parse_location

    found = read_status(Output(parse_location(folder)))
    if as_json:
        print_json(found)
        return
    show_status(found, folder)


@main.command("eval")
@click.argument("output")
@click.option("--truth", metavar="PLACE", type=click.Path(path_type=Path), required=True, help="Folder of JSON, or JSONL, CSV or Parquet.")
@NUMBER_TOLERANCE
@DATE_TOLERANCE
@click.option("--by", metavar="COLUMN", help="Score the documents also by the values of one column of the records.")
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw as PNG how many errors a review of the least certain values leaves.",
)
@JSON
@convert_to_exit_code
def eval_command(
    output: str, truth: Path, number_tolerance: float, date_tolerance_days: int, by: str | None, plot: Path | None, as_json: bool
) -> None:
    """Score the records in an output folder against true values, field by field, and how well certainty tells right from wrong."""
    from pipeline.score.cells import make_tolerance
    from pipeline.score.evaluation import evaluate_output

    found = evaluate_output(output, truth, make_tolerance(number_tolerance, date_tolerance_days), by)
    if plot:
        from pipeline.score.plot import plot_reviews

        plot_reviews(found, plot)
    if as_json:
        print_json(found)
        return
    show_evaluation(found)


@main.command("compare")
@click.argument("a")
@click.argument("b")
@click.option(
    "--truth", metavar="PLACE", type=click.Path(path_type=Path), help="True values, as of eval: which of the two is right more often?"
)
@click.option(
    "--max-drop",
    metavar="POINTS",
    type=click.FloatRange(min=0),
    help="End with 1 if B has more percentage points less of right values (0.5).",
)
@NUMBER_TOLERANCE
@DATE_TOLERANCE
@JSON
@convert_to_exit_code
def compare_command(
    a: str, b: str, truth: Path | None, max_drop: float | None, number_tolerance: float, date_tolerance_days: int, as_json: bool
) -> ExitCode:
    """Show what differs between the records of two output folders, field by field, the worst documents first.

    Exit code 1: with --truth, fewer values are right in B than in A, by more than --max-drop.
    """
    if not truth and (max_drop is not None or number_tolerance or date_tolerance_days):
        raise click.UsageError("--max-drop and the tolerances need --truth PLACE: without it there is no right or wrong.")
    from pipeline.score.cells import make_tolerance
    from pipeline.score.comparison import compare_outputs

    tolerance = make_tolerance(number_tolerance, date_tolerance_days)
    found = compare_outputs(a, b, truth, tolerance, DEFAULT_MAX_DROP if max_drop is None else max_drop)
    if as_json:
        print_json(found)
    else:
        show_comparison(found)
    return ExitCode.DOCUMENTS_FAILED if found["truth"] and found["truth"]["has_dropped"] else ExitCode.OK


DEFAULT_MAX_DROP = 0.5
"""Percentage points by which the second output of `compare` may be worse."""


@main.command("init")
@click.option(
    "--sample", type=click.Path(path_type=Path), metavar="DIR", required=True, help="Folder to write this package's samples into."
)
@JSON
@convert_to_exit_code
def init_command(sample: Path, as_json: bool) -> None:
    """Write sample jobs, their schemas and documents into a folder, to run and to copy from. Overwrites nothing."""
    from pipeline.demo.sample_folder import FIRST_JOB, write_sample_folder

    written = write_sample_folder(sample)
    command = f"pipeline run {shlex.quote(str(sample / FIRST_JOB))}"
    if as_json:
        print_json({"folder": str(sample), "files": written, "next": command})
        return
    print_message(f"{len(written)} files written to {sample}; next: {command}")


def load_job(
    job_file: Path, settings: tuple[str, ...], output: str | None = None, address: str | None = None, shared_filesystem: bool = False
) -> Job:
    from pipeline.job import Job

    chosen = [f"ray.address={json.dumps(address)}"] * bool(address) + ["ray.shared_filesystem=true"] * shared_filesystem
    return Job.load(job_file, (*settings, *chosen), output)


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


def start_program() -> None:
    """The program `pipeline`. What starts Ray runs supervised, so that every way in which it can end has an exit code.

    All files that it and its child processes write are this user's alone.
    """
    os.umask(PRIVATE_UMASK)
    hide_process()  # its environment has keys and passwords; the supervised processes are forked and hidden, too
    if sys.argv[1:2] not in (["run"], ["settle"]):
        main()
        return
    from pipeline.cli.supervisor import run_supervised

    sys.exit(run_supervised(run_main, report_broken_run))


def run_main() -> int:
    """Run the command line in a process in which Ray runs, too, and return the exit code."""
    detach_streams()
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else bool(end.code)
    return ExitCode.OK


def report_broken_run(how: str) -> int:
    erase_line()
    """Say that the process of `run` or `settle` has died, and how, and return the exit code."""
    word = f"the run's process is gone: {how}; the answers written so far are kept: run the same command again to go on"
    print_message(f"error: {word}")
    if "--json" in sys.argv[1:]:
        CommandError(ErrorKind.RUN, word).print_as_json()
    return ExitCode.RUN_BROKEN
