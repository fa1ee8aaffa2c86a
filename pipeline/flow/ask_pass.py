"""Ask pass as a Ray Dataset: documents with unanswered requests come in, rows of the ledger go out as the answers come.

    documents -> render tasks -> requests with their pixels -> engine actors -> answers

When a worker or an actor dies, Ray runs its task again from the start and drops as many of its rows as it already has. So both steps
yield their rows in the order of their input, whatever is ready first.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data.exceptions
from ray.exceptions import RayError

from pipeline import cluster, engines
from pipeline.errors import EngineDead, RunError
from pipeline.flow.capacity import Reservations
from pipeline.flow.metrics import EngineMetrics, RenderMetrics
from pipeline.flow.quarantine import DeathRecord, Quarantine
from pipeline.flow.watchdog import StallWatchdog, call_while_executing
from pipeline.job import Job
from pipeline.output.ledger import LEDGER_SCHEMA, LedgerState
from pipeline.output.sources import SOURCE_SCHEMA
from pipeline.records import AnsweredRow, SourceRow
from pipeline.stages.ask import AskStage
from pipeline.stages.render import RenderPlan, RenderStage

RENDERED_SCHEMA = pa.schema(
    [
        *SOURCE_SCHEMA,
        *(LEDGER_SCHEMA.field(n) for n in ("key", "attempt", "first_page", "last_page", "status", "failure", "pages", "page_failures")),
        ("pixels", pa.list_(pa.binary())),
    ]
)
ENGINE_COLUMNS = pa.schema([("actor", pa.string()), ("alive_s", pa.float64()), ("busy_s", pa.float64())])
"""What a row says of the engine that answered, for the report."""
ANSWERED_SCHEMA = pa.schema([*SOURCE_SCHEMA, *(field for field in LEDGER_SCHEMA if field.name not in SOURCE_SCHEMA.names), *ENGINE_COLUMNS])
DOCUMENTS_PER_TASK = 16
BATCHES_IN_FLIGHT = 8
EXECUTION_ERRORS = (RayError, getattr(ray.data.exceptions, "ExecutionTimeoutError", RayError))
"""What Ray Data raises when an execution fails; newer versions raise the second where nothing has moved for half an hour."""
EXIT_DELAY_S = 1.0
"""How long an actor whose engine is dead stays, so that answers that are there already reach the driver."""
STALL_PERIOD_S = 5.0
"""How often an actor looks whether its engine still writes tokens."""
LOADED_PERIOD_S = 1.0
"""How often the driver asks whether an engine has loaded its model."""
IDENTIFIED_PERIOD_S = 5.0
"""How often the driver fetches the documents that need no request."""


@dataclass(frozen=True)
class AskPass:
    """What the ask pass needs, computed once for a run."""

    job: Job
    render: RenderPlan
    reservations: Reservations
    on_loaded: Callable[[], None]
    """Called when the first engine has loaded its model."""


@ray.remote(num_cpus=0)
class RequestRegistry:
    """Decides which document asks which request, and keeps what is known of the engines.

    A request that is done is not asked again, and of several files with the same bytes one is asked.
    """

    def __init__(self, state: LedgerState) -> None:
        self.state, self.owners = state, dict[str, str]()
        self.identified: dict[str, SourceRow] = {}
        self.record = DeathRecord()
        self.nodes: dict[str, str] = {}
        self.loaded = 0

    def claim(self, document: SourceRow, keys: list[str]) -> dict[str, int]:
        """Return the keys that this document shall ask, each with the number of its attempt, from 1.

        A document that shall ask none is kept for `take_identified`.
        """
        source = document["source"]
        owner = self.owners.setdefault(document["doc_id"] or f"unread {source}", source)
        wanted = {key: self.state.attempts.get(key, 0) + 1 for key in keys if key not in self.state.done} if owner == source else {}
        if not wanted:
            self.identified[source] = document
        return wanted

    def take_identified(self) -> list[SourceRow]:
        """Return the documents identified since the last call that need no request."""
        taken, self.identified = list(self.identified.values()), {}
        return taken

    def begin_requests(self, actor: str, keys: list[str]) -> dict[str, tuple[int, str]]:
        """Note requests as under way; return those that were so at deaths of engines (`DeathRecord.begin`)."""
        return self.record.begin(actor, keys)

    def begin_alone(self, actor: str, key: str) -> None:
        """Note that a request is asked with no other."""
        self.record.begin_alone(actor, key)

    def end_request(self, actor: str, key: str) -> None:
        """Note that a request is answered."""
        self.record.end(actor, key)

    def record_death(self, actor: str, reason: str) -> None:
        """Keep why an engine ends its process, for the requests that it had."""
        self.record.record_death(actor, reason)

    def record_node(self, actor: str, node: str) -> str | None:
        """Keep on which node an engine lives; return the node where it lived before it died."""
        before = self.nodes.get(actor)
        self.nodes[actor] = node
        return before

    def list_nodes(self) -> list[str]:
        """Return the nodes on which engines live, or lived last."""
        return list(self.nodes.values())

    def record_loaded(self) -> None:
        """Count an engine that has loaded its model."""
        self.loaded += 1

    def has_loaded(self) -> bool:
        """Say whether any engine has loaded its model."""
        return self.loaded > 0

    def count_replacement(self, actor: str) -> tuple[int, str]:
        """Return how many engines were replaced, this one included, and why the dead one ended."""
        return self.record.count_replacement(actor)


def exit_without_destructors() -> None:
    """Exit with os._exit after Ray's atexit handler; its C++ destructors can deadlock (Ray 2.60, on a busy machine)."""
    atexit.register(os._exit, 0)


