"""Stall watchdog: decides, when no answer has come for a while, whether the cluster's machines can still give one.

Ray waits for an engine whose machine has gone until there is room for it again, and for CPUs to render documents until the engines
leave some: on a cluster that does not grow, for ever. The run then begins again with the machines that are left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

import ray.data

from pipeline import cluster
from pipeline.errors import RunError
from pipeline.flow.capacity import ClusterShrunk, Reservations, compute_reservations, count_actors
from pipeline.job import Job

SILENT_S = 60.0
"""How long no answer may come before the machines are looked at: an engine may be at a long answer."""
GONE_S = 900.0
"""How long a run waits for a machine when no engine has room any more: a cloud takes minutes to find another."""
CHECK_PERIOD_S = 5.0


class StallWatchdog:
    """Compares what a run reserved with the cluster's machines."""

    def __init__(self, job: Job, needed: Reservations, list_nodes: Callable[[], list[str]]) -> None:
        """`list_nodes` returns the ids of the nodes on which engines live, or lived last."""
        self.job, self.needed, self.list_nodes = job, needed, list_nodes
        self.answered_s = self.checked_s = time.monotonic()

    def reset(self) -> None:
        """Note that an answer has come."""
        self.answered_s = time.monotonic()

    def check(self) -> None:
        """Raise ClusterShrunk when no answer can come any more, RunError when for `GONE_S` no engine has had room either."""
        now_s = time.monotonic()
        if now_s < max(self.answered_s + SILENT_S, self.checked_s + CHECK_PERIOD_S):
            return
        self.checked_s, resources = now_s, cluster.read_resources()
        if count_actors(self.needed, resources) >= self.needed.min_actors and all(map(cluster.is_node_alive, self.list_nodes())):
            return
        left = compute_reservations(self.job, resources)
        if count_actors(left, resources) and bool(left.gpus) == bool(self.needed.gpus):
            raise ClusterShrunk("machines of the cluster have gone, and what was started there has no room on the others; run it again")
        if now_s > self.answered_s + GONE_S:
            raise RunError(
                f"machines of the cluster have gone, and for {GONE_S / 60:g} minutes none had room for an engine of "
                f"{self.needed.cpus:g} CPUs and {self.needed.gpus:g} GPUs; the same command resumes the run"
            )


class ExecutionStep:
    """Callback of Ray Data: calls a function at each step of an execution in this process, several times a second.

    `custom_execution_callback_classes`, a field of Ray's DataContext, takes classes with these four methods. The context is pickled, so
    the function is an attribute of the class and not part of it.
    """

    call: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def before_execution_starts(self, executor: object) -> None: ...

    def on_execution_step(self, executor: object) -> None:
        ExecutionStep.call()

    def after_execution_succeeds(self, executor: object) -> None: ...

    def after_execution_fails(self, executor: object, error: Exception) -> None: ...


def call_while_executing(dataset: ray.data.Dataset, call: Callable[[], None]) -> ray.data.Dataset:
    """Return a dataset whose execution calls this at each of its steps; what it raises ends the execution.

    One dataset of a process at a time can have a call.
    """
    ExecutionStep.call = staticmethod(call)
    dataset.context.custom_execution_callback_classes = [ExecutionStep]  # type: ignore[list-item]
    return dataset
