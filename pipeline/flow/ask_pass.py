"""Documents that have something unasked -> rows of the ledger, as they come: the ask pass as a Ray Dataset.

    documents -> render tasks -> requests with their pixels -> engine actors -> answers

Knows not what is in the output folder: the flow says what was asked before and keeps what comes back.

Whatever dies here is replaced by Ray, which runs the task again from its start and drops as many of its rows as it has
already. So both steps yield their rows in the order of what they were given, whatever is ready first.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import threading
import traceback
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data.exceptions
from ray.exceptions import RayError

from pipeline import cluster, engines
from pipeline.budget import RenderSettings
from pipeline.errors import EngineDead, RunError
from pipeline.flow import metrics, watchdog
from pipeline.flow.capacity import compute_pool_size, compute_reservations
from pipeline.job import Job
from pipeline.output.ledger import LEDGER_SCHEMA, LedgerState
from pipeline.output.sources import SOURCE_SCHEMA
from pipeline.sources.http import DownloadPolicy
from pipeline.stages.ask import AskStage
from pipeline.stages.render import RenderStage, make_download_policy, make_render_settings
from pipeline.stages.requests import Row

RENDERED_SCHEMA = pa.schema(
    [
        *SOURCE_SCHEMA,
        *(LEDGER_SCHEMA.field(n) for n in ("key", "attempt", "first_page", "last_page", "status", "failure", "pages")),
        ("pixels", pa.list_(pa.binary())),
    ]
)
ENGINE_COLUMNS = pa.schema([("actor", pa.string()), ("alive_s", pa.float64()), ("busy_s", pa.float64())])
"""What a row says of the engine that answered, for the report: how long it has been there, and had something to answer."""
ANSWERED_SCHEMA = pa.schema([*SOURCE_SCHEMA, *(field for field in LEDGER_SCHEMA if field.name not in SOURCE_SCHEMA.names), *ENGINE_COLUMNS])
DOCUMENTS_PER_TASK = 16
BATCHES_IN_FLIGHT = 8
EXECUTION_ERRORS = (RayError, getattr(ray.data.exceptions, "ExecutionTimeoutError", RayError))
"""What ends an execution from within; the second is raised, by newer versions of Ray, where nothing at all has moved for half an hour."""
LAST_WORDS_S = 1.0
"""How long an actor whose engine is dead stays, so that answers that are there already reach the driver."""


@ray.remote(num_cpus=0)
class RequestRegistry:
    """Who asks what, and what the engines died of: a request that is done is not asked again, and of two files of the same
    bytes only one is asked."""

    def __init__(self, asked: LedgerState) -> None:
        self.asked, self.owners = asked, dict[str, str]()
        self.replaced, self.reason = 0, "its process ended without a word"
        self.nodes: dict[str, str] = {}

    def claim(self, identity: str, source: str, keys: list[str]) -> dict[str, int]:
        """Return the keys that this source shall ask, each with the number of its attempt."""
        if self.owners.setdefault(identity, source) != source:
            return {}
        return {key: self.asked.attempts.get(key, 0) + 1 for key in keys if key not in self.asked.done}

    def died(self, reason: str) -> None:
        """Remember why an engine ends its process."""
        self.reason = reason

    def live(self, actor: str, node: str) -> str | None:
        """Remember on which node an engine lives; return where it lived before it died."""
        before = self.nodes.get(actor)
        self.nodes[actor] = node
        return before

    def homes(self) -> list[str]:
        """Return the nodes on which engines live, or lived last."""
        return list(self.nodes.values())

    def replace(self) -> tuple[int, str]:
        """Return how many engines have been replaced, this one included, and what is known of why."""
        self.replaced += 1
        return self.replaced, self.reason


@dataclass(frozen=True)
class RenderTaskSettings:
    """What a render task needs to know; equal ones share a renderer within a worker process."""

    settings: RenderSettings
    root: Path
    per_request: int
    fingerprint: str
    access: DownloadPolicy
    job: str


def exit_without_destructors() -> None:
    """Let this worker's process end, when it has said good-bye to Ray, without Ray's last destructors: one of them can wait for ever
    (seen with Ray 2.60 on a busy machine), and nobody is left then who would kill it."""
    atexit.register(os._exit, 0)


@lru_cache(maxsize=1)
def find_render_metrics(job: str) -> metrics.RenderMetrics:
    """Return this worker's count of pages."""
    return metrics.RenderMetrics(job)


@lru_cache(maxsize=1)
def find_render_stage(rendering: RenderTaskSettings, claims: Any) -> RenderStage:
    """Return this worker's renderer, so that its sandbox outlives a task."""

    exit_without_destructors()

    def claim(identity: str, source: str, keys: list[str]) -> dict[str, int]:
        wanted: dict[str, int] = ray.get(claims.claim.remote(identity, source, keys))
        return wanted

    return RenderStage(rendering.settings, rendering.root, rendering.per_request, rendering.fingerprint, claim, rendering.access)


def render_documents(batch: pa.Table, rendering: RenderTaskSettings, claims: Any) -> Iterator[pa.Table]:
    """The render task: documents -> requests, streamed one by one."""
    stage = find_render_stage(rendering, claims)
    for document in batch.to_pylist():
        for row in stage(document):
            find_render_metrics(rendering.job).add(row)
            yield pa.Table.from_pylist([row], RENDERED_SCHEMA)


