"""Engine pool: the engine actors of a run, loaded once and used by all its Datasets. It grows while all are full, and shrinks when one has
nothing to do, between the bounds of `ray.actors`."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from pipeline.flow.capacity import Reservations
from pipeline.job import Job
from pipeline.registry import News

CALLS_AT_ONCE = 4096
"""Calls that an engine actor takes: more than any engine answers together."""
FLUSH_S = 20.0
"""How long engines may take to write what they have answered."""
END_S = 10.0
IDLE_S = 60.0
"""How long an engine has nothing to do before it is ended, if there may be fewer."""
LOOK_S = 5.0
"""How often the pool looks for such an engine."""


class EnginePool:
    """Owns the handles of the engine actors; the registry and the renderers have copies."""

    def __init__(self, job: Job, actor: type, registry: Any, registry_name: str, reservations: Reservations) -> None:
        """`actor`: the class `EngineActor`, or one derived from it."""
        self.job, self.registry, self.registry_name, self.needed = job, registry, registry_name, reservations
        self.remote_class: Any = ray.remote(actor).options(
            num_cpus=reservations.cpus,
            num_gpus=reservations.gpus_here,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=CALLS_AT_ONCE,
        )
        self.handles: dict[str, Any] = {}
        self.looked_s = time.monotonic()
        for _ in range(reservations.min_actors):
            self.start_engine()

    def start_engine(self) -> None:
        """Start one more engine; Ray waits until there is room for it."""
        handle = self.remote_class.remote(self.job, max(1, int(self.needed.cpus)), self.registry_name)
        self.handles[handle._actor_id.hex()] = handle

    def adapt_size(self, news: News) -> None:
        """Start an engine if all are loaded and full, end those that have had nothing to do for a while."""
        if news.is_full and len(self.handles) < self.needed.max_actors and self.handles.keys() <= news.loaded.keys():
            self.start_engine()
        if len(self.handles) > self.needed.min_actors and time.monotonic() > self.looked_s + LOOK_S:
            self.looked_s = time.monotonic()
            self.end_idle_engines()

    def end_idle_engines(self) -> None:
        """End the engines that have had no request for `IDLE_S`, as far as there may be fewer."""
        for entry in ray.get(self.registry.list_idle_engines.remote()):
            if len(self.handles) <= self.needed.min_actors or entry.id.actor not in self.handles:
                continue
            with suppress(RayActorError, GetTimeoutError):
                if ray.get(entry.handle.measure_idle_s.remote(), timeout=LOOK_S) > IDLE_S:
                    ray.get(self.registry.remove_engine.remote(entry.id.actor))
                    self.end_engines([self.handles.pop(entry.id.actor)])

    def flush(self) -> None:
        """Have all engines write what they have answered. What a dead one had is asked again."""
        flushed = [handle.flush.remote() for handle in self.handles.values()]
        ray.wait(flushed, num_returns=len(flushed), timeout=FLUSH_S)

    def close(self) -> None:
        """End all engines."""
        self.end_engines(list(self.handles.values()))
        self.handles = {}

    def end_engines(self, handles: list[Any]) -> None:
        """End engines, which write what they have answered first; kill those that do not end."""
        ended = [handle.__ray_terminate__.remote() for handle in handles]
        ray.wait(ended, num_returns=len(ended), timeout=END_S)
        for handle in handles:
            ray.kill(handle)
