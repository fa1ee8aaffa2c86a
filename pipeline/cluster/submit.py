"""A job -> a run of it on a cluster, by the cluster's own job server: sent, followed, stopped. Knows no document and no screen.

What is sent is in `abroad.py`. On the cluster's head runs what runs here: `python -m pipeline.cli run`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pipeline import cluster
from pipeline.cluster import bundle
from pipeline.errors import JobError, PipelineError, RunError
from pipeline.job import Job
from pipeline.report import ExitCode

CHATTY = [f"ray.{name}" for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging")]
"""What talks of its own work where a command's words are."""
ENTRY = "python -c 'import pipeline.cli' || exit 2; exec python -m pipeline.cli run "
"""A Python that cannot import this package ends with 1, as a run does whose documents failed."""
STOP_S = 60
"""How long a run that is stopped may take to write what it has; Ray's own 3 s are too short for it."""
ANSWER_S = 60.0
"""How long the job server may take for an answer."""
EVENT = '{"at": '
"""How a line begins that is an event."""
LOG_SILENT_S = 60.0
"""How long a log may be silent before it is asked for anew: a connection that broke somewhere on its way is silent, too."""
LOST_S = 300.0
"""How long a job server that is followed may be away."""
POLL_S = 1.0


class TimedJobClient(JobSubmissionClient):
    """Ray's client, which waits for an answer for ever, with a limit."""

    def _do_request(self, method: str, endpoint: str, **given: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=ANSWER_S, **given)


class JobServer:
    """A cluster's job server."""

    def __init__(self, address: str) -> None:
        """Raises JobError where none answers."""
        if find_spec("aiohttp") is None:
            raise JobError("a job server is spoken to by ray[default], which is not installed: pip install 'pipeline[cluster]'")
        if not re.fullmatch(r"https?://[^\s/@]+/?", address):
            raise JobError(f"--address is {address!r}, expected a cluster's job server, such as http://HEAD:8265")
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = address
        cluster.check_reachable(address)
        with cluster.hide_ray_addresses(), convert_client_errors(address):
            self.client = TimedJobClient(address)

    def submit(self, job: Job, arguments: Sequence[str] = ()) -> str:
        """Send a job, start its run, and return the submission's id. Raises JobError."""
        with tempfile.TemporaryDirectory() as folder:
            command = ENTRY + shlex.join([bundle.write_bundle(job, Path(folder)), *arguments])
            environment = {"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}}
            with convert_client_errors(self.address):
                return str(self.client.submit_job(entrypoint=command, runtime_env=environment, metadata={"job": job.sections.name}))

    def find(self, run: str) -> JobDetails:
        """Return what is known of a run. Raises JobError, also when there is no such run."""
        with convert_client_errors(self.address):
            return self.client.get_job_info(run)

    def follow(self, run: str, write: Callable[[str], object]) -> JobDetails:
        """Write a run's log as it grows, and return what is known of the run at its end.

        A connection that breaks is made anew. Raises JobError when there is no such run, RunError when nobody answers any more.
        """
        from aiohttp import ClientError

        self.find(run)
        log, heard = LogReader(write), time.monotonic()
        while True:
            try:
                asyncio.run(log.read(self.client.tail_job_logs(run)))
                found = self.client.get_job_info(run)
                if found.status.is_terminal():
                    return found
                heard = time.monotonic()
            except (OSError, RuntimeError, ClientError) as error:
                if time.monotonic() - heard > LOST_S:
                    raise RunError(
                        f"{self.address} does not answer any more ({format_client_error(error)}); what it runs may go on"
                    ) from None
            time.sleep(POLL_S)

    def stop(self, run: str) -> JobStatus:
        """Stop a run, wait for its end and return how it ended: STOPPED, or otherwise if it was over before. Raises JobError, RunError."""
        with convert_client_errors(self.address):
            self.client.stop_job(run)
        deadline = time.monotonic() + STOP_S + ANSWER_S
        while not (status := self.find(run).status).is_terminal():
            if time.monotonic() > deadline:
                raise RunError(f"{run} has not stopped within {STOP_S + ANSWER_S:g} s; {self.address} says it is {status}")
            time.sleep(POLL_S)
        return status


@dataclass
class LogReader:
    """Writes what it has not written yet of a log that is always read from its beginning."""

    write: Callable[[str], object]
    written: int = field(default=0, init=False)
    """Characters."""

    async def read(self, chunks: AsyncIterator[str]) -> None:
        """Read until the log ends, or is silent for too long."""
        seen = 0
        with suppress(TimeoutError):
            while (chunk := await asyncio.wait_for(anext(chunks, None), LOG_SILENT_S)) is not None:
                seen += len(chunk)
                if seen > self.written:
                    self.write(chunk[self.written - seen :])
                    self.written = seen


class LogSplitter:
    """Parts a run's log: lines that are events go to a file, if there is one, the others, its words, to who reads along."""

    def __init__(self, words: Callable[[str], object], events: TextIO | None) -> None:
        self.words, self.events, self.rest = words, events, ""

    def write(self, text: str) -> None:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if not line.startswith(EVENT):
                self.words(line + "\n")
            elif self.events:
                self.events.write(line + "\n")
                self.events.flush()


@contextmanager
def convert_client_errors(address: str) -> Iterator[None]:
    """Turn what Ray's client raises into a JobError of one sentence."""
    try:
        yield
    except PipelineError:
        raise
    except AuthenticationError:
        raise JobError(
            f"{address} wants the cluster's token: set RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN or in ~/.ray/auth_token"
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise JobError(f"{address}: {format_client_error(error)}") from None


def format_client_error(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_exit_code(found: JobDetails) -> tuple[ExitCode, str]:
    """Return the exit code of a run that is over, and a word on what its log cannot say."""
    if found.status == JobStatus.SUCCEEDED:
        return ExitCode.OK, ""
    if found.status == JobStatus.STOPPED:
        return ExitCode.TERMINATED, "the run was stopped; what was answered is kept: submit the job again to go on"
    code = found.driver_exit_code
    if code in list(ExitCode):
        return ExitCode(code), ""
    why = (
        f"its process ended with status {code}"
        if code is not None
        else format_client_error(RuntimeError(found.message or "it does not say why"))
    )
    return ExitCode.RUN_BROKEN, f"error: the run on the cluster broke off: {why}; what was answered is kept: submit the job again to go on"
