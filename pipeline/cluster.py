"""Ray, connected: what machines there are. Knows nothing of documents."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import RunError

if TYPE_CHECKING:
    from ray.exceptions import RayError

STARTS = 3
THREADS_S = 3.0
"""How long Ray Data's threads may take to notice that it is over; one of them only waits, for good and to nobody's harm."""
RAISED = re.compile(r"^((?:\w+\.)*)([A-Z]\w*): (.+)$", re.MULTILINE)
"""The line of a traceback that says what was raised."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@dataclass(frozen=True)
class Resources:
    """What Ray may hand out."""

    cpus: float
    gpus: float


def connect() -> Resources:
    """Start Ray on this machine, unless it runs already, and return what it has.

    Its dashboard and job server, which run anyone's code (CVE-2023-48022), stay off.
    """
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    import ray

    if not ray.is_initialized():
        start()
    found = ray.cluster_resources()
    return Resources(found.get("CPU", 1.0), found.get("GPU", 0.0))


def start() -> None:
    """Start Ray; again, if the machine is so busy that Ray's own processes miss their deadline of 15 s (ray#65983).

    Whoever listened to SIGTERM before goes on to: Ray would end this process where it stands. Raises RunError.
    """
    import ray

    listener = signal.getsignal(signal.SIGTERM)
    for left in reversed(range(STARTS)):
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            break
        except Exception as error:  # any: a raylet that is late is a bare Exception
            if not left or "timed out during startup" not in str(error):
                raise RunError(f"Ray does not start on this machine: {error}") from error
    if callable(listener) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, listener)


def stop(threads: Set[threading.Thread]) -> None:
    """Stop Ray, when all threads but these have ended, or had time to: pulled away from under them, it can end this process."""
    import ray

    deadline = time.monotonic() + THREADS_S
    for thread in set(threading.enumerate()) - threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    ray.shutdown()


def stopped(error: RayError, sentence: str) -> RunError:
    """Return what a worker raised as the end of this run: its message, or a sentence about it with its traceback as the cause.

    Of a worker's exception only the text comes over from its process.
    """
    from ray.exceptions import RayError

    text = str(error).partition("\nThe above exception was the direct cause")[0].strip()
    module, name, message = (RAISED.findall(text) or [("", "", text.partition("\n")[0])])[-1]
    if module == "pipeline.errors.":
        return RunError(message)
    broken = RunError(sentence.format(f"{name}: {message}".removeprefix(": ")[:300]))
    broken.__cause__ = RayError(text)
    return broken
