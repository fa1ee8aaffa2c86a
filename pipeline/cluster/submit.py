"""Job submission: sends a job to a cluster's job server, follows its run and stops it.

`bundle` says what is sent. The cluster's head then runs `python -m pipeline.cli run`.
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
from pipeline.version import DISTRIBUTION

CHATTY = [f"ray.{name}" for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging")]
"""Loggers of Ray that write into the command's messages."""
ENTRY = "python -c 'import pipeline.cli' || exit 2; exec python -m pipeline.cli run "
"""A Python that cannot import this package ends with 1, which is also the exit code of a run whose documents failed: so 2 here."""
STOP_S = 60
"""How long a stopped run may take to write what it has; Ray's default of 3 s is too short."""
ANSWER_S = 60.0
"""How long the job server may take for an answer."""
EVENT = '{"at": '
"""The beginning of a log line that is an event."""
LOG_SILENT_S = 60.0
"""How long a log may be silent before it is requested again: a broken connection is silent, too."""
LOST_S = 300.0
"""How long a job server may be unreachable while its run is followed."""
POLL_S = 1.0


class TimedJobClient(JobSubmissionClient):
    """Ray's client with a time limit on each answer; the original waits for ever."""

    def _do_request(self, method: str, endpoint: str, **given: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=ANSWER_S, **given)


class JobServer:
    """A cluster's job server."""

    def __init__(self, address: str) -> None:
        """Connect to the job server at this address. Raises JobError where none answers."""
        if find_spec("aiohttp") is None:
            raise JobError(f"talking to a job server needs ray[default], which is not installed: pip install '{DISTRIBUTION}[cluster]'")
        if not re.fullmatch(r"https?://[^\s/@]+/?", address):
            raise JobError(f"--address is {address!r}, expected a cluster's job server, such as http://HEAD:8265", key="--address")
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
            environment = {
                "working_dir": folder,
                "py_modules": [str(cluster.PACKAGE)],
                "excludes": cluster.EXCLUDED,
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)},
            }
            with convert_client_errors(self.address):
                return str(self.client.submit_job(entrypoint=command, runtime_env=environment, metadata={"job": job.sections.name}))

    def find(self, run: str) -> JobDetails:
        """Return what is known of a run. Raises JobError, also when there is no such run."""
        with convert_client_errors(self.address):
            return self.client.get_job_info(run)

    def follow(self, run: str, write: Callable[[str], object]) -> JobDetails:
        """Write a run's log as it grows, and return what is known of the run at its end.

        A connection that breaks is made again. Raises JobError when there is no such run, RunError when the server stays unreachable.
        """
        from aiohttp import ClientError

        self.find(run)
        log, answered_s = LogReader(write), time.monotonic()
        while True:
            try:
                asyncio.run(log.read(self.client.tail_job_logs(run)))
                found = self.client.get_job_info(run)
                if found.status.is_terminal():
                    return found
                answered_s = time.monotonic()
            except (OSError, RuntimeError, ClientError) as error:
                if time.monotonic() - answered_s > LOST_S:
                    raise RunError(
                        f"{self.address} does not answer any more ({format_client_error(error)}); what it runs may go on"
                    ) from None
            time.sleep(POLL_S)

    def stop(self, run: str) -> JobStatus:
        """Stop a run, wait for its end and return its status: STOPPED, or another one if it had ended before. Raises JobError, RunError."""
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
    """Writes the new part of a log that is always read from its beginning."""

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
    """Splits a run's log: JSON events go to a file if there is one, other lines to the terminal."""

    def __init__(self, messages: Callable[[str], object], events: TextIO | None) -> None:
        self.messages, self.events, self.rest = messages, events, ""

    def write(self, text: str) -> None:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if not line.startswith(EVENT):
                self.messages(line + "\n")
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
            f"{address} wants the cluster's token: set RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN or in ~/.ray/auth_token",
            key="--address",
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise JobError(f"{address}: {format_client_error(error)}") from None


def format_client_error(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_exit_code(found: JobDetails) -> tuple[ExitCode, str]:
    """Return the exit code of a run that has ended, and a message about what its log cannot say."""
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
