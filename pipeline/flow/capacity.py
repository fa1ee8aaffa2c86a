"""Capacity: how many engine actors of what size fit a cluster's machines.

An actor lives on one machine, and beside all actors one document at a time must be rendered: Ray would wait for room without end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pipeline.cluster import Resources
from pipeline.errors import JobError, RunError
from pipeline.job import Job

FIRST_RENDERERS = 4


class ClusterShrunk(RunError):
    """What was started cannot go on, and the machines that are left have room for a new beginning."""


@dataclass(frozen=True)
class Reservations:
    """What a run reserves: the size of an engine actor, the bounds of their number, and the CPUs of a renderer."""

    cpus: float
    """Of an engine actor."""
    gpus: float
    """Of an engine actor and all processes that its model is spread over."""
    gpus_here: float
    """Those of them that must be on one machine."""
    renderer_cpus: float
    min_actors: int
    max_actors: int
    max_renderers: int | None = None
    """None: as many as there are CPUs for."""
    expected_renderers: int = 1
    """As many as there are CPUs for now, beside the engines."""

    @property
    def first_renderers(self) -> int:
        """How many renderers are started at once; Ray starts others while these have all they take."""
        return min(self.expected_renderers, FIRST_RENDERERS)


def compute_reservations(job: Job, resources: Resources) -> Reservations:
    """Return what a run of this job reserves on these machines.

    The number of actors is the job's own, unless a machine has gone and the rest has room for fewer.
    """
    gpus = compute_actor_gpus(job, resources)
    gpus_here = 0.0 if job.sections.model.reserves_gpus_itself else gpus
    bounds = job.sections.ray.least_actors, job.sections.ray.most_actors
    found = Reservations(compute_actor_cpus(job, resources), gpus, gpus_here, compute_renderer_cpus(job, resources), *bounds)
    room = max(1, count_actors(found, resources))
    if found.min_actors > room:
        found = replace(found, min_actors=room, max_actors=room)
    machines = len(resources.per_machine)
    if is_engine_on_cpu(job, gpus):
        expected = machines  # one draws pages much faster than a model on the CPU reads them
        most: int | None = machines
    else:
        expected = max(1, int(count_fits(found.renderer_cpus, resources.cpus - found.cpus * min(found.max_actors, room))))
        most = expected if machines == 1 else None  # a cluster may grow
    if job.sections.ray.renderers:
        most = job.sections.ray.renderers * machines
        expected = min(most, max(expected, machines))
    return replace(found, max_renderers=most, expected_renderers=min(expected, most or expected))


def is_engine_on_cpu(job: Job, gpus: float) -> bool:
    """Say whether the model runs in the engine actors, without a GPU."""
    return not gpus and job.sections.model.engine != "openai"


def count_actors(needed: Reservations, resources: Resources) -> int:
    """Return how many engine actors there is room for, each on one machine, beside a render task."""
    fits = (min(count_fits(needed.cpus, cpus), count_fits(needed.gpus_here, gpus)) for cpus, gpus in resources.per_machine)
    spare = count_fits(needed.cpus, resources.cpus - needed.renderer_cpus)
    return int(min(sum(fits), spare, count_fits(needed.gpus, resources.gpus)))


def count_fits(needed: float, available: float) -> float:
    """Return how often a need fits into what is available; infinity where nothing is needed."""
    return (available + 1e-9) // needed if needed else math.inf


def compute_actor_gpus(job: Job, resources: Resources) -> float:
    """Return the GPUs of an engine actor; one that asks a server needs none.

    A model that vLLM splits over several GPUs has them all in its actor, which Ray places on a machine that has as many free: vLLM's own
    processes inherit them. (From 2.64 on Ray Data takes no placement groups of its caller.) Over several machines vLLM's executor `ray`
    reserves them instead, in a placement group of its own.
    """
    model = job.sections.model
    if not resources.gpus or model.engine == "openai":
        return 0.0
    return job.sections.ray.gpus_per_actor if model.gpus == 1 else float(model.gpus)


def compute_actor_cpus(job: Job, resources: Resources) -> float:
    """Return the CPUs of an engine actor: one beside a GPU or for a server; else all but what rendering needs, shared out, and no more
    than lets each of them find a machine."""
    actors = job.sections.ray.most_actors
    if job.sections.ray.cpus_per_actor:
        return job.sections.ray.cpus_per_actor
    if job.sections.model.engine == "openai":
        return min(1.0, resources.cpus / 2 / job.sections.ray.least_actors)
    if resources.gpus:
        return 1.0
    spare = resources.cpus - max(1.0, resources.cpus / 8) if resources.cpus > 1 else resources.cpus / 2
    share = spare / actors // 1 or spare / actors
    while share > 1 and sum(count_fits(share, cpus) for cpus, _ in resources.per_machine) < actors:
        share -= 1
    return share


def compute_renderer_cpus(job: Job, resources: Resources) -> float:
    """Return the CPUs of a renderer: one, which it keeps busy, or half of one beside a model on the CPU, for which it mostly waits.

    Other than an engine actor's, so that Ray does not fuse the two steps.
    """
    cpus = min(1.0, resources.cpus / 2) if resources.gpus or job.sections.model.engine == "openai" else 0.5
    return 0.9 * cpus if cpus == compute_actor_cpus(job, resources) and not compute_actor_gpus(job, resources) else cpus


def check_capacity(job: Job, resources: Resources, needed: Reservations) -> None:
    """Raise JobError when the job's least number of engine actors does not fit beside one render task."""
    actors = job.sections.ray.least_actors
    if actors > count_actors(needed, resources):
        largest = [max(amounts) for amounts in zip(*resources.per_machine, strict=True)]
        machines = f", on one machine at most {largest[0]:g} and {largest[1]:g}" if len(resources.per_machine) > 1 else ""
        raise JobError(
            f"{job.file}: ray.actors is {actors}, each with {needed.cpus:g} CPUs and {needed.gpus:g} GPUs, beside {needed.renderer_cpus:g} "
            f"CPUs for rendering; there are {resources.cpus:g} CPUs and {resources.gpus:g} GPUs{machines}",
            job.file,
            "ray.actors",
        )
