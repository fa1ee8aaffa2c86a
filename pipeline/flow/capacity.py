"""A job and a cluster's machines -> how many engine actors there is room for, and of what size. Starts nothing.

An actor lives on one machine, and beside all of them one document at a time must be drawn: Ray would wait for room without end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.cluster import Resources
from pipeline.errors import JobError
from pipeline.job import Job


@dataclass(frozen=True)
class Reservations:
    """What the parts of a run reserve."""

    cpus: float
    """Of an engine actor."""
    gpus: float
    """Of an engine actor and all that its model is spread over."""
    gpus_here: float
    """Those of them that must be on one machine."""
    renderer_cpus: float

    def count_actors(self, there: Resources) -> int:
        """Return how many engine actors there is room for, each on one machine, beside a renderer."""
        each = (min(count_fits(self.cpus, cpus), count_fits(self.gpus_here, gpus)) for cpus, gpus in there.per_machine)
        return int(min(sum(each), count_fits(self.cpus, there.cpus - self.renderer_cpus), count_fits(self.gpus, there.gpus)))


def count_fits(need: float, there: float) -> float:
    """Return how often a need is met; without one, as often as one likes."""
    return (there + 1e-9) // need if need else math.inf


def compute_reservations(job: Job, there: Resources) -> Reservations:
    gpus = compute_actor_gpus(job, there)
    gpus_here = 0.0 if job.sections.model.reserves_gpus_itself else gpus
    return Reservations(compute_actor_cpus(job, there), gpus, gpus_here, compute_renderer_cpus(job, there))


def compute_pool_size(job: Job, there: Resources) -> tuple[int, int]:
    """Return the least and the most engine actors: the job's own numbers, unless a machine has gone and left room for fewer."""
    room = max(1, compute_reservations(job, there).count_actors(there))
    least, most = job.sections.ray.least_actors, job.sections.ray.most_actors
    return (least, most) if least <= room else (room, room)


def compute_actor_gpus(job: Job, resources: Resources) -> float:
    """Return the GPUs of an engine actor; who asks a server needs none.

    A model that vLLM splits over several GPUs has them all in its actor, which Ray places on a machine that has as many free: vLLM's own
    processes inherit them. (Ray Data takes placement groups of ours no longer, from 2.64 on.) Over several machines vLLM's executor `ray`
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
    """Return the CPUs of a render task: other than an engine actor's, so that Ray does not fuse the two steps."""
    cpus = 1.0 if resources.gpus else 0.5
    return 0.9 * cpus if cpus == compute_actor_cpus(job, resources) and not compute_actor_gpus(job, resources) else cpus


def check_capacity(job: Job, there: Resources) -> None:
    """Raise JobError when the engine's actors and one renderer do not fit."""
    actors, each = job.sections.ray.least_actors, compute_reservations(job, there)
    if actors > each.count_actors(there):
        largest = [max(amounts) for amounts in zip(*there.per_machine, strict=True)]
        machines = f", on one machine at most {largest[0]:g} and {largest[1]:g}" if len(there.per_machine) > 1 else ""
        raise JobError(
            f"{job.file}: ray.actors is {actors}, each with {each.cpus:g} CPUs and {each.gpus:g} GPUs, beside {each.renderer_cpus:g} CPUs "
            f"for rendering; there are {there.cpus:g} CPUs and {there.gpus:g} GPUs{machines}"
        )
