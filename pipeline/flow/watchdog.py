"""A run whose answers do not come, and its cluster's machines -> whether any can still come. Knows no request and no answer.

Ray waits for an engine whose machine has gone until there is room for it again, and for CPUs to draw documents with until the engines
leave some: on a cluster that nobody enlarges, for ever. Then the run has to begin anew with what is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipeline import cluster
from pipeline.errors import RunError
from pipeline.flow.capacity import compute_pool_size, compute_reservations
from pipeline.job import Job

SILENT_S = 60.0
"""So long nothing has come before the machines are looked at: an engine that is left may be at a long answer."""
GONE_S = 900.0
"""How long is waited for a machine when no engine has room any more: a cloud takes minutes to find another."""
CHECK_PERIOD_S = 5.0


class ClusterShrunk(RunError):
    """What has been started cannot go on, and what is left of the cluster has room for a new beginning."""


class StallWatchdog:
    """Looks at the machines when nothing has come for a while."""

    def __init__(self, job: Job, there: cluster.Resources, homes: Callable[[], list[str]]) -> None:
        """`homes` returns the nodes on which engines live, or lived last."""
        self.job, self.homes = job, homes
        self.size, self.least = compute_reservations(job, there), compute_pool_size(job, there)[0]
        self.heard_s = self.looked_s = time.monotonic()

    def heard(self) -> None:
        """Note that an answer has come."""
        self.heard_s = time.monotonic()

    def look(self) -> None:
        """Raise Stranded when no answer can come any more, RunError when that has been so for long and no engine has room."""
        now_s = time.monotonic()
        if now_s < max(self.heard_s + SILENT_S, self.looked_s + CHECK_PERIOD_S):
            return
        self.looked_s, there = now_s, cluster.read_resources()
        if self.size.count_actors(there) >= self.least and all(map(cluster.is_node_alive, self.homes())):
            return
        left = compute_reservations(self.job, there)
        if left.count_actors(there) and bool(left.gpus) == bool(self.size.gpus):
            raise ClusterShrunk("machines of the cluster have gone, and what was started there has no room on the others; run it again")
        if now_s > self.heard_s + GONE_S:
            raise RunError(
                f"machines of the cluster have gone, and for {GONE_S / 60:g} minutes none had room for an engine of "
                f"{self.size.cpus:g} CPUs and {self.size.gpus:g} GPUs; the same command resumes the run"
            )


def watch_dataset(dataset: ray.data.Dataset, outlook: StallWatchdog) -> ray.data.Dataset:
    """Return a dataset whose execution looks out, at each of its steps."""

    class Step(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            outlook.look()

    dataset.context.custom_execution_callback_classes = [Step]
    return dataset
