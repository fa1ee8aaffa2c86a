"""Quarantine of an engine actor: asks requests side by side, and one that may have killed an engine alone.

Which requests were under way when an engine died is known to the registry (`ask_pass.RequestRegistry`):

    1 death     asked again beside others: it may have been any of them
    2 deaths    asked alone: no other request is under way in this engine
    3 deaths    not asked again: it is a row with the failure generate/engine_died, and the run goes on
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from pipeline.errors import DocumentError
from pipeline.records import LedgerRow, RequestRow, Stage
from pipeline.stages.ask import AskStage
from pipeline.stages.requests import make_failed_row

SUSPECT_DEATHS, MAX_DEATHS = 2, 3


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
    """Answers rows for one engine actor."""

    def __init__(self, stage: AskStage, registry: Any, actor: str) -> None:
        """`actor` is the actor's id, which it keeps when its process is replaced."""
        self.stage, self.registry, self.actor, self.turnstile = stage, registry, actor, Turnstile()

    async def answer_rows(self, rows: Sequence[RequestRow]) -> AsyncIterator[LedgerRow]:
        """Yield each row answered, in the order of the rows. Raises EngineDead."""
        suspects = await self.registry.begin_requests.remote(self.actor, [row["key"] for row in rows if not row.get("failure")])
        for answered in [asyncio.ensure_future(self.answer_row(row, suspects)) for row in rows]:
            yield await answered

    async def answer_row(self, row: RequestRow, suspects: dict[str, tuple[int, str]]) -> LedgerRow:
        """Return a row with its answer. `suspects`: deaths of engines with a request, at least two, and why the last one ended."""
        if row.get("failure"):
            return await self.stage.answer_row(row)
        key = str(row["key"])
        deaths, reason = suspects.get(key, (0, ""))
        if deaths >= MAX_DEATHS:
            message = f"the engine died {deaths} times with this request, the last time with no other: {reason}"
            failure = make_failed_row(Stage.GENERATE, DocumentError("engine_died", message))
            return await self.stage.answer_row({**row, **failure})
        async with self.turnstile.enter(alone=deaths >= SUSPECT_DEATHS):
            if deaths >= SUSPECT_DEATHS:
                await self.registry.begin_alone.remote(self.actor, key)
            answered = await self.stage.answer_row(row)
        self.registry.end_request.remote(self.actor, key)
        return answered


class DeathRecord:
    """Which requests are under way in which engine, and at how many deaths of engines each was."""

    MAX_PARDONS = 3
    """Deaths of requests asked alone that do not count as failures of the engine, as long as no request is answered in between: an engine
    that dies of every request is broken itself."""

    def __init__(self) -> None:
        self.under_way: dict[str, set[str]] = {}
        self.alone: dict[str, str] = {}
        """The request that an engine has with no other; those that wait for it to end are under way, but not to blame."""
        self.deaths: dict[str, tuple[int, str]] = {}
        self.pardons, self.unused_pardons, self.replaced = 0, 0, 0
        self.reason = "its process ended without a message"

    def begin(self, actor: str, keys: Sequence[str]) -> dict[str, tuple[int, str]]:
        """Note requests as under way, but for those at two deaths or more; return these."""
        suspects = {key: self.deaths[key] for key in keys if self.deaths.get(key, (0, ""))[0] >= SUSPECT_DEATHS}
        self.under_way.setdefault(actor, set()).update(key for key in keys if key not in suspects)
        return suspects

    def begin_alone(self, actor: str, key: str) -> None:
        """Note that a request is asked with no other."""
        self.alone[actor] = key

    def end(self, actor: str, key: str) -> None:
        """Note that a request is answered."""
        self.under_way.get(actor, set()).discard(key)
        if self.alone.get(actor) == key:
            del self.alone[actor]
        self.pardons = 0

    def record_death(self, actor: str, reason: str) -> None:
        """Count the death of an engine for the requests that it had."""
        self.reason = reason
        had, alone = self.under_way.pop(actor, set()), self.alone.pop(actor, None)
        for key in [alone] if alone else had:
            deaths = self.deaths.get(key, (0, ""))[0] + 1
            self.deaths[key] = deaths, reason
            if deaths == MAX_DEATHS and self.pardons < self.MAX_PARDONS:
                self.pardons, self.unused_pardons = self.pardons + 1, self.unused_pardons + 1

    def count_replacement(self, actor: str) -> tuple[int, str]:
        """Count an engine that replaces a dead one; return how many there were, pardoned ones left out, and why the last one ended."""
        if self.under_way.get(actor) or actor in self.alone:  # it had no time to say that it dies
            self.record_death(actor, "its process ended without a message")
        if self.unused_pardons:
            self.unused_pardons -= 1
        else:
            self.replaced += 1
        return self.replaced, self.reason
