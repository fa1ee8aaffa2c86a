"""Render actor: a step of a Ray Dataset that draws documents and sends each request, with its pages, straight to an engine actor.

One document is drawn at a time, of a few blocks in turns; as many requests are under way as fit into a window of bytes. So a document that
is slow to come or a long answer holds back no other block, and pages that no engine has room for are not drawn yet.

    block of documents -> drawn, claimed -> sent to an engine -> answered -> the block goes back to Ray Data
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import ray
from ray.exceptions import RayActorError, RayError

from pipeline import cluster
from pipeline.errors import RunError
from pipeline.flow.claims import ClaimBatcher
from pipeline.flow.engine_router import EngineRouter
from pipeline.flow.metrics import RenderMetrics
from pipeline.records import SourceRow
from pipeline.registry.deaths import EngineId
from pipeline.stages.render import DrawnRequest, RenderPlan, RenderStage

BLOCKS_AT_ONCE = 3
"""Blocks whose documents are drawn in turns: one that is slow to come holds up those behind it in its own block alone.

The files of three documents of each block are in memory at most: one is drawn, and two are read ahead.
"""
POLL_S = 0.2
"""How often a renderer asks whether the trial is over, or how an engine died."""
DEATH_KNOWN_S = 30.0
"""How long it waits to know."""
RENDERED_SCHEMA = pa.schema([("documents", pa.int64())])
TRIAL_COLUMN = "is_trial"
"""Column of the documents that are asked before all others."""


@dataclass(frozen=True)
class SendLimits:
    """How much a renderer has under way."""

    window_bytes: int
    """Of pixels; one request at least."""
    requests_per_engine: int
    blocks: int
    """Blocks of documents that it has in hand."""


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


class Block:
    """Documents that a renderer was given together."""

    def __init__(self, is_trial: bool) -> None:
        self.is_trial, self.is_drawn, self.is_returned, self.unanswered = is_trial, False, False, 0


class BlocksInHand:
    """The blocks that a renderer has not returned.

    One is returned when all its requests are answered. Where every block in hand waits for long answers and none is left to draw, the one
    that waits for the fewest is returned before: the others wait for its requests, too, so that the last block of a renderer is returned
    when nothing is under way. What is lost if the renderer dies then is asked in the next round.
    """

    def __init__(self, most: int) -> None:
        self.most, self.blocks, self.condition = most, list[Block](), asyncio.Condition()
        self.passed_on = 0
        """Requests under way of blocks that have been returned."""
        self.error: BaseException | None = None

    def may_return(self, block: Block) -> bool:
        """Say whether a drawn block may be returned now."""
        if self.error:
            return True
        if not block.unanswered:
            return len(self.blocks) > 1 or not self.passed_on
        if block.is_trial or len(self.blocks) < self.most or not all(one.is_drawn for one in self.blocks):
            return False
        return block is min((one for one in self.blocks if not one.is_trial), key=lambda one: one.unanswered)

    async def await_return(self, block: Block) -> None:
        """Wait until a block may be returned. Raises what ended a request without an answer."""
        async with self.condition:
            block.is_drawn = True
            self.condition.notify_all()
            await self.condition.wait_for(lambda: self.may_return(block))
            self.drop_block(block)
            self.condition.notify_all()
        if self.error:
            raise self.error

    def drop_block(self, block: Block) -> None:
        """Take a block out of hand."""
        self.blocks.remove(block)
        block.is_returned = True
        self.passed_on += block.unanswered

    async def end_request(self, block: Block, error: BaseException | None) -> None:
        """Count a request that has been answered, or has ended by an error."""
        async with self.condition:
            self.error = self.error or error
            block.unanswered -= 1
            self.passed_on -= block.is_returned
            if self.error or not block.unanswered or not self.passed_on:
                self.condition.notify_all()


class RenderActor:
    """Documents -> requests sent to engines. Returns when all that came of its documents is answered."""

    def __init__(self, plan: RenderPlan, registry: str, limits: SendLimits) -> None:
        """`registry`: the name of the actor, because Ray restarts no actor whose arguments hold a handle that was lost."""
        cluster.exit_without_destructors()
        self.registry = cast(Any, ray.get_actor(registry))
        self.metrics = RenderMetrics(plan.job)
        self.stage = RenderStage(plan, self.claim_requests)
        self.drawing = ThreadPoolExecutor(BLOCKS_AT_ONCE, "draw")
        self.router = EngineRouter(self.registry, ray.get_runtime_context().get_node_id(), limits.requests_per_engine)
        self.window, self.claims, self.blocks = ByteWindow(limits.window_bytes), ClaimBatcher(self.registry), BlocksInHand(limits.blocks)
        self.is_open, self.opening = False, asyncio.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None

    def claim_requests(self, document: SourceRow, keys: list[str]) -> Future[dict[str, int]]:
        """Return the requests that a document shall ask, once they are known. Called in the thread that draws."""
        return asyncio.run_coroutine_threadsafe(self.claims.claim(document, keys), cast(asyncio.AbstractEventLoop, self.loop))

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        self.loop = asyncio.get_running_loop()
        block = Block(is_trial=batch[TRIAL_COLUMN][0].as_py())
        if not block.is_trial:
            await self.await_trial()
        documents = batch.drop_columns([TRIAL_COLUMN]).to_pylist()
        self.blocks.blocks.append(block)
        try:
            await self.loop.run_in_executor(self.drawing, self.draw_documents, documents, block)
        except BaseException:
            self.blocks.drop_block(block)
            raise
        await self.blocks.await_return(block)
        yield pa.table([[len(documents)]], schema=RENDERED_SCHEMA)

    async def await_trial(self) -> None:
        """Wait until the first documents have proven good, or there is no such trial."""
        async with self.opening:
            while not self.is_open:
                self.is_open = await self.registry.is_open.remote()
                await asyncio.sleep(0 if self.is_open else POLL_S)

    def draw_documents(self, documents: list[SourceRow], block: Block) -> None:
        """Draw the documents of a block, and send each request as soon as the window has room for it."""
        for drawn in self.stage.render_documents(documents):
            self.metrics.add(drawn.row)
            size_bytes = sum(pixels.nbytes for pixels in drawn.row.get("pixels") or [])
            self.window.acquire(size_bytes)
            asyncio.run_coroutine_threadsafe(self.ask_request(drawn, size_bytes, block), cast(asyncio.AbstractEventLoop, self.loop))

    async def ask_request(self, drawn: DrawnRequest, size_bytes: int, block: Block) -> None:
        """Have a request answered if it is wanted. Counts it for its block before anything else, and so before the block is drawn."""
        block.unanswered += 1
        failure: BaseException | None = None
        try:
            attempt = (await asyncio.wrap_future(drawn.claimed)).get(str(drawn.row["key"]))
            if attempt:
                drawn.row["attempt"] = attempt
                row = await asyncio.to_thread(ray.put, drawn.row)
                drawn.row.pop("pixels", None)  # they are in the object store
                await self.send_request(row, str(drawn.row["key"]))
        except (RayError, RunError) as error:
            await self.registry.end_run.remote(str(cluster.convert_worker_error(error, cluster.STOPPED)))
        except BaseException as error:
            failure = error
        finally:
            self.window.release(size_bytes)
            await self.blocks.end_request(block, failure)

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

    async def send_request(self, row: Any, key: str) -> None:
        """Send a request, a reference to its row, until an engine has answered it."""
        deaths, reason = 0, ""
        while True:
            engine = await self.router.choose_engine()
            try:
                load = await engine.handle.answer.remote(row, deaths, reason)
                self.router.note_answer(engine.id, load)
                return
            except RayActorError:
                self.router.drop_engine(engine.id)
                counts, why = await self.judge_death(engine.id, key)
                deaths, reason = (deaths + 1, why) if counts else (deaths, reason)
