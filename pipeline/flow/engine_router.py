"""Router of a renderer: requests -> the engine that each is sent to, or a place in the queue until one has room."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from typing import Any

from pipeline.registry import EngineEntry, EngineList
from pipeline.registry.deaths import EngineId

REFRESH_S = 0.5
"""How often a renderer whose requests wait for an engine, and that has none under way, asks which engines there are."""
REFRESH_FULL_S = 2.0
"""The same, while answers to its own requests will tell of room."""
REFRESH_IDLE_S = 5.0
"""The same, while no request waits."""


class EngineRouter:
    """Chooses for each request the engine with the fewest requests, on this machine if two have as few.

    What it knows of an engine's requests is what the engine said with its last answer and what was sent since. Requests that wait are
    served in their order. Used on one event loop.
    """

    def __init__(self, registry: Any, node: str, requests_per_engine: int) -> None:
        self.registry, self.node, self.most = registry, node, requests_per_engine
        self.entries: dict[EngineId, EngineEntry] = {}
        self.loads: dict[EngineId, int] = {}
        self.sent: dict[EngineId, int] = {}
        """Requests of this renderer that an engine has."""
        self.dead: set[EngineId] = set()
        self.waiting: deque[asyncio.Future[EngineEntry]] = deque()
        self.refreshing = asyncio.Lock()
        self.refresher: asyncio.Task[None] | None = None
        self.list_number, self.refreshed_s = 0, float("-inf")

    async def choose_engine(self) -> EngineEntry:
        """Return an engine that has room, and count a request for it; wait until there is one."""
        if time.monotonic() > self.refreshed_s + REFRESH_IDLE_S:
            await self.refresh(is_full=False)
        if not self.waiting and (chosen := self.take_place()):
            return chosen
        place: asyncio.Future[EngineEntry] = asyncio.get_running_loop().create_future()
        self.waiting.append(place)
        if self.refresher is None or self.refresher.done():
            self.refresher = asyncio.ensure_future(self.refresh_while_waiting())
        return await place

    def take_place(self) -> EngineEntry | None:
        """Return an engine that has room, and count a request for it; None if there is none."""
        free = [engine for engine, load in self.loads.items() if load < self.most]
        if not free:
            return None
        # at random among equals: many renderers that know as little as this one choose at the same time
        chosen = min(free, key=lambda engine: (self.loads[engine], self.entries[engine].node != self.node, random.random()))
        self.loads[chosen] += 1
        self.sent[chosen] = self.sent.get(chosen, 0) + 1
        return self.entries[chosen]

    def serve_waiting(self) -> None:
        """Give the requests that wait the places that there are."""
        while self.waiting and (chosen := self.take_place()):
            self.waiting.popleft().set_result(chosen)

    async def refresh_while_waiting(self) -> None:
        """Look for engines as long as requests wait."""
        while self.waiting:
            await asyncio.sleep(REFRESH_FULL_S if any(self.sent.values()) else REFRESH_S)
            if self.waiting:
                await self.refresh(is_full=bool(self.loads))

    async def refresh(self, is_full: bool) -> None:
        """Ask which engines there are; one call at a time."""
        asked_s = time.monotonic()
        async with self.refreshing:
            if self.refreshed_s >= asked_s:
                return
            found: EngineList = await self.registry.list_engines.remote(self.list_number, is_full)
            if found.ids is not None:
                known = self.entries | {entry.id: entry for entry in found.added}
                self.entries, self.list_number = {engine: known[engine] for engine in found.ids}, found.number
            for engine, load in zip(self.entries, found.loads, strict=True):
                if not self.sent.get(engine):
                    self.loads[engine] = load
            self.loads = {engine: self.loads[engine] for engine in self.entries if engine not in self.dead}
            self.refreshed_s = time.monotonic()
        self.serve_waiting()

    def note_answer(self, engine: EngineId, load: int) -> None:
        """Take what an engine says of its requests."""
        if engine in self.loads:
            self.loads[engine] = load
            self.sent[engine] -= 1
        self.serve_waiting()

    def drop_engine(self, engine: EngineId) -> None:
        """Forget an engine whose process has died."""
        self.dead.add(engine)
        self.loads.pop(engine, None)
        self.sent.pop(engine, None)
