"""A machine of a cluster that disappears during a run: the requests that it held are asked again, and the records are the same.

Simulated on this machine: each node has a Ray daemon, an object store and workers of its own, and all of them are killed. Documents and
results are in S3, a real server on loopback.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline import cluster, flow
from pipeline.engines import Engine
from pipeline.flow import ask_pass, watchdog
from pipeline.job import Job
from pipeline.records import Completion, Request
from pipeline.report import Progress, Report
from tests.support import ray_head, s3
from tests.support.engines import InkEngine
from tests.support.ray_actors import InkActor
from tests.support.workspace import Workspace, draw_slip

DOCUMENTS = 80
TIME_COLUMNS = ("started_at", "elapsed_s")


class SlowEngine(InkEngine):
    """Takes 0.15 s for a page, one after another, so that the run is not over before a machine is killed.

    It leaves the event loop free: otherwise the first shard is written when most pages are answered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turn = asyncio.Lock()

    async def complete(self, request: Request) -> Completion:
        async with self.turn:
            await asyncio.sleep(0.15)
        return await super().complete(request)


class SlowActor(ask_pass.EngineActor):
    def load(self, job: Job, threads: int) -> Engine:
        return SlowEngine()


def documents() -> Iterator[bytes]:
    """Yield files of a page, of two pages in every tenth, and here and there one that has the bytes of the file before."""
    for number in range(DOCUMENTS):
        yield draw_slip(number - number % 50 // 49, *[number + DOCUMENTS] * (number % 10 == 0))


@pytest.fixture(scope="module")
def remote(bucket: s3.Bucket, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, str]:
    """Return a workspace whose documents are in S3, and where they are."""
    workspace = Workspace(tmp_path_factory.mktemp("nodes"))
    for number, data in enumerate(documents()):
        bucket.put(f"nodes/in/{number:03}.pdf", data)
    return workspace, bucket.url("nodes")


def job(remote: tuple[Workspace, str], output: str, *settings: str) -> Job:
    workspace, place = remote
    given = (f"source.paths=[{place}/in]", f"output.path={place}/{output}", "pages.per_request=1", "model.batch_size=4")
    return workspace.job(*given, *settings)


@pytest.fixture(scope="module")
def undisturbed(ray_session: cluster.Resources, remote: tuple[Workspace, str]) -> Report:
    """Run the documents on one machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ask_pass, "EngineActor", InkActor)
        return flow.run(job(remote, "undisturbed"))


@pytest.fixture
def two_machines(undisturbed: Report) -> Iterator[Cluster]:
    """A head with room for one engine, and a machine with room for another and a renderer."""
    cluster.stop_ray(frozenset(threading.enumerate()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray leaves the log files of the processes it starts to the garbage collector
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 2**27})
        made.add_node(num_cpus=2, object_store_memory=2**27)
        ray.init(address=made.address, log_to_driver=False)
        made.wait_for_nodes()
        yield made
        ray.shutdown()
        made.shutdown()


def kill_machine(machines: Cluster) -> None:
    """Kill all processes of the second machine at once."""
    machine = next(iter(machines.worker_nodes))
    daemon = machine.all_processes["raylet"][0].process.pid
    os.kill(daemon, signal.SIGSTOP)
    ray_head.kill(ray_head.PARENT, daemon)
    machines.remove_node(machine, allow_graceful=False)


def drop_columns(names: tuple[str, ...], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows in the order of their keys, without the columns that depends on when and where they were asked."""
    return sorted(({name: row[name] for name in row if name not in names} for row in rows), key=lambda row: row["key"])


def test_a_machine_that_disappears_costs_nothing_but_time(
    bucket: s3.Bucket,
    remote: tuple[Workspace, str],
    undisturbed: Report,
    two_machines: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def lose_a_machine(now: Progress) -> None:
        if now.documents_done >= DOCUMENTS / 3 and two_machines.worker_nodes:
            kill_machine(two_machines)

    monkeypatch.setattr(ask_pass, "EngineActor", SlowActor)
    monkeypatch.setattr(watchdog, "SILENT_S", 5.0)
    caplog.set_level(logging.INFO, logger="pipeline.events")
    report = flow.run(job(remote, "disturbed", "ray.actors=2", "ray.max_restarts=0"), on_progress=lose_a_machine)
    assert not two_machines.worker_nodes
    assert "machines_gone" in [record.msg for record in caplog.records]  # no room for two engines and a renderer: it began anew with less
    assert (report.documents, report.statuses, report.exit_code) == (DOCUMENTS, {"extracted": DOCUMENTS}, 0)
    alone, disturbed = (bucket.rows(f"{one.output}/requests") for one in (undisturbed, report))
    assert len({row["key"] for row in disturbed}) == len(disturbed)
    assert len({row["answer"] for row in disturbed}) > DOCUMENTS  # a page's answer is nearly always its own: some are as dark as another
    # either of two equal files may be asked
    assert drop_columns((*TIME_COLUMNS, "source"), disturbed) == drop_columns((*TIME_COLUMNS, "source"), alone)
    assert bucket.contents("nodes/disturbed/records/") == {
        key.replace("undisturbed", "disturbed"): data for key, data in bucket.contents("nodes/undisturbed/records/").items()
    }
