"""Engine actor: loads the model once for a run, answers requests as renderers send them, and has them written into the ledger."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import suppress
from typing import Any, cast

import ray

from pipeline import cluster, engines
from pipeline.errors import EngineDead, PipelineError, RunError
from pipeline.flow.answer_writer import AnswerWriter
from pipeline.flow.metrics import EngineMetrics
from pipeline.flow.quarantine import Quarantine
from pipeline.job import Job
from pipeline.output import Output
from pipeline.records import LedgerRow, RequestRow
from pipeline.registry import EngineEntry
from pipeline.registry.deaths import EngineId
from pipeline.stages.ask import AskStage

STALL_PERIOD_S = 5.0
"""How often an actor looks whether its engine still writes tokens."""
LAST_WRITE_S = 10.0
"""How long an actor whose engine is dead may take to write what was answered."""


class EngineActor:
    """Owns one engine. A dead engine ends its process, which Ray replaces; an exception would end the run."""

    def __init__(self, job: Job, threads: int, registry: str) -> None:
        """`registry`: the name of the actor, because Ray restarts no actor whose arguments hold a handle that was lost."""
        cluster.exit_without_destructors()
        here = ray.get_runtime_context()
        self.registry = cast(Any, ray.get_actor(registry))
        self.id = EngineId(str(here.get_actor_id()), os.getpid())
        replaced: tuple[int, str] = ray.get(
            self.registry.begin_process.remote(self.id, here.get_node_id(), here.was_current_actor_reconstructed)
        )
        try:
            check_replacements(*replaced, most=job.sections.ray.max_restarts)
            self.engine = self.load(job, threads)
        except PipelineError as error:
            ray.get(self.registry.end_run.remote(str(error)))
            raise
        self.metrics = EngineMetrics(job.sections.name)
        self.quarantine = Quarantine(AskStage(job, self.engine), self.registry, self.id)
        self.under_way: dict[str, asyncio.Future[None]] = {}
        self.writer = AnswerWriter(Output(job.output), self.registry, self.id, self.count_load)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.used_s = time.monotonic()
        threading.Thread(target=self.watch_engine, args=(job.sections.model.stall_s,), daemon=True).start()
        ray.get(self.registry.add_engine.remote(EngineEntry(self.id, here.get_node_id(), here.current_actor)))

    def load(self, job: Job, threads: int) -> engines.Engine:
        return engines.load_engine(job, threads, on_gpu=bool(ray.get_runtime_context().get_accelerator_ids().get("GPU")))

    def count_load(self) -> int:
        """Return how many requests this engine has."""
        return len(self.under_way)

    async def answer(self, row: RequestRow, deaths: int = 0, reason: str = "") -> int:
        """Answer a request, which is written within seconds; return how many requests this engine has then.

        `deaths`: of engines with this request under way; `reason`: of the last one. A request that it has already, from a renderer that
        has died since, is not asked a second time. Raises RunError when the engine cannot go on for all requests.
        """
        self.loop = asyncio.get_running_loop()
        key = str(row["key"])
        if key not in self.writer.rows:
            if key not in self.under_way:
                self.under_way[key] = asyncio.ensure_future(self.answer_once(row, deaths, reason))
            await asyncio.shield(self.under_way[key])
        return self.count_load()

    async def answer_once(self, row: RequestRow, deaths: int, reason: str) -> None:
        """Answer a request and hand it to the writer."""
        self.metrics.add_waiting(1)
        answered: list[LedgerRow] = []
        try:
            answered = await self.quarantine.answer_rows(row, deaths, reason)
        except EngineDead as error:
            await self.end_process(str(error))
        finally:
            del self.under_way[str(row["key"])]
            if not answered:
                self.metrics.add_waiting(-1)
        if answered:
            self.used_s = time.monotonic()
            self.writer.add(answered, **self.metrics.record_answer(answered))

    async def flush(self) -> bool:
        """Write what is answered; return whether that was possible."""
        return await self.writer.flush()

    async def measure_idle_s(self) -> float:
        """Return for how long this engine has had no request; 0 while it has one."""
        return 0.0 if self.under_way else time.monotonic() - self.used_s

    async def end_process(self, reason: str) -> None:
        """End this process after it has said why and has written what is answered: a death that Ray replaces."""
        await self.registry.record_death.remote(self.id, reason)
        with suppress(Exception):
            await asyncio.wait_for(self.writer.flush(), LAST_WRITE_S)
        os._exit(1)

    def watch_engine(self, stall_s: float) -> None:
        """End this process once the engine has had requests and no token for this long: a GPU's driver or another process hangs."""
        while (silent_s := self.engine.measure_silence_s()) < stall_s:
            time.sleep(min(STALL_PERIOD_S, stall_s / 4))
        reason = f"no token for {silent_s:.0f} s with {self.count_load()} requests under way, `model.stall_s` is {stall_s:g}"
        if self.loop:
            ending = asyncio.run_coroutine_threadsafe(self.end_process(reason), self.loop)
            with suppress(Exception):
                ending.result(2 * LAST_WRITE_S)
        os._exit(1)  # the event loop hangs, too


def check_replacements(count: int, reason: str, *, most: int) -> None:
    """Raise RunError when engines have died more often than the job allows."""
    if count > most:
        raise RunError(f"an engine died for the {count}. time, `ray.max_restarts` is {most}: {reason}; the same command resumes the run")