class EngineActor:
    """The engine actor: loads the model once, answers requests as they come, and takes its process along when the model dies."""

    def __init__(self, job: Job, threads: int, claims: Any) -> None:
        exit_without_destructors()
        self.claims = claims
        here = ray.get_runtime_context()
        self.name = f"{here.get_actor_id()} {os.getpid()}"  # one that is replaced keeps its id
        before = ray.get(claims.live.remote(here.get_actor_id(), here.get_node_id()))
        if here.was_current_actor_reconstructed and cluster.is_node_alive(before):  # that a node went away is no fault of the engine's
            self.count_replacement(job.sections.ray.max_restarts)
        self.stage, self.served = AskStage(job, self.load(job, threads)), metrics.EngineMetrics(job.sections.name)

    def load(self, job: Job, threads: int) -> engines.Engine:
        return engines.load_engine(job, threads)

    def count_replacement(self, most: int) -> None:
        """Raise RunError, with which Ray gives up, when engines have died more often than the job allows."""
        count, reason = ray.get(self.claims.replace.remote())
        if count > most:
            raise RunError(
                f"an engine died for the {count}. time, `ray.max_restarts` is {most}: {reason}; the same command resumes the run"
            )

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        waiting = len(batch)
        self.served.take(waiting)
        try:
            async for row in self.stage(batch.to_pylist()):
                times = self.served.answer(row)
                waiting -= 1
                yield pa.Table.from_pylist([row | {"actor": self.name, **times}], ANSWERED_SCHEMA)
        except EngineDead as error:
            await self.claims.died.remote(str(error))
            await asyncio.sleep(LAST_WORDS_S)
            os._exit(1)  # a death that Ray replaces; an exception would end the run
        finally:
            self.served.take(-waiting)


def ask_documents(job: Job, documents: pa.Table, asked: LedgerState, resources: cluster.Resources) -> Generator[Row, None, None]:
    """Yield a row for every request of these documents that is not done, as the answers come.

    Raises RunError when the engine does not load, or died more than `ray.max_restarts` times, and Stranded when too many machines have
    gone. Stops Ray with whatever else ends it early: with Ray go the actors, for whose CPUs the next run in this process would wait.
    """
    claims = RequestRegistry.options(scheduling_strategy=cluster.make_driver_affinity()).remote(asked)  # type: ignore[attr-defined]
    threads = frozenset(threading.enumerate())
    seen = watchdog.StallWatchdog(job, resources, lambda: ray.get(claims.homes.remote()))
    try:
        for row in iterate_rows(
            watchdog.watch_dataset(build_answers(job, build_requests(job, claims, documents, resources), claims, resources), seen)
        ):
            yield row
            seen.heard()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the iterators at whose end Ray Data stops
        cluster.stop_ray(threads)
        if isinstance(error, EXECUTION_ERRORS):
            raise cluster.convert_worker_error(error, "the run stopped: {}; run the same command again to resume it") from error
        raise


def build_requests(job: Job, claims: Any, documents: pa.Table, resources: cluster.Resources) -> ray.data.Dataset:
    """Return the documents' requests, rendered in tasks of their own: a renderer that dies takes no model with it."""
    rendering = RenderTaskSettings(
        make_render_settings(job), job.file.parent, job.pages_per_request, job.fingerprint, make_download_policy(job), job.sections.name
    )
    listed = documents.select(["source", "size_bytes", "version"])
    blocks = [listed.slice(start, DOCUMENTS_PER_TASK).combine_chunks() for start in range(0, listed.num_rows, DOCUMENTS_PER_TASK)]
    step: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "num_cpus": compute_reservations(job, resources).renderer_cpus}
    return ray.data.from_arrow(blocks).map_batches(cast(Any, render_documents), fn_args=(rendering, claims), **step)


def build_answers(job: Job, asked: ray.data.Dataset, claims: Any, resources: cluster.Resources) -> ray.data.Dataset:
    """Return the requests' answers; an actor takes the next batches while the engine works on the last."""
    each, (least, most) = compute_reservations(job, resources), compute_pool_size(job, resources)
    actors = ray.data.ActorPoolStrategy(
        min_size=least,
        max_size=most,
        max_tasks_in_flight_per_actor=BATCHES_IN_FLIGHT,
        max_concurrent_calls_per_actor=BATCHES_IN_FLIGHT,
    )
    return asked.map_batches(
        cast(Any, EngineActor),
        batch_size=compute_requests_per_batch(job),
        batch_format="pyarrow",
        fn_constructor_args=(job, max(1, int(each.cpus)), claims),
        num_cpus=each.cpus,
        num_gpus=each.gpus_here,
        compute=actors,
    )


def iterate_rows(dataset: ray.data.Dataset) -> Iterator[Row]:
    """Yield a dataset's rows as they come."""
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from cast(pa.Table, block).to_pylist()


def compute_requests_per_batch(job: Job) -> int:
    """Return how many requests reach an actor at a time: of its batches in flight a model fills its own, a server its connections.

    vLLM gets twice what it answers together: a batch makes room for the next one only when its slowest answer has come.
    """
    model = job.sections.model
    at_once = {"openai": model.concurrency, "vllm": 2 * model.max_num_seqs}
    return math.ceil(at_once[model.engine] / BATCHES_IN_FLIGHT) if model.engine in at_once else model.batch_size
