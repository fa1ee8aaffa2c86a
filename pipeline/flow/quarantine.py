"""Quarantine: a request that may have killed an engine is asked alone, and one that has killed three is not asked again.

A request that was under way when its engine died goes back to the renderer that has its pages, which counts the deaths:

    1 death     asked again beside others: it may have been any of them
    2 deaths    asked alone: no other request is under way in that engine
    3 deaths    not asked again: it is a row with the failure generate/engine_died, and the run goes on
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from pipeline.errors import DocumentError
from pipeline.records import LedgerRow, RequestRow, Stage
from pipeline.stages.ask import AskStage
from pipeline.stages.requests import make_failed_row

SUSPECT_DEATHS, MAX_DEATHS = 2, 3
WITHOUT_REASON = "its process ended without a message"


class EngineId(NamedTuple):
    """One process of an engine actor, which keeps its actor's id when it is replaced."""

    actor: str
    pid: int


class Turnstile:
    """Lets through any number of requests side by side, or one alone."""

    def __init__(self) -> None:
        self.condition, self.inside, self.is_alone, self.waiting_alone = asyncio.Condition(), 0, False, 0

    @asynccontextmanager
    async def enter(self, alone: bool) -> AsyncIterator[None]:
        """Wait until nothing forbids entering. One that enters alone goes before those side by side that come later."""
        async with self.condition:
            self.waiting_alone += alone
            await self.condition.wait_for(lambda: not self.is_alone and not (self.inside if alone else self.waiting_alone))
            self.waiting_alone -= alone
            self.inside, self.is_alone = self.inside + 1, alone
        try:
            yield
        finally:
            async with self.condition:
                self.inside, self.is_alone = self.inside - 1, False
                self.condition.notify_all()


class Quarantine:
    """Asks the requests of one engine: side by side, or alone."""

    def __init__(self, stage: AskStage, registry: Any, engine: EngineId) -> None:
        self.stage, self.registry, self.engine, self.turnstile = stage, registry, engine, Turnstile()

    async def answer_rows(self, row: RequestRow, deaths: int, reason: str) -> list[LedgerRow]:
        """Return a row with its answer, and those that asked again for the fields of broken rules, which one asked alone does not.

        `deaths`: of engines that had this request; `reason`: of the last one. Raises EngineDead.
        """
        if deaths >= MAX_DEATHS:
            message = f"the engine died {deaths} times with this request, the last time with no other: {reason}"
            failed = make_failed_row(Stage.GENERATE, DocumentError("engine_died", message))
            row = {**row, "status": failed["status"], "failure": failed["failure"]}
        if row.get("failure"):
            return [await self.stage.answer_row(row)]
        is_alone = deaths >= SUSPECT_DEATHS
        async with self.turnstile.enter(is_alone):
            if is_alone:
                await self.registry.begin_alone.remote(self.engine, row["key"])
            answered = [await self.stage.answer_row(row)] if is_alone else await self.stage.answer_rows(row)
            if is_alone:
                await self.registry.end_alone.remote(self.engine)
        return answered


class DeathRecord:
    """How engines died, and how often: the deaths of requests asked alone do not count against the engine."""

    MAX_PARDONS = 3
    """Deaths of requests asked alone that do not count, as long as no request is answered in between: an engine that dies of every
    request is broken itself."""

    def __init__(self) -> None:
        self.alone: dict[EngineId, str] = {}
        """The request that an engine has with no other; those that wait for it to end are under way, but not to blame."""
        self.reasons: dict[EngineId, str | None] = {}
        """Why engines died; None for an end that counts for no request."""
        self.pardons, self.replaced, self.last_reason = 0, 0, WITHOUT_REASON

    def begin_alone(self, engine: EngineId, key: str) -> None:
        """Note that a request is asked with no other."""
        self.alone[engine] = key

    def end_alone(self, engine: EngineId) -> None:
        """Note that this request is answered."""
        self.alone.pop(engine, None)

    def record_death(self, engine: EngineId, reason: str) -> None:
        """Keep why an engine died."""
        self.reasons.setdefault(engine, reason)

    def forget(self, engine: EngineId) -> None:
        """Note the end of a process that counts for no request: its machine has gone, or it had nothing to do."""
        self.reasons.setdefault(engine, None)

    def is_known(self, engine: EngineId) -> bool:
        """Say whether it is known how an engine died."""
        return engine in self.reasons

    def judge(self, engine: EngineId, key: str) -> tuple[bool, str]:
        """Return whether the death of an engine counts for a request that it had, and why it died."""
        reason = self.reasons.get(engine)
        return reason is not None and self.alone.get(engine, key) == key, reason or ""

    def count_replacement(self, dead: EngineId) -> tuple[int, str]:
        """Count an engine that replaces a dead one; return how many there were, pardoned ones left out, and why the last one died."""
        self.record_death(dead, WITHOUT_REASON)
        self.last_reason = self.reasons[dead] or self.last_reason
        if dead in self.alone and self.pardons < self.MAX_PARDONS:
            self.pardons += 1
        else:
            self.replaced += 1
        return self.replaced, self.last_reason

    def pardon_again(self) -> None:
        """Note that requests were answered."""
        self.pardons = 0
