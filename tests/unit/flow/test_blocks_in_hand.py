"""Blocks that a renderer has in hand: none is kept by a long answer that others need its place for, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pipeline.flow.render_actor import Block, BlocksInHand

LONG = "long"


class Renderer:
    """Is given a block when it has room for one, draws it at once, and has its requests answered when a test says so."""

    def __init__(self, most: int) -> None:
        self.hand = BlocksInHand(most)
        self.places = asyncio.Semaphore(most)
        self.returned: list[int] = []
        self.open: dict[tuple[int, str], Block] = {}

    async def take(self, number: int, requests: list[str], is_trial: bool = False) -> None:
        async with self.places:
            self.hand.blocks.append(block := Block(is_trial))
            for request in requests:
                block.unanswered += 1
                self.open[number, request] = block
            await self.hand.await_return(block)
            self.returned.append(number)

    async def answer(self, *requests: tuple[int, str]) -> None:
        for request in requests:
            await self.hand.end_request(self.open.pop(request), None)
        await settle()

    async def answer_short_ones(self) -> None:
        while short := [request for request in self.open if request[1] != LONG]:
            await self.answer(*short)


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def work(most: int, work: Callable[[Renderer], Awaitable[Any]]) -> Any:
    async def begin() -> Any:
        return await work(Renderer(most))

    return asyncio.run(asyncio.wait_for(begin(), 60))


def test_a_block_is_returned_when_its_requests_are_answered() -> None:
    async def act(renderer: Renderer) -> None:
        taking = [asyncio.ensure_future(renderer.take(number, ["a", "b"])) for number in range(2)]
        await settle()
        await renderer.answer((0, "a"), (1, "a"), (1, "b"))
        assert renderer.returned == [1]
        await renderer.answer((0, "b"))
        await asyncio.gather(*taking)

    work(3, act)


def test_long_answers_keep_no_document_from_being_drawn() -> None:
    """In every block one answer is twenty times as long: all others are answered before the first of these."""

    async def act(renderer: Renderer) -> None:
        taking = [asyncio.ensure_future(renderer.take(number, [LONG, *"abc"])) for number in range(30)]
        await settle()
        await renderer.answer_short_ones()
        assert len(renderer.open) == 30  # all long ones, and nothing else is left
        assert len(renderer.returned) >= 30 - 3
        await renderer.answer(*list(renderer.open))
        await asyncio.gather(*taking)
        assert sorted(renderer.returned) == list(range(30))

    work(3, act)


def test_the_last_block_is_returned_when_nothing_is_under_way() -> None:
    async def act(renderer: Renderer) -> None:
        taking = [asyncio.ensure_future(renderer.take(number, [LONG])) for number in range(3)]
        await settle()
        assert renderer.returned == [0, 1][: len(renderer.returned)]
        passed_on = [number for number in range(3) if number in renderer.returned]
        held = [number for number in range(3) if number not in renderer.returned]
        await renderer.answer(*((number, LONG) for number in held))
        assert len(renderer.returned) == 2
        await renderer.answer(*((number, LONG) for number in passed_on))
        await asyncio.gather(*taking)

    work(2, act)


def test_a_block_of_the_trial_is_returned_answered() -> None:
    async def act(renderer: Renderer) -> None:
        taking = [asyncio.ensure_future(renderer.take(number, [LONG], is_trial=True)) for number in range(2)]
        await settle()
        assert renderer.returned == []
        await renderer.answer((0, LONG), (1, LONG))
        await asyncio.gather(*taking)

    work(2, act)


def test_blocks_that_are_not_drawn_keep_the_others_in_hand() -> None:
    async def act(renderer: Renderer) -> None:
        renderer.hand.blocks.append(Block(is_trial=False))
        taking = asyncio.ensure_future(renderer.take(0, [LONG]))
        await settle()
        assert renderer.returned == []
        await renderer.answer((0, LONG))
        await taking

    work(2, act)


def test_an_error_is_raised_where_blocks_wait() -> None:
    async def act(renderer: Renderer) -> None:
        taking = asyncio.ensure_future(renderer.take(0, ["a"]))
        await settle()
        await renderer.hand.end_request(renderer.open.pop((0, "a")), ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            await taking

    work(2, act)