@lru_cache(maxsize=1)
def find_render_metrics(job: str) -> RenderMetrics:
    """Return this worker's count of pages."""
    return RenderMetrics(job)


@lru_cache(maxsize=1)
def find_render_stage(plan: RenderPlan, registry: Any) -> RenderStage:
    """Return this worker's render stage, so that its sandbox outlives a task."""
    exit_without_destructors()

    def claim(document: SourceRow, keys: list[str]) -> dict[str, int]:
        wanted: dict[str, int] = ray.get(registry.claim.remote(document, keys))
        return wanted

    return RenderStage(plan, claim)


def render_documents(batch: pa.Table, plan: RenderPlan, registry: Any) -> Iterator[pa.Table]:
    """Render task: documents -> requests, streamed one by one."""
    stage = find_render_stage(plan, registry)
    for row in stage.render_documents(batch.to_pylist()):
        find_render_metrics(plan.job).add(row)
        yield pa.Table.from_pylist([row], RENDERED_SCHEMA)


class EngineActor:
    """Loads the model once, answers requests as they come, and ends its process when the engine dies."""

    def __init__(self, job: Job, threads: int, registry: Any) -> None:
        exit_without_destructors()
        self.registry = registry
        here = ray.get_runtime_context()
        self.actor = str(here.get_actor_id())  # one that is replaced keeps its id
        self.name = f"{self.actor} {os.getpid()}"
        before = ray.get(registry.record_node.remote(self.actor, here.get_node_id()))
        if here.was_current_actor_reconstructed and cluster.is_node_alive(before):  # that a node went away is not the engine's failure
            self.check_replacements(job.sections.ray.max_restarts)
        self.engine, self.metrics = self.load(job, threads), EngineMetrics(job.sections.name)
        self.quarantine = Quarantine(AskStage(job, self.engine), registry, self.actor)
        threading.Thread(target=self.watch_engine, args=(job.sections.model.stall_s,), daemon=True).start()
        registry.record_loaded.remote()

    def load(self, job: Job, threads: int) -> engines.Engine:
        return engines.load_engine(job, threads, on_gpu=bool(ray.get_runtime_context().get_accelerator_ids().get("GPU")))

    def watch_engine(self, stall_s: float) -> None:
        """End this process once the engine has had requests and no token for this long: a GPU's driver or another process hangs."""
        while (silent_s := self.engine.measure_silence_s()) < stall_s:
            time.sleep(min(STALL_PERIOD_S, stall_s / 4))
        waiting = self.metrics.waiting
        reason = f"no token for {silent_s:.0f} s with {waiting} requests under way, `model.stall_s` is {stall_s:g}"
        ray.get(self.registry.record_death.remote(self.actor, reason))
        os._exit(1)

    def check_replacements(self, most: int) -> None:
        """Raise RunError, with which Ray gives up, when engines have died more often than the job allows."""
        count, reason = ray.get(self.registry.count_replacement.remote(self.actor))
        if count > most:
            raise RunError(
                f"an engine died for the {count}. time, `ray.max_restarts` is {most}: {reason}; the same command resumes the run"
            )

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        waiting = len(batch)
        self.metrics.add_waiting(waiting)
        try:
            async for row in self.quarantine.answer_rows(batch.to_pylist()):
                times = self.metrics.record_answer(row)
                waiting -= 1
                yield pa.Table.from_pylist([{**row, "actor": self.name, **times}], ANSWERED_SCHEMA)
        except EngineDead as error:
            await self.registry.record_death.remote(self.actor, str(error))
            await asyncio.sleep(EXIT_DELAY_S)
            os._exit(1)  # a death that Ray replaces; an exception would end the run
        finally:
            self.metrics.add_waiting(-waiting)


