"""Ask pass: documents with unanswered requests come in, receipts of what is in the ledger go out.

    documents -> render actors (a Ray Dataset) -> requests with their pixels -> engine actors -> shards of the ledger
                                                                                           receipts -> registry -> driver

The engines are loaded once for a run. The data goes from renderers to engines and from there to the disk; the driver hands out blocks of
documents and fetches the news several times a second.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.data.exceptions
from ray.exceptions import RayError

from pipeline import cluster
from pipeline.errors import RunError
from pipeline.events import emit_event
from pipeline.flow.capacity import Reservations
from pipeline.flow.engine_actor import EngineActor
from pipeline.flow.engine_pool import EnginePool
from pipeline.flow.render_actor import TRIAL_COLUMN, RenderActor, SendLimits
from pipeline.flow.watchdog import DatasetRun, StallWatchdog
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.ledger import LedgerState, write_rows
from pipeline.records import ReceiptRow
from pipeline.registry import News, RequestRegistry, unpack_receipts
from pipeline.stages.render import RenderPlan

EXECUTION_ERRORS = (RayError, getattr(ray.data.exceptions, "ExecutionTimeoutError", RayError))
"""What Ray Data raises when an execution fails."""
LISTED_COLUMNS = ["source", "size_bytes", "version", "full_url"]
NEWS_PERIOD_S, NEWS_PERIOD_MAX_S = 0.25, 1.0
"""How often the driver fetches the news: often at first."""
IDENTIFIED_PERIOD_S = 5.0
"""How often it writes what was found about documents that need no request."""
MAX_BLOCK_DOCUMENTS = 64
"""Documents that a renderer takes at a time: each block costs the driver some milliseconds."""
BLOCKS_PER_RENDERER = 4
"""Of what is left to hand out: blocks get smaller towards the end, so that renderers end together."""
BLOCKS_IN_HAND = 8
"""Blocks that a renderer has: while requests of some are answered, it draws the next. Its window of bytes bounds what is under way; a long
answer holds no place (`render_actor.BlocksInHand`)."""
WINDOW_BYTES = 256 * 2**20
"""Pixels that a renderer has under way at most, about 85 pages …"""
WINDOW_SHARE = 0.5
"""… and all renderers together this share of the object stores."""


@dataclass(frozen=True)
class Setup:
    """What the ask pass needs, computed once for a run."""

    job: Job
    render: RenderPlan
    reservations: Reservations
    check_run: Callable[[], object]
    """Called with the news, several times a second; raises what shall end the run."""
    on_loaded: Callable[[], None]
    """Called when the first engine has loaded its model."""
    has_passed_trial: Callable[[int], bool]
    """Says whether enough of so many first documents of a new output are good, whatever comes of those that are not answered."""
    judge_trial: Callable[[], None]
    """Called when the first documents of a new output are answered; raises RunError where the others shall not be asked."""


class AskPass:
    """The actors of a run, and what the driver does while they work.

    Whatever ends it early stops Ray: with Ray go the actors, for whose CPUs the next run in this process would wait.
    """

    def __init__(self, setup: Setup, output: Output) -> None:
        self.setup, self.output = setup, output
        self.threads = frozenset(threading.enumerate())
        self.name = f"registry {uuid.uuid4().hex}"
        registry_class: Any = ray.remote(RequestRegistry)
        options = {"name": self.name, "num_cpus": 0, "scheduling_strategy": cluster.make_driver_affinity()}
        self.registry = registry_class.options(**options).remote(cluster.is_node_alive)
        self.pool = EnginePool(setup.job, EngineActor, self.registry, self.name, setup.reservations)
        self.nodes: list[str] = []
        self.watchdog = StallWatchdog(setup.job, setup.reservations, lambda: self.nodes)
        self.is_loaded = False
        self.identified: list[Any] = []
        self.written_s = time.monotonic()

    def ask_documents(self, documents: pa.Table, state: LedgerState, trial: int = 0) -> Generator[ReceiptRow, None, None]:
        """Yield the receipt of every request of these documents that is not done, as they are written, and one without a key for each
        document that was identified and needs no request.

        With `trial`, so many documents are asked before the others, until they can be judged. Raises RunError when the engine does not
        load or died more than `ray.max_restarts` times, ClusterShrunk when too many machines have gone, and what `judge_trial` raises.
        """
        run: DatasetRun | None = None
        try:
            ray.get(self.registry.begin_round.remote(state.done, state.attempts, not trial))
            self.watchdog.reset()
            run = DatasetRun(self.build_dataset(documents, trial))
            period_s = NEWS_PERIOD_S
            while not run.has_ended(period_s):
                yield from self.take_news()
                period_s = min(NEWS_PERIOD_MAX_S, 1.05 * period_s)
                if trial and (run.documents_done >= trial or self.setup.has_passed_trial(trial)):
                    self.pool.flush()
                    yield from self.take_news()
                    self.setup.judge_trial()
                    self.registry.open_gate.remote()
                    trial = 0
            run.raise_error()
            self.pool.flush()
            yield from self.take_news()
            self.write_identified()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold the iterators at whose end Ray Data stops
            self.stop(run)
            if isinstance(error, EXECUTION_ERRORS):
                raise cluster.convert_worker_error(error, cluster.STOPPED) from error
            raise

    def take_news(self) -> Iterator[ReceiptRow]:
        """Yield the receipts that have come, and act on the other news. Raises RunError."""
        self.setup.check_run()
        news: News = ray.get(self.registry.take_news.remote())
        self.nodes = news.nodes
        if news.loaded and not self.is_loaded:
            self.is_loaded = True
            self.setup.on_loaded()
        for shard, requests in news.shards:
            emit_event("shard_written", shard=shard, requests=requests)
        if news.receipts or news.identified:
            self.watchdog.reset()
        for receipts in news.receipts:
            yield from unpack_receipts(receipts)
        identified: list[Any] = [{**document, "key": None} for document in news.identified]
        yield from identified
        self.identified += identified
        if time.monotonic() > self.written_s + IDENTIFIED_PERIOD_S:
            self.write_identified()
        if news.fatal:
            raise RunError(news.fatal)
        self.watchdog.check()
        self.pool.adapt_size(news)

    def write_identified(self) -> None:
        """Write the documents that need no request into the list of sources."""
        write_rows(self.output, self.identified)
        self.identified, self.written_s = [], time.monotonic()

    def build_dataset(self, documents: pa.Table, trial: int) -> ray.data.Dataset:
        """Return a Dataset that draws the documents and has their requests asked."""
        needed = self.setup.reservations
        blocks = cut_blocks(mark_trial(documents, trial), trial, needed.expected_renderers)
        actors = ray.data.ActorPoolStrategy(
            min_size=min(len(blocks), needed.first_renderers),
            max_size=needed.max_renderers,
            max_tasks_in_flight_per_actor=BLOCKS_IN_HAND,
            max_concurrent_calls_per_actor=BLOCKS_IN_HAND,
        )
        return cast(ray.data.Dataset, ray.data.from_blocks(blocks)).map_batches(
            cast(Any, RenderActor),
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=(self.setup.render, self.name, self.compute_send_limits()),
            num_cpus=needed.renderer_cpus,
            compute=actors,
        )

    def compute_send_limits(self) -> SendLimits:
        """Return how much each renderer has under way."""
        stores = ray.cluster_resources().get("object_store_memory", 0.0)
        share = int(WINDOW_SHARE * stores / self.setup.reservations.expected_renderers)
        return SendLimits(min(WINDOW_BYTES, share), compute_requests_per_engine(self.setup.job), BLOCKS_IN_HAND)

    def close(self) -> None:
        """End the actors; Ray goes on."""
        if ray.is_initialized():
            self.pool.close()
            ray.kill(self.registry)

    def stop(self, run: DatasetRun | None) -> None:
        """Have the engines write what is answered, and stop Ray."""
        if run:
            run.stop()
        with suppress(RayError):
            self.pool.flush()
        with suppress(RunError):
            self.write_identified()
        cluster.stop_ray(self.threads)


def mark_trial(documents: pa.Table, trial: int) -> pa.Table:
    """Return what renderers need to know of documents, the first of which are marked as the trial."""
    is_trial = pa.array(np.arange(documents.num_rows) < trial)
    return documents.select(LISTED_COLUMNS).append_column(TRIAL_COLUMN, is_trial)


def cut_blocks(documents: pa.Table, trial: int, renderers: int) -> list[pa.Table]:
    """Return the documents in blocks: those of the trial apart from the others, and in each part smaller ones towards the end."""
    blocks, start = [], 0
    for end in (trial, documents.num_rows):
        while start < end:
            size = min(MAX_BLOCK_DOCUMENTS, math.ceil((end - start) / renderers / BLOCKS_PER_RENDERER))
            blocks.append(documents.slice(start, size).combine_chunks())
            start += size
    return blocks


def compute_requests_per_engine(job: Job) -> int:
    """Return how many requests an engine has at a time: what a server's connections or a model's batch take, and as many that wait."""
    model = job.sections.model
    at_once = {"openai": model.concurrency, "vllm": model.sequences}
    return 2 * at_once.get(model.engine, 2 * model.batch_size)
