"""Machines of a cluster come and go: one that disappears costs the requests it held, and these are asked again.

Simulated on this machine: each node has a Ray daemon, an object store and workers of its own, and all of them are killed.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator

import pyarrow.parquet as pq
import pytest
import ray
from desk import Desk, Scripted, completion, slip
from ray.cluster_utils import Cluster

from pipeline import asking, flow
from pipeline.engines import Engine
from pipeline.job import Job
from pipeline.records import Completion, Request
from pipeline.report import Progress

PAGES = 60


class Slow(Scripted):
    """Answers from how dark the page is, one page in a fifth of a second: so slowly that a node can go meanwhile."""

    async def complete(self, request: Request) -> Completion:
        pixels = request.messages[1].parts[0]
        assert not isinstance(pixels, str)
        time.sleep(0.2)
        return completion(f'{{"currency":"EUR","total":{int((pixels < 128).sum()) / 100},"lines":[]}}')


class SlowAsker(asking.Asker):
    def load(self, job: Job, threads: int) -> Engine:
        return Slow()


for module in (__name__, Scripted.__module__):
    ray.cloudpickle.register_pickle_by_value(sys.modules[module])  # Ray's workers do not find the tests


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head and two more machines, each with room for an actor and a renderer."""
    ray.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray leaves the log files of the processes it starts to the garbage collector
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 2**27})
        for _ in range(2):
            made.add_node(num_cpus=2, object_store_memory=2**27)
        ray.init(address=made.address, log_to_driver=False)
        made.wait_for_nodes()
        yield made
        ray.shutdown()
        made.shutdown()


def test_a_machine_that_disappears_costs_nothing_but_time(desk: Desk, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for page in range(PAGES):
        desk.put(f"{page}.pdf", slip(page))
    monkeypatch.setattr(asking, "Asker", SlowAsker)
    job = desk.job("model.batch_size=4", "ray.actors=2", "ray.cpus_per_actor=1", "ray.max_restarts=0")

    def lose_a_node(now: Progress) -> None:
        if now.requests_done >= PAGES // 3 and len(cluster.worker_nodes) == 2:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    report = flow.run(job, on_progress=lose_a_node)
    rows = pq.read_table(job.output / "requests", columns=["key", "attempt"]).to_pylist()
    assert len(cluster.worker_nodes) == 1
    assert (report.statuses, report.exit_code) == ({"extracted": PAGES}, 0)
    assert len(rows) == len({row["key"] for row in rows}) == PAGES
