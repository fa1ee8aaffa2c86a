"""Ray, connected: what machines there are. Knows nothing of documents."""

from __future__ import annotations

import logging
import os
import signal
import threading
from dataclasses import dataclass

from pipeline.errors import RunError

STARTS = 3
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}


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
