"""Command `submit`: a run of a job is started on a cluster, followed, or stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from pipeline.cli.console import print_json, print_message
from pipeline.cli.exit_codes import CommandError, ErrorKind, Terminated, convert_to_exit_code
from pipeline.cli.options import JSON, LIMIT, OUTPUT, RETRY, SET, SHARED, load_job
from pipeline.errors import RunError
from pipeline.report import ExitCode

if TYPE_CHECKING:
    from pipeline.cluster.submit import JobServer
    from pipeline.job import Job


@click.command("submit")
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
