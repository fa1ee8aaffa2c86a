"""Ray, connected: what machines there are. Knows nothing of documents."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

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
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    found = ray.cluster_resources()
    return Resources(found.get("CPU", 1.0), found.get("GPU", 0.0))
