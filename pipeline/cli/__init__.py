"""Commands -> text and exit codes. Words go to stderr, data (`--json`) to stdout.

Imports what a command needs when it runs: `pipeline --help` loads neither Ray nor torch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from pipeline.cli.console import (
    announce_demo_model,
    capture_ray_output,
    print_message,
    show_answer,
    show_job,
    show_page,
    show_progress,
    show_report,
    show_status,
)
from pipeline.cli.exit_codes import Terminated, convert_to_exit_code
from pipeline.report import ExitCode
from pipeline.version import __version__

if TYPE_CHECKING:
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
JSON = click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout, nothing else.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Turn folders of PDFs and images into typed, validated Parquet with an open vision-language model."""


@main.command()
@JOB
@OUTPUT
@LIMIT
@RETRY
@CLUSTER
@SHARED
@click.option("--log", type=click.Path(path_type=Path), help="Append what happens to a file, one line of JSON per event; - is stderr.")
@SET
@JSON
@convert_to_exit_code
def run_command(job_file: Path, limit: int | None, retry: str | None, log: Path | None, as_json: bool, **given: Any) -> ExitCode:
    """Ask what has not been asked yet and write the records.

    Exit codes: 0 all records extracted, 1 some failed or invalid, 2 the job is wrong and nothing was started,
    3 the run broke off and can be resumed.
    """
    job = load_job(job_file, **given)
    from pipeline import events, flow

    with capture_ray_output() as console, events.write_events_to(log), show_progress(console, as_json) as on_progress:
        report = flow.run(job, limit, on_progress, None if as_json else announce_demo_model, retry)
    return show_end(report, as_json)


@main.command()
@JOB
@OUTPUT
@CLUSTER
@SHARED
@SET
@JSON
@convert_to_exit_code
def settle_command(job_file: Path, as_json: bool, **given: Any) -> ExitCode:
    """Write the records again from what was asked already; needs no model."""
    job = load_job(job_file, **given)
    from pipeline import flow

    with capture_ray_output():
        report = flow.settle(job)
    return show_end(report, as_json)


@main.command()
@click.argument("job_file", metavar="[JOB]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--address", required=True, envvar="RAY_API_SERVER_ADDRESS", metavar="URL", help="The cluster's job server: http://HEAD:8265."
)
@click.option("--follow", is_flag=True, help="Show the run's words as they come, wait for its end, and end with its exit code.")
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
        raise click.UsageError("--log writes what is followed: say --follow or --attach ID, too.")
    job = load_job(job_file, **given) if job_file else None
    from pipeline.cluster import submit as room

    server = room.JobServer(address)
    if stop:
        status = server.stop(stop).value
        if as_json:
            click.echo(json.dumps({"submission_id": stop, "status": status}))
        else:
            print_message(f"{stop} has ended: {status}; what was answered is kept: submit the job again to go on")
        return ExitCode.OK
    chosen = [f"--limit={limit}"] * bool(limit) + [f"--retry={retry}"] * bool(retry) + ["--log=-"] * bool(log)
    run = send_submission(server, job, chosen) if job else str(attach)
    if job and not as_json:
        click.echo(run)
    if attach or wait:
        return follow_submission(server, run, log, as_json)
    if as_json:
        click.echo(json.dumps({"submission_id": run}))
    return ExitCode.OK


def send_submission(server: JobServer, job: Job, arguments: list[str]) -> str:
    """Start a run on a cluster and return its id; say what it will miss."""
    from pipeline.cluster.bundle import list_secret_variables

    run = server.submit(job, arguments)
    if names := list_secret_variables(job):
        print_message(f"not sent: {' and '.join(names)}; the cluster's own environment must have what the job reads from there")
    return run


def follow_submission(server: JobServer, run: str, log: TextIO | None, as_json: bool) -> ExitCode:
    """Show a run's words to its end, and return its exit code. Ctrl-C ends the showing alone."""
    from pipeline.cluster.submit import LogSplitter, read_exit_code

    shown = LogSplitter(lambda text: print_message(text.replace("\t", " "), end=""), log)
    try:
        code, word = read_exit_code(server.follow(run, shown.write))
    except KeyboardInterrupt as stop:
        code = ExitCode.TERMINATED if isinstance(stop, Terminated) else ExitCode.INTERRUPTED
        back = f"pipeline submit --address {server.address}"
        word = f"no longer following; the run goes on: `{back} --attach {run}` follows it again, `{back} --stop {run}` stops it"
    if word:
        print_message(word)
    if as_json:
        click.echo(json.dumps({"submission_id": run, "exit_code": int(code)}))
    return code


@main.command()
@JOB
@SET
@JSON
@convert_to_exit_code
def check_command(job_file: Path, settings: tuple[str, ...], as_json: bool) -> None:
    """Show the resolved job, its prompt and the columns of its records. Starts nothing."""
    job = load_job(job_file, settings)
    from pipeline import engines
    from pipeline.stages.settle import list_record_columns

    notes = engines.check_engine(job)
    described = list_record_columns(job)
    found = {
        "job": job.dump_keys(),
        "fingerprint": job.fingerprint,
        "prompt": job.system_message,
        **described,
        "not_in_grammar": list(notes),
    }
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    show_job(found)


@main.command()
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
    from pipeline.stages import preview as room

    seen = room.render_preview(job, file, page)
    if png:
        room.write_preview_png(seen, png)
    if not as_json:
        show_page(file, page, seen.facts, job.system_message, seen.ask)
    answer = None if no_answer else room.ask_preview(job, seen, None if as_json else announce_demo_model)
    if as_json:
        click.echo(
            json.dumps({**seen.facts, "prompt": job.system_message, "ask": seen.ask, **(answer or {})}, indent=2, ensure_ascii=False)
        )
    elif answer:
        show_answer(answer)
    return ExitCode.DOCUMENTS_FAILED if answer and answer["failure"] else ExitCode.OK


@main.command()
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
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    show_status(found, folder)


def load_job(
    job_file: Path, settings: tuple[str, ...], output: str | None = None, address: str | None = None, shared_filesystem: bool = False
) -> Job:
    from pipeline.job import Job

    chosen = [f"ray.address={json.dumps(address)}"] * bool(address) + ["ray.shared_filesystem=true"] * shared_filesystem
    return Job.load(job_file, (*settings, *chosen), output)


def show_end(report: Report, as_json: bool) -> ExitCode:
    """Show the end of a run and return its exit code."""
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        show_report(report)
    return report.exit_code


def start_program() -> None:
    """The program `pipeline`: what starts Ray is watched, so that its end has a name whatever ends it."""
    if sys.argv[1:2] not in (["run"], ["settle"]):
        main()
        return
    from pipeline.cli.supervisor import run_supervised

    sys.exit(run_supervised(run_main, report_broken_run))


def run_main() -> int:
    """Return the exit code with which the command line ends."""
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else bool(end.code)
    finally:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what Ray has to say while it ends does not belong behind the data
    return ExitCode.OK


def report_broken_run(how: str) -> int:
    print_message(f"error: the run's process is gone: {how}; what was answered is kept: run the same command again to go on")
    return ExitCode.RUN_BROKEN