def ask_documents(ask_pass: AskPass, documents: pa.Table, state: LedgerState) -> Generator[AnsweredRow, None, None]:
    """Yield a row for every request of these documents that is not done, as the answers come, and one without a key for each
    document that was identified and needs no request.

    Raises RunError when the engine does not load or died more than `ray.max_restarts` times, ClusterShrunk when too many machines have
    gone. Whatever ends it early, it stops Ray: with Ray go the actors, for whose CPUs the next run in this process would wait.
    """
    registry = RequestRegistry.options(scheduling_strategy=cluster.make_driver_affinity()).remote(state)  # type: ignore[attr-defined]
    threads = frozenset(threading.enumerate())
    watchdog = StallWatchdog(ask_pass.job, ask_pass.reservations, lambda: ray.get(registry.list_nodes.remote()))
    monitor = ExecutionMonitor(watchdog, registry, ask_pass.on_loaded)
    answers = build_answers(ask_pass, build_requests(ask_pass, documents, registry), registry)
    try:
        fetched_s = time.monotonic()
        for row in iterate_rows(call_while_executing(answers, monitor.step)):
            yield row
            watchdog.reset()
            if time.monotonic() > fetched_s + IDENTIFIED_PERIOD_S:
                yield from take_identified(registry)
                fetched_s = time.monotonic()
        yield from take_identified(registry)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the iterators at whose end Ray Data stops
        cluster.stop_ray(threads)
        if isinstance(error, EXECUTION_ERRORS):
            raise cluster.convert_worker_error(error, "the run stopped: {}; run the same command again to resume it") from error
        raise


class ExecutionMonitor:
    """What the driver does while Ray Data executes: watch for a stall, and notice that an engine is loaded."""

    def __init__(self, watchdog: StallWatchdog, registry: Any, on_loaded: Callable[[], None]) -> None:
        self.watchdog, self.registry, self.on_loaded = watchdog, registry, on_loaded
        self.loaded, self.asked_s = False, time.monotonic()

    def step(self) -> None:
        """Take one look. Raises what `StallWatchdog.check` raises."""
        self.watchdog.check()
        if not self.loaded and time.monotonic() > self.asked_s + LOADED_PERIOD_S:
            self.loaded, self.asked_s = ray.get(self.registry.has_loaded.remote()), time.monotonic()
            if self.loaded:
                self.on_loaded()


def take_identified(registry: Any) -> Iterator[AnsweredRow]:
    """Yield a row without a key for each document that was identified and needs no request."""
    for document in ray.get(registry.take_identified.remote()):
        yield cast(AnsweredRow, {**document, "key": None})


def build_requests(ask_pass: AskPass, documents: pa.Table, registry: Any) -> ray.data.Dataset:
    """Return the documents' requests, rendered in tasks of their own, so that a renderer that dies does not end an engine."""
    listed = documents.select(["source", "size_bytes", "version", "full_url"])
    blocks = [listed.slice(start, DOCUMENTS_PER_TASK).combine_chunks() for start in range(0, listed.num_rows, DOCUMENTS_PER_TASK)]
    needed = ask_pass.reservations
    step: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "num_cpus": needed.renderer_cpus}
    if needed.max_renderers:
        step["compute"] = ray.data.TaskPoolStrategy(size=needed.max_renderers)
    return ray.data.from_arrow(blocks).map_batches(cast(Any, render_documents), fn_args=(ask_pass.render, registry), **step)


def build_answers(ask_pass: AskPass, requests: ray.data.Dataset, registry: Any) -> ray.data.Dataset:
    """Return the requests' answers; an actor takes the next batches while its engine works on the last."""
    job, needed = ask_pass.job, ask_pass.reservations
    actors = ray.data.ActorPoolStrategy(
        min_size=needed.min_actors,
        max_size=needed.max_actors,
        max_tasks_in_flight_per_actor=BATCHES_IN_FLIGHT,
        max_concurrent_calls_per_actor=BATCHES_IN_FLIGHT,
    )
    return requests.map_batches(
        cast(Any, EngineActor),
        batch_size=compute_requests_per_batch(job),
        batch_format="pyarrow",
        fn_constructor_args=(job, max(1, int(needed.cpus)), registry),
        num_cpus=needed.cpus,
        num_gpus=needed.gpus_here,
        compute=actors,
    )


def iterate_rows(dataset: ray.data.Dataset) -> Iterator[Any]:
    """Yield a dataset's rows as they come, each a dict that has the fields of the dataset's schema."""
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from cast(pa.Table, block).to_pylist()


def compute_requests_per_batch(job: Job) -> int:
    """Return how many requests one batch brings to an actor, which has `BATCHES_IN_FLIGHT` batches: a model's own batch size, a server's
    connections shared out.

    vLLM gets twice what it answers together: a batch makes room for the next one only when its slowest answer has come.
    """
    model = job.sections.model
    at_once = {"openai": model.concurrency, "vllm": 2 * model.sequences}
    return math.ceil(at_once[model.engine] / BATCHES_IN_FLIGHT) if model.engine in at_once else model.batch_size
