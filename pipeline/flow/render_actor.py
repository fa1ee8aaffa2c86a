"""Render actor: a step of a Ray Dataset that draws documents and sends each request, with its pages, straight to an engine actor.

One document is drawn at a time, in a thread; as many requests are under way as fit into a window of bytes. So a slow document or a long
answer holds back no other, and pages that no engine has room for are not drawn yet.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import ray
from ray.exceptions import RayActorError, RayError

from pipeline import cluster
from pipeline.errors import RunError
from pipeline.flow.engine_actor import STOPPED, exit_without_destructors
from pipeline.flow.metrics import RenderMetrics
from pipeline.flow.quarantine import EngineId
from pipeline.flow.registry import EngineEntry
from pipeline.records import SourceRow
from pipeline.stages.render import RenderPlan, RenderStage

POLL_S = 0.2
"""How often a renderer asks whether the trial is over, or how an engine died."""
DEATH_KNOWN_S = 30.0
"""How long it waits to know."""
REFRESH_S = 0.5
"""How often a renderer that waits for an engine asks which there are."""
REFRESH_IDLE_S = 5.0
"""The same, while it does not wait."""
RENDERED_SCHEMA = pa.schema([("documents", pa.int64())])
TRIAL_COLUMN = "is_trial"
"""Column of the documents that are asked before all others."""


@dataclass(frozen=True)
class SendLimits:
    """How much a renderer has under way."""

    window_bytes: int
    """Of pixels; one request at least."""
    requests_per_engine: int


class ByteWindow:
    """Bounds the bytes that are under way; anything may pass while nothing is."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes, self.used_bytes, self.condition = size_bytes, 0, threading.Condition()

    def acquire(self, amount_bytes: int) -> None:
        """Wait until there is room."""
        with self.condition:
            self.condition.wait_for(lambda: not self.used_bytes or self.used_bytes + amount_bytes <= self.size_bytes)
            self.used_bytes += amount_bytes

    def release(self, amount_bytes: int) -> None:
        """Give room back."""
        with self.condition:
            self.used_bytes -= amount_bytes
            self.condition.notify_all()


class EngineRouter:
    """Chooses for each request the engine with the fewest requests, on this machine if two have as few.

    What it knows of an engine's requests is what the engine said with its last answer and what was sent since.
    """

    def __init__(self, registry: Any, node: str, requests_per_engine: int) -> None:
        self.registry, self.node, self.most = registry, node, requests_per_engine
        self.entries: dict[EngineId, EngineEntry] = {}
        self.loads: dict[EngineId, int] = {}
        self.sent: dict[EngineId, int] = {}
        """Requests of this renderer that an engine has."""
        self.dead: set[EngineId] = set()
        self.changed, self.refreshing = asyncio.Condition(), asyncio.Lock()
        self.refreshed_s = float("-inf")

    async def choose_engine(self) -> EngineEntry:
        """Return an engine that has room, and count a request for it; wait until there is one."""
        while True:
            if time.monotonic() > self.refreshed_s + REFRESH_IDLE_S:
                await self.refresh(is_full=False)
            free = [engine for engine, load in self.loads.items() if load < self.most]
            if free:
                chosen = min(free, key=lambda engine: (self.loads[engine], self.entries[engine].node != self.node))
                self.loads[chosen] += 1
                self.sent[chosen] = self.sent.get(chosen, 0) + 1
                return self.entries[chosen]
            async with self.changed:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), REFRESH_S)
            if time.monotonic() > self.refreshed_s + REFRESH_S:
                await self.refresh(is_full=bool(self.loads))

    async def refresh(self, is_full: bool) -> None:
        """Ask which engines there are; one call at a time."""
        asked_s = time.monotonic()
        async with self.refreshing:
            if self.refreshed_s >= asked_s:
                return
            found = {entry.id: entry for entry in await self.registry.list_engines.remote(is_full) if entry.id not in self.dead}
            self.loads = {engine: self.loads[engine] if self.sent.get(engine) else entry.load for engine, entry in found.items()}
            self.entries, self.refreshed_s = found, time.monotonic()

    async def note_answer(self, engine: EngineId, load: int) -> None:
        """Take what an engine says of its requests."""
        async with self.changed:
            if engine in self.loads:
                self.loads[engine] = load
                self.sent[engine] -= 1
            self.changed.notify_all()

    def drop_engine(self, engine: EngineId) -> None:
        """Forget an engine whose process has died."""
        self.dead.add(engine)
        self.loads.pop(engine, None)
        self.sent.pop(engine, None)


