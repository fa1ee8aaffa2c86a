"""Exit codes: what a command returns or raises becomes an exit code and, for an error, one sentence on stderr."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from pipeline.cli.console import print_message
from pipeline.errors import DocumentError, JobError, PipelineError
from pipeline.report import ExitCode

REPEAT_S = 2.0
"""A signal that follows another within this time is the same stop: a scheduler that signals every process of a run reaches this one
twice, also by way of its supervisor."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a run as Ctrl-C does. Where Ray waits, it raises a plain KeyboardInterrupt instead."""


def convert_to_exit_code(command: Callable[..., ExitCode | None], stopped: str = "stopped") -> Callable[..., None]:
    """Turn what a command returns or raises into an exit code and, for an error, one sentence; `stopped` is that of Ctrl-C and SIGTERM."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        with raise_on_signals() as received:
            try:
                code = command(*args, **kwargs) or ExitCode.OK
            except JobError as error:
                print_message(f"error: {error}")
                code = ExitCode.JOB_WRONG
            except DocumentError as error:
                print_message(f"failed: {error}")
                code = ExitCode.DOCUMENTS_FAILED
            except PipelineError as error:
                print_message(f"error: {error}")
                code = ExitCode.RUN_BROKEN
            except ModuleNotFoundError as error:
                print_message(
                    f"error: the package {error.name} is not installed here: pip install -c constraints.txt . in a copy of this repository"
                )
                code = ExitCode.JOB_WRONG
            except KeyboardInterrupt:
                print_message(stopped)
                code = ExitCode.TERMINATED if signal.SIGTERM in received else ExitCode.INTERRUPTED
        sys.stdout.flush()
        sys.exit(code)

    return run


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
