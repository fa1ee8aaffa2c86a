"""Exit codes: what a command returns or raises becomes an exit code and, for an error, one sentence on stderr and JSON on stdout.

    {"error": {"kind": "job", "message": "…", "file": "/data/job.yaml", "key": "model.engine"}, "exit_code": 2}

is what `--json` prints in place of a command's data. The kinds are those of `ErrorKind`; `docs/commands.md` describes them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Any

import click

from pipeline.cli.console import print_json, print_message
from pipeline.errors import DocumentError, JobError, PipelineError, SourceError
from pipeline.report import ExitCode
from pipeline.version import DISTRIBUTION

REPEAT_S = 2.0
"""A signal that follows another within this time is the same stop: a scheduler that signals every process of a run reaches this one
twice, also by way of its supervisor."""


class ErrorKind(StrEnum):
    """What kind of error ended a command: stable words for programs."""

    USAGE = "usage"
    JOB = "job"
    SOURCE = "source"
    PACKAGE = "package"
    DOCUMENT = "document"
    RUN = "run"
    INTERRUPTED = "interrupted"
    TERMINATED = "terminated"
    INTERNAL = "internal"


CODES = {
    ErrorKind.DOCUMENT: ExitCode.DOCUMENTS_FAILED,
    ErrorKind.RUN: ExitCode.RUN_BROKEN,
    ErrorKind.INTERRUPTED: ExitCode.INTERRUPTED,
    ErrorKind.TERMINATED: ExitCode.TERMINATED,
    ErrorKind.INTERNAL: ExitCode.RUN_BROKEN,
}
"""The exit code of each kind; of all others it is that of a wrong job."""


@dataclass(frozen=True)
class CommandError:
    """An error that ended a command. `file` and `key` are those of `errors.PipelineError`."""

    kind: ErrorKind
    message: str
    file: str | None = None
    key: str | None = None

    @property
    def code(self) -> ExitCode:
        return CODES.get(self.kind, ExitCode.JOB_WRONG)

    @property
    def fields(self) -> dict[str, str | None]:
        """What stands under `error` in the JSON."""
        return {"kind": self.kind.value, "message": self.message, "file": self.file, "key": self.key}

    def print_as_json(self) -> None:
        print_json({"error": self.fields, "exit_code": int(self.code)})


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a run as Ctrl-C does. Where Ray waits, it raises a plain KeyboardInterrupt instead."""


def convert_to_exit_code(command: Callable[..., ExitCode | None], stopped: str = "stopped") -> Callable[..., None]:
    """Turn what a command returns or raises into an exit code and, for an error, one sentence; `stopped` is that of Ctrl-C and SIGTERM.

    Where the command has the parameters `as_json` and `job_file`, they say whether the error is also JSON, and whose key is wrong.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        with raise_on_signals() as received:
            try:
                code = command(*args, **kwargs) or ExitCode.OK
            except (click.ClickException, click.exceptions.Exit, BrokenPipeError):  # the last as in `pipeline check JOB | head`
                raise
            except (Exception, KeyboardInterrupt) as error:
                found = describe_error(error, stopped, signal.SIGTERM in received, kwargs.get("job_file"))
                if found.kind is ErrorKind.INTERNAL:
                    print_message(traceback.format_exc())
                print_message(PREFIXES.get(found.kind, "error: ") + found.message)
                if kwargs.get("as_json"):
                    found.print_as_json()
                code = found.code
        sys.stdout.flush()
        sys.exit(code)

    return run


PREFIXES = {ErrorKind.DOCUMENT: "failed: ", ErrorKind.INTERRUPTED: "", ErrorKind.TERMINATED: ""}
"""What precedes the sentence on stderr; of all other kinds it is `error: `."""
EXTRAS = {"duckdb": "export", "matplotlib": "eval", "openpyxl": "export"}
"""The extra of this package that installs what only some commands import."""


def describe_error(error: BaseException, stopped: str, is_terminated: bool, job_file: Path | None) -> CommandError:
    """Return what to say about an exception. A dotted key without a file is one of the job."""
    match error:
        case KeyboardInterrupt():
            return CommandError(ErrorKind.TERMINATED if is_terminated else ErrorKind.INTERRUPTED, stopped)
        case ModuleNotFoundError():
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            way_out = f"pip install '{DISTRIBUTION}[{extra}]'" if extra else "pip install -c constraints.txt . in a copy of this repository"
            return CommandError(ErrorKind.PACKAGE, f"the package {error.name} is not installed here: {way_out}")
        case PipelineError():
            kinds = ((SourceError, ErrorKind.SOURCE), (JobError, ErrorKind.JOB), (DocumentError, ErrorKind.DOCUMENT))
            kind = next((kind for raised, kind in kinds if isinstance(error, raised)), ErrorKind.RUN)
            is_of_job = job_file is not None and error.key is not None and not error.key.startswith("-")
            return CommandError(
                kind, str(error), error.file or (str(Path(job_file).absolute()) if job_file and is_of_job else None), error.key
            )
    return CommandError(ErrorKind.INTERNAL, f"{type(error).__name__}: {error}; this is a defect of the program: please report it")


class CommandGroup(click.Group):
    """Commands whose usage errors are also JSON, where `--json` is among the arguments."""

    def make_context(self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any) -> click.Context:
        as_json = "--json" in args
        with print_usage_errors(as_json):
            context = super().make_context(info_name, args, parent, **extra)
        context.meta[__name__] = as_json
        return context

    def invoke(self, ctx: click.Context) -> Any:
        with print_usage_errors(ctx.meta[__name__]):
            return super().invoke(ctx)


@contextmanager
def print_usage_errors(as_json: bool) -> Iterator[None]:
    """Print a usage error of the block as JSON, if wanted. click prints it on stderr."""
    try:
        yield
    except click.UsageError as error:
        if as_json:
            CommandError(ErrorKind.USAGE, error.format_message(), key=find_option(error)).print_as_json()
        raise


def find_option(error: click.UsageError) -> str | None:
    """Return the option that a usage error is about."""
    option = error.param if isinstance(error, click.BadParameter) else None
    return option.opts[-1] if isinstance(option, click.Option) else getattr(error, "option_name", None)


@contextmanager
def raise_on_signals() -> Iterator[list[int]]:
    """Make SIGTERM, and SIGINT unless it is ignored or handled otherwise, raise KeyboardInterrupt; yield the signals received."""
    received: list[int] = []
    last_s = -REPEAT_S

    def stop(number: int, _: object) -> None:
        nonlocal last_s
        received.append(number)
        is_repeated, last_s = time.monotonic() < last_s + REPEAT_S, time.monotonic()
        if not is_repeated:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    numbers = [signal.SIGTERM, *[signal.SIGINT] * (signal.getsignal(signal.SIGINT) is signal.default_int_handler)]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def call_on_signal(act: Callable[[], None]) -> Iterator[None]:
    """Call a function in a thread of its own as soon as SIGINT or SIGTERM arrives, once.

    The signal's handler may come a second later: the main thread runs it, which may be in Ray's C++ code.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def wait() -> None:
        while number := os.read(reading, 1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                act()
                return

    waiting = threading.Thread(target=wait)
    waiting.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        waiting.join()
        os.close(reading)
