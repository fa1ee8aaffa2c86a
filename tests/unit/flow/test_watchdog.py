"""Stall watchdog: a run without answers waits for machines that are alive, and begins again without those that are gone.

`test_nodes.py` does it with machines that are killed.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline import cluster
from pipeline.cluster import Resources
from pipeline.errors import RunError
from pipeline.flow import watchdog
from pipeline.flow.capacity import compute_reservations
from pipeline.flow.watchdog import ClusterShrunk, StallWatchdog
from tests.support.workspace import Workspace

BOTH = Resources(8, 2, ((4, 1), (4, 1)))


class FakeCluster:
    """A cluster, as Ray would describe it: its machines, and those that have gone; and a clock."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.gone, self.time_s = BOTH, set[str](), 0.0
        patch.setattr(cluster, "read_resources", lambda: self.now)
        patch.setattr(cluster, "is_node_alive", lambda node: node not in self.gone)
        patch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: self.time_s))

    def lose(self, *left: tuple[float, float]) -> None:
        """Lose the node "b"; these machines are left."""
        self.now = Resources(sum(cpus for cpus, _ in left), sum(gpus for _, gpus in left), left)
        self.gone = {"b"}


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    return FakeCluster(monkeypatch)


def looking(workspace: Workspace, *settings: str, homes: tuple[str, ...] = ("a", "b")) -> StallWatchdog:
    job = workspace.job("ray.actors=2", *settings)
    return StallWatchdog(job, compute_reservations(job, BOTH), lambda: list(homes))


def test_a_long_answer_is_waited_for_while_all_machines_are_there(workspace: Workspace, there: FakeCluster) -> None:
    seen, there.time_s = looking(workspace), watchdog.NO_ANSWER_S - 1
    seen.check()


def test_a_run_without_an_answer_for_too_long_breaks_off(workspace: Workspace, there: FakeCluster) -> None:
    seen, there.time_s = looking(workspace), watchdog.NO_ANSWER_S + 1
    with pytest.raises(RunError, match="no answer has come for 30 minutes; run the same command again to resume it"):
        seen.check()


def test_answers_that_still_come_are_not_disturbed(workspace: Workspace, there: FakeCluster) -> None:
    seen = looking(workspace)
    there.lose((4, 1))
    there.time_s = watchdog.SILENT_S
    seen.reset()
    there.time_s += watchdog.SILENT_S - 1
    seen.check()
    there.time_s += 2
    with pytest.raises(ClusterShrunk, match="machines of the cluster have gone"):
        seen.check()


def test_an_engine_that_finds_another_machine_is_waited_for(workspace: Workspace, there: FakeCluster) -> None:
    seen, there.time_s = looking(workspace, homes=("a", "c")), 100.0
    there.lose((4, 1), (4, 1))
    seen.check()


def test_engines_that_leave_no_room_for_rendering_are_stranded(workspace: Workspace, there: FakeCluster) -> None:
    seen, there.time_s = looking(workspace, "ray.cpus_per_actor=2", "ray.gpus_per_actor=0.5", homes=("a", "a")), 100.0
    there.lose((4, 1))
    with pytest.raises(ClusterShrunk):
        seen.check()


def test_without_room_for_any_engine_a_machine_is_waited_for_but_not_for_ever(workspace: Workspace, there: FakeCluster) -> None:
    seen, there.time_s = looking(workspace), 100.0
    there.lose((64, 0))  # CPUs alone: the model that ran on GPUs is not tried on them
    seen.check()
    there.time_s = watchdog.GONE_S + 1
    with pytest.raises(
        RunError, match=r"for 15 minutes none had room for an engine of 1 CPUs and 1 GPUs; the same command resumes"
    ) as caught:
        seen.check()
    assert not isinstance(caught.value, ClusterShrunk)
