"""Capacity: engine actors fit the cluster's machines and leave CPUs for rendering."""

from __future__ import annotations

import pytest

from pipeline.cluster import Resources
from pipeline.errors import JobError
from pipeline.flow import ask_pass, capacity
from pipeline.job import Job
from tests.support.workspace import Workspace


def machines(*each: tuple[float, float]) -> Resources:
    """Machines by their CPUs and GPUs."""
    return Resources(sum(cpus for cpus, _ in each), sum(gpus for _, gpus in each), each)


def check(job: Job, resources: Resources) -> None:
    capacity.check_capacity(job, resources, capacity.compute_reservations(job, resources))


@pytest.mark.parametrize(("cpus", "actors", "each"), [(1, 1, 0.5), (2, 1, 1), (2, 3, 1 / 3), (16, 1, 14), (16, 3, 4)])
def test_actors_share_what_rendering_leaves(workspace: Workspace, cpus: float, actors: int, each: float) -> None:
    job, there = workspace.job(f"ray.actors={actors}"), Resources(cpus, 0)
    assert capacity.compute_actor_cpus(job, there) == pytest.approx(each)
    check(job, there)


@pytest.mark.parametrize(
    ("cpus", "actors", "each"),
    [((2, 2), 1, 2), ((2, 2), 2, 1), ((0, 4, 4), 1, 4), ((16, 16, 16, 16), 4, 14), ((4, 4), 3, 2), ((3, 3, 3), 4, 1)],
)
def test_an_actor_is_no_larger_than_a_machine(workspace: Workspace, cpus: tuple[float, ...], actors: int, each: float) -> None:
    job, there = workspace.job(f"ray.actors={actors}"), machines(*((one, 0) for one in cpus))
    assert capacity.compute_actor_cpus(job, there) == each
    check(job, there)


def test_a_job_may_bound_the_renderers_of_each_machine(workspace: Workspace) -> None:
    there = machines((64, 8), (64, 8))
    assert capacity.compute_reservations(workspace.job("ray.renderers=6"), there).max_renderers == 12
    assert capacity.compute_reservations(workspace.job(), there).max_renderers is None


def test_gpus_that_are_not_there_are_refused(workspace: Workspace) -> None:
    with pytest.raises(JobError, match=r"ray\.actors is 2, each with 1 CPUs and 1 GPUs, .* there are 8 CPUs and 1 GPUs$"):
        check(workspace.job("ray.actors=2"), Resources(8, 1))


@pytest.mark.parametrize("setting", ["ray.cpus_per_actor=3", "model={name: demo, engine: vllm, tensor_parallel_size: 2}"])
def test_what_no_machine_has_is_refused_although_all_have_it_together(workspace: Workspace, setting: str) -> None:
    with pytest.raises(JobError, match=r"there are 4 CPUs and 2 GPUs, on one machine at most 2 and 1$"):
        check(workspace.job(setting), machines((2, 1), (2, 1)))


def test_a_model_that_ray_spreads_over_machines_finds_its_gpus_on_several(workspace: Workspace) -> None:
    spread = "model={name: demo, engine: vllm, tensor_parallel_size: 2, engine_args: {distributed_executor_backend: ray}}"
    check(workspace.job(spread), machines((2, 1), (2, 1)))


def test_halves_of_gpus_are_counted_whole(workspace: Workspace) -> None:
    job, there = workspace.job("ray.gpus_per_actor=0.1"), machines((40, 1), (4, 0))
    assert capacity.count_actors(capacity.compute_reservations(job, there), there) == 10


@pytest.mark.parametrize(("actors", "gpus", "least", "most"), [("2", 3, 2, 2), ("2", 1, 1, 1), ("[1, 8]", 1, 1, 8), ("[2, 8]", 1, 1, 1)])
def test_a_cluster_that_became_too_small_has_as_many_actors_as_fit(
    workspace: Workspace, actors: str, gpus: int, least: int, most: int
) -> None:
    needed = capacity.compute_reservations(workspace.job(f"ray.actors={actors}"), machines(*[(4, 1)] * gpus))
    assert (needed.min_actors, needed.max_actors) == (least, most)


def test_an_engine_that_asks_a_server_needs_no_gpu_and_one_cpu(workspace: Workspace) -> None:
    job = workspace.job("model={engine: openai, base_url: 'http://127.0.0.1:1/v1', concurrency: 20}")
    assert (capacity.compute_actor_gpus(job, Resources(8, 4)), capacity.compute_actor_cpus(job, Resources(8, 4))) == (0, 1)
    assert ask_pass.compute_requests_per_engine(job) == 40
    check(job, Resources(1, 0))


SERVER = "model={engine: openai, base_url: 'http://127.0.0.1:1/v1'}"


@pytest.mark.parametrize(("setting", "renderers"), [("ray.actors=1", 2), ("ray.actors=[1, 2]", 1), ("ray.renderers=1", 1)])
def test_renderers_leave_room_for_the_engines(workspace: Workspace, setting: str, renderers: int) -> None:
    needed = capacity.compute_reservations(workspace.job(SERVER, "ray.cpus_per_actor=1", setting), Resources(3, 0))
    assert (needed.max_renderers, needed.expected_renderers) == (renderers, renderers)


def test_one_renderer_feeds_a_model_on_the_cpu_unless_the_job_says_more(workspace: Workspace) -> None:
    for settings, most in (((), 1), (("ray.renderers=3",), 3)):
        needed = capacity.compute_reservations(workspace.job(*settings), Resources(8, 0))
        assert (needed.max_renderers, needed.expected_renderers) == (most, 1)


def test_renderers_of_a_cluster_grow_with_it(workspace: Workspace) -> None:
    needed = capacity.compute_reservations(workspace.job(), machines((8, 1), (8, 1)))
    assert (needed.max_renderers, needed.expected_renderers, needed.first_renderers) == (None, 15, 4)
    bounded = capacity.compute_reservations(workspace.job("ray.renderers=3"), machines((8, 1), (8, 1)))
    assert (bounded.max_renderers, bounded.expected_renderers) == (6, 6)
