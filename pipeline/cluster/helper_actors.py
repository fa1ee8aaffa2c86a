"""Helper actors of Ray Data, done without where Ray runs on one machine.

Ray Data starts three actors beside a Dataset: one asks a cluster for more machines, one keeps figures for a dashboard, one knows on which
machine each actor is. Each is a process that imports Ray Data, which takes a second of CPU time. The Ray that a run starts has one machine
and no dashboard. Ray 2.60 has no option for this: its functions that start the three are replaced, and put back when Ray is stopped.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.data._internal import stats
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution import streaming_executor
from ray.data._internal.execution.interfaces import ExecutionResources
from ray.data._internal.execution.operators import actor_pool_map_operator
from ray.data._internal.utils import cached_ray_internals

ORIGINALS: list[tuple[Any, str, Any]] = []
"""Module, name and function that were replaced."""


class OneMachine(ClusterAutoscaler):
    """In place of Ray Data's cluster autoscaler: one machine, which does not grow, with all its resources for Datasets."""

    def __init__(self) -> None:
        self.resources: ExecutionResources = ExecutionResources.from_resource_dict(ray.cluster_resources())

    def try_trigger_scaling(self) -> None: ...

    def on_executor_shutdown(self) -> None: ...

    def get_total_resources(self) -> ExecutionResources:
        return self.resources


@dataclass(frozen=True)
class RemoteMethod:
    """In place of a method of an actor's handle: what `remote` is called with is answered in this process."""

    remote: Callable[..., Any]


class HelperHandle:
    """In place of a helper actor's handle, in this process and in those of the actors of a Dataset."""

    @property
    def gen_dataset_id(self) -> RemoteMethod:
        return RemoteMethod(lambda: ray.put(uuid.uuid4().hex))

    @property
    def get_actor_locations(self) -> RemoteMethod:
        return RemoteMethod(find_actors)

    @property
    def update_execution_metrics(self) -> RemoteMethod:
        return RemoteMethod(ignore_call)

    update_iteration_metrics = register_dataset = update_actor_location = update_execution_metrics


def find_actors(actors: Sequence[str]) -> ray.ObjectRef[dict[str, str]]:
    """Return where actors are: on this machine."""
    return ray.put(dict.fromkeys(actors, ray.get_runtime_context().get_node_id()))


def ignore_call(*_: object, **__: object) -> None:
    """Take a call that has no answer."""


def replace_helper_actors() -> None:
    """Have Datasets of this process do without helper actors, unless they do already."""
    if ORIGINALS:
        return
    for module, name, function in (
        (streaming_executor, "create_cluster_autoscaler", lambda *_, **__: OneMachine()),
        (stats, "get_or_create_stats_actor", HelperHandle),
        (actor_pool_map_operator, "get_or_create_actor_location_tracker", HelperHandle),
        (cached_ray_internals, "get_or_create_actor_location_tracker", HelperHandle),
    ):
        ORIGINALS.append((module, name, getattr(module, name)))
        setattr(module, name, function)


def restore_helper_actors() -> None:
    """Have Ray Data start its helper actors again."""
    while ORIGINALS:
        setattr(*ORIGINALS.pop())
