"""Router of a renderer: the engine with the fewest requests, and a queue where all have as many as they take."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pipeline.flow import engine_router
from pipeline.flow.engine_router import EngineRouter
from pipeline.output.key_set import KeySet
from pipeline.registry import EngineEntry, RequestRegistry
from pipeline.registry.deaths import EngineId
from tests.support.ray_actors import LocalActor

HERE, THERE = EngineId("a", 1), EngineId("b", 2)


def route(most: int, work: Callable[[EngineRouter, RequestRegistry], Awaitable[Any]]) -> Any:
    """Let a renderer of the node `here` work, with an engine here and one there that take so many requests."""

    async def begin() -> Any:
        registry = RequestRegistry(lambda node: True)
        registry.begin_round(KeySet(), {}, True)
        for engine, node in ((THERE, "there"), (HERE, "here")):
            registry.begin_process(engine, node, False)
            registry.add_engine(EngineEntry(engine, node, None))
        return await work(EngineRouter(LocalActor(registry), "here", most), registry)

    return asyncio.run(asyncio.wait_for(begin(), 60))


def test_engines_get_as_many_requests_each_and_the_near_one_the_first() -> None:
    async def work(router: EngineRouter, registry: RequestRegistry) -> list[EngineId]:
        return [(await router.choose_engine()).id for _ in range(5)]

    assert route(9, work) == [HERE, THERE, HERE, THERE, HERE]


def test_requests_that_wait_are_served_in_their_order_as_answers_come() -> None:
    async def work(router: EngineRouter, registry: RequestRegistry) -> list[int]:
        served: list[int] = []

        async def ask(number: int) -> None:
            await router.choose_engine()
            served.append(number)

        asking = [asyncio.ensure_future(ask(number)) for number in range(6)]
        await asyncio.sleep(0.01)
        assert served == [0, 1, 2, 3]
        router.note_answer(HERE, 1)
        router.note_answer(THERE, 1)
        await asyncio.gather(*asking)
        return served

    assert route(2, work) == [0, 1, 2, 3, 4, 5]


def test_requests_that_wait_find_an_engine_that_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_router, "REFRESH_S", 0.01)
    monkeypatch.setattr(engine_router, "REFRESH_FULL_S", 0.01)

    async def work(router: EngineRouter, registry: RequestRegistry) -> Counter[EngineId]:
        asking = [asyncio.ensure_future(router.choose_engine()) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert registry.take_news().is_full
        registry.add_engine(EngineEntry(EngineId("c", 3), "there", None))
        return Counter(entry.id for entry in await asyncio.gather(*asking))

    assert route(1, work) == {HERE: 1, THERE: 1, EngineId("c", 3): 1}


def test_a_dead_engine_is_not_chosen_again() -> None:
    async def work(router: EngineRouter, registry: RequestRegistry) -> list[EngineId]:
        await router.choose_engine()
        router.drop_engine(HERE)
        await router.refresh(is_full=False)
        return [(await router.choose_engine()).id for _ in range(3)]

    assert route(9, work) == [THERE] * 3


def test_many_renderers_that_know_the_same_choose_each_their_own() -> None:
    async def work(router: EngineRouter, registry: RequestRegistry) -> int:
        for number in range(20):
            registry.add_engine(EngineEntry(EngineId(f"e{number}", 1), "there", None))
        routers = [EngineRouter(LocalActor(registry), "elsewhere", 9) for _ in range(20)]
        return len({(await one.choose_engine()).id for one in routers})

    assert route(9, work) > 5
