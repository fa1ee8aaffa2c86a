"""What a command returns or raises -> an exit code and, for an error, one sentence. Knows no command."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from pipeline.cli.console import print_message
from pipeline.errors import DocumentError, JobError, PipelineError
from pipeline.report import ExitCode

TOGETHER_S = 2.0
"""Who stops a run by a signal to each of its processes sends it twice: to this one, and by way of the one that watches it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a run as Ctrl-C does. Where Ray waits, a plain KeyboardInterrupt comes out of it."""


def convert_to_exit_code(command: Callable[..., ExitCode | None]) -> Callable[..., None]:
    """Turn what a command returns or raises into an exit code and, for an error, one sentence."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        heard: list[float] = []

        def terminate(_: int, __: object) -> None:
            heard.append(time.monotonic())
            if len(heard) == 1 or heard[-1] - heard[-2] > TOGETHER_S:
                raise Terminated

        listener = signal.signal(signal.SIGTERM, terminate)
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
            print_message("stopped; what was answered is kept: run the same command again to go on")
            code = ExitCode.TERMINATED if heard else ExitCode.INTERRUPTED
        finally:
            signal.signal(signal.SIGTERM, listener)
        sys.stdout.flush()
        sys.exit(code)

    return run
