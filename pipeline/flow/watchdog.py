"""Stall watchdog: decides, when no answer has come for a while, whether the cluster's machines can still give one.

Ray waits for an engine whose machine has gone until there is room for it again, and for CPUs to render documents until the engines
leave some: on a cluster that does not grow, for ever. The run then begins again with the machines that are left.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from typing import ClassVar, cast

import pyarrow as pa
import pyarrow.compute as pc
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
NO_ANSWER_S = 1800.0
"""How long a run goes on without an answer: longer than a model takes to load, or a document of thousands of pages to be read."""
START_S, PAUSE_SHARE, LONGEST_PAUSE_S = 5.0, 0.05, 1.0
"""Some seconds after its start, an execution pauses between its steps, for this share of the time that it has run: a step costs a
millisecond of CPU or two, and a renderer has blocks of documents for seconds."""
STOP_S = 5.0
"""How long a Dataset may take to stop."""


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
        """Raise ClusterShrunk when no answer can come any more, RunError when for `GONE_S` no engine has had room either, or when for
        `NO_ANSWER_S` no answer has come."""
        now_s = time.monotonic()
        if now_s > self.answered_s + NO_ANSWER_S:
            raise RunError(f"the run stopped: no answer has come for {NO_ANSWER_S / 60:g} minutes; run the same command again to resume it")
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


class DatasetRun:
    """Runs a Dataset whose rows count documents in a thread of its own, so that the driver can do other things, and stops it.

    A thread that waits for Ray Data cannot be ended, and stopping Ray under it can end the process: so an execution is stopped by an
    exception that it raises itself, in the callback that Ray Data calls at each of its steps.
    """

    def __init__(self, dataset: ray.data.Dataset) -> None:
        self.dataset, self.documents_done = dataset, 0
        self.error: BaseException | None = None
        self.ended = threading.Event()
        ExecutionStep.stopped.clear()
        dataset.context.custom_execution_callback_classes = [ExecutionStep]  # type: ignore[list-item]
        self.thread = threading.Thread(target=self.consume, name="dataset", daemon=True)
        self.thread.start()

    def consume(self) -> None:
        """Count the documents that are done, until the Dataset ends."""
        try:
            for block in self.dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                self.documents_done += pc.sum(cast(pa.Table, block)["documents"]).as_py()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            self.error = error
        finally:
            self.ended.set()

    def has_ended(self, timeout_s: float) -> bool:
        """Say whether it has ended; wait for that no longer than this."""
        return self.ended.wait(timeout_s)

    def raise_error(self) -> None:
        """Raise what ended it early."""
        if self.error:
            raise self.error

    def stop(self) -> None:
        """End it."""
        ExecutionStep.stopped.set()
        self.ended.wait(STOP_S)


class ExecutionStep:
    """Callback of Ray Data, called several times a second while a Dataset of this process runs.

    `custom_execution_callback_classes`, a field of Ray's DataContext, takes classes with these four methods. The context is pickled, so
    what it looks at is an attribute of the class. One Dataset of a process at a time can be stopped.
    """

    stopped: ClassVar[threading.Event] = threading.Event()

    def before_execution_starts(self, executor: object) -> None:
        self.started_s = time.monotonic()

    def on_execution_step(self, executor: object) -> None:
        elapsed_s = time.monotonic() - self.started_s
        pause_s = min(LONGEST_PAUSE_S, PAUSE_SHARE * elapsed_s) if elapsed_s > START_S else 0.0
        if ExecutionStep.stopped.wait(pause_s):
            raise RunError("the run was stopped")

    def after_execution_succeeds(self, executor: object) -> None: ...

    def after_execution_fails(self, executor: object, error: Exception) -> None: ...