class RenderActor:
    """Documents -> requests sent to engines. Returns when all that came of its documents is answered."""

    def __init__(self, plan: RenderPlan, registry: str, limits: SendLimits) -> None:
        """`registry`: the name of the actor, because Ray restarts no actor whose arguments hold a handle that was lost."""
        exit_without_destructors()
        self.registry = cast(Any, ray.get_actor(registry))
        self.metrics = RenderMetrics(plan.job)
        self.stage = RenderStage(plan, self.claim_requests)
        self.drawing = ThreadPoolExecutor(1, "draw")
        self.router = EngineRouter(self.registry, ray.get_runtime_context().get_node_id(), limits.requests_per_engine)
        self.window, self.is_open = ByteWindow(limits.window_bytes), False

    def claim_requests(self, document: SourceRow, keys: list[str]) -> dict[str, int]:
        """Return the requests that a document shall ask."""
        wanted: dict[str, int] = ray.get(self.registry.claim.remote(document, keys))
        return wanted

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        documents = batch.drop_columns([TRIAL_COLUMN]).to_pylist()
        while not batch[TRIAL_COLUMN][0].as_py() and not self.is_open:
            self.is_open = await self.registry.is_open.remote()
            await asyncio.sleep(0 if self.is_open else POLL_S)
        loop = asyncio.get_running_loop()
        sent: list[Future[None]] = await loop.run_in_executor(self.drawing, self.draw_documents, documents, loop)
        await asyncio.gather(*map(asyncio.wrap_future, sent))
        yield pa.table([[len(documents)]], schema=RENDERED_SCHEMA)

    def draw_documents(self, documents: list[SourceRow], loop: asyncio.AbstractEventLoop) -> list[Future[None]]:
        """Draw documents, and send each request as soon as the window has room for it; return what was sent."""
        sent = []
        for row in self.stage.render_documents(documents):
            self.metrics.add(row)
            size_bytes = sum(pixels.nbytes for pixels in row.get("pixels") or [])
            self.window.acquire(size_bytes)
            sent.append(asyncio.run_coroutine_threadsafe(self.send_request(ray.put(row), str(row["key"]), size_bytes), loop))
        return sent

    async def judge_death(self, engine: EngineId, key: str) -> tuple[bool, str]:
        """Return whether the death of an engine counts for a request that it had, and why it died.

        The next process of the actor tells of it, or its machine's end; where nothing does for a while, it counts for no request.
        """
        deadline = time.monotonic() + DEATH_KNOWN_S
        while time.monotonic() < deadline:
            if judged := await self.registry.judge_death.remote(engine, key):
                return cast(tuple[bool, str], judged)
            await asyncio.sleep(POLL_S)
        return False, ""

    async def send_request(self, row: Any, key: str, size_bytes: int) -> None:
        """Send a request, a reference to its row, until an engine has answered it."""
        deaths, reason = 0, ""
        try:
            while True:
                engine = await self.router.choose_engine()
                try:
                    load = await engine.handle.answer.remote(row, deaths, reason)
                    await self.router.note_answer(engine.id, load)
                    return
                except RayActorError:
                    self.router.drop_engine(engine.id)
                    counts, why = await self.judge_death(engine.id, key)
                    deaths, reason = (deaths + 1, why) if counts else (deaths, reason)
        except (RayError, RunError) as error:
            await self.registry.end_run.remote(str(cluster.convert_worker_error(error, STOPPED)))
        finally:
            self.window.release(size_bytes)
