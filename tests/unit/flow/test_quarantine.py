"""Requests of one engine actor: side by side as a rule, alone after two deaths of an engine, not at all after three."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from pipeline.errors import DocumentError
from pipeline.flow.quarantine import DeathRecord, Quarantine
from pipeline.records import Completion, Request
from pipeline.stages.ask import AskStage
from tests.support.engines import ScriptedEngine, make_completion
from tests.support.stages import Row
from tests.support.workspace import Workspace

SIZE = {"page_no": 1, "width_px": 28, "height_px": 28, "dpi": 200.0, "visual_tokens": 1, "warnings": []}
REQUEST: Row = {"source": "a.pdf", "attempt": 1, "first_page": 1, "last_page": 1, "page_count": 1, "pages": [SIZE], "pixels": [bytes(2352)]}


class Method:
    """A method of an actor, called in this process."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def remote(self, *arguments: Any) -> Any:
        outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        outcome.set_result(self.method(*arguments))
        return outcome


class Registry:
    """The registry's part that a quarantine calls."""

    def __init__(self) -> None:
        self.record = DeathRecord()
        self.begin_requests, self.begin_alone, self.end_request = map(Method, (self.record.begin, self.record.begin_alone, self.record.end))


def answer(workspace: Workspace, engine: ScriptedEngine, registry: Registry, *keys: str) -> list[Row]:
    async def gather() -> list[Row]:
        quarantine = Quarantine(AskStage(workspace.job(), engine), registry, "actor")
        return [row async for row in quarantine.answer_rows([REQUEST | {"key": key} for key in keys])]

    return asyncio.run(asyncio.wait_for(gather(), 60))


class CountingEngine(ScriptedEngine):
    """Notes how many requests it has beside each, and lets the others come in between."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.beside: dict[str, int] = {}

    async def complete(self, request: Request) -> Completion:
        self.inside += 1
        for _ in range(20):
            await asyncio.sleep(0)
            self.beside[request.key] = max(self.beside.get(request.key, 0), self.inside - 1)
        self.inside -= 1
        return make_completion()


# --- answering


def test_requests_of_a_batch_are_under_way_together(workspace: Workspace) -> None:
    engine = CountingEngine()
    answer(workspace, engine, Registry(), "k1", "k2", "k3")
    assert engine.beside == {"k1": 2, "k2": 2, "k3": 2}


def test_rows_come_in_the_order_they_were_given_whatever_is_answered_first(workspace: Workspace) -> None:
    """A batch that is asked again, because its actor died, must have the same rows at the same places: Ray drops those it has."""

    class Backwards(ScriptedEngine):
        async def complete(self, request: Request) -> Any:
            for _ in range(3 - int(request.key[1:])):
                await asyncio.sleep(0)
            self.requests.append(request)
            return make_completion()

    engine = Backwards()
    assert [row["key"] for row in answer(workspace, engine, Registry(), "k1", "k2", "k3")] == ["k1", "k2", "k3"]
    assert [request.key for request in engine.requests] == ["k3", "k2", "k1"]


def test_an_engine_that_fails_on_one_request_costs_that_one_alone(workspace: Workspace) -> None:
    def stumble_over_k2(request: Request) -> Completion:
        if request.key == "k2":
            raise DocumentError("engine", "the engine failed on this request")
        return make_completion()

    rows = answer(workspace, ScriptedEngine(stumble_over_k2), Registry(), "k1", "k2", "k3")
    assert {row["key"]: row["status"] for row in rows} == {"k1": "extracted", "k2": "failed", "k3": "extracted"}


def test_a_request_at_two_deaths_is_asked_alone_and_the_others_beside_each_other(workspace: Workspace) -> None:
    registry, engine = Registry(), CountingEngine()
    registry.record.deaths = {"k2": (2, "gone"), "k1": (1, "gone")}
    rows = answer(workspace, engine, registry, "k1", "k2", "k3", "k4")
    assert [row["status"] for row in rows] == ["extracted"] * 4
    assert engine.beside == {"k1": 0, "k2": 0, "k3": 1, "k4": 1}  # k2 goes before those that come after it
    assert registry.record.alone == {}


def test_a_request_at_three_deaths_is_not_asked(workspace: Workspace) -> None:
    registry, engine = Registry(), CountingEngine()
    registry.record.deaths = {"k2": (3, "CUDA error: device-side assert")}
    rows = answer(workspace, engine, registry, "k1", "k2")
    assert "k2" not in engine.beside
    assert (rows[1]["status"], rows[1]["model"]) == ("failed", "script-1")
    assert rows[1]["failure"] == {
        "stage": "generate",
        "kind": "engine_died",
        "message": "the engine died 3 times with this request, the last time with no other: CUDA error: device-side assert",
    }


def test_a_row_that_failed_before_it_was_asked_is_not_under_way(workspace: Workspace) -> None:
    registry = Registry()

    async def gather() -> list[Row]:
        quarantine = Quarantine(AskStage(workspace.job(), ScriptedEngine()), registry, "actor")
        failed = REQUEST | {"key": "k1", "status": "failed", "failure": {"stage": "render", "kind": "broken", "message": "no page"}}
        return [row async for row in quarantine.answer_rows([failed])]

    assert asyncio.run(gather())[0]["failure"]["kind"] == "broken"
    assert registry.record.under_way == {"actor": set()}


# --- who is to blame


def test_the_requests_under_way_at_a_death_are_suspects_and_the_answered_ones_are_not() -> None:
    record = DeathRecord()
    for _ in range(2):
        assert record.begin("a", ["k1", "k2"]) == {}
        record.begin("b", ["k3"])
        record.end("a", "k1")
        record.record_death("a", "gone")
    assert record.begin("a", ["k1", "k2", "k3"]) == {"k2": (2, "gone")}


def test_a_death_with_no_last_words_is_counted_when_the_engine_is_replaced() -> None:
    record = DeathRecord()
    record.begin("a", ["k1"])
    assert record.count_replacement("a") == (1, "its process ended without a message")
    record.begin("a", ["k1"])
    record.record_death("a", "out of memory")
    assert record.count_replacement("a") == (2, "out of memory")
    assert record.deaths == {"k1": (2, "out of memory")}


def test_requests_that_wait_for_one_that_is_alone_are_not_to_blame() -> None:
    record = DeathRecord()
    record.deaths = {"k1": (2, "gone")}
    assert record.begin("a", ["k1", "k2"]) == {"k1": (2, "gone")}
    record.begin_alone("a", "k1")
    record.record_death("a", "gone again")
    assert record.deaths == {"k1": (3, "gone again")}


def kill_alone(record: DeathRecord, key: str) -> int:
    """Let an engine die of a suspect; return how many replacements count."""
    record.deaths[key] = (2, "gone")
    record.begin_alone("a", key)
    record.record_death("a", "gone")
    return record.count_replacement("a")[0]


def test_the_death_of_a_request_that_is_alone_is_not_the_engines_failure() -> None:
    record = DeathRecord()
    for n in range(5):
        assert kill_alone(record, f"k{n}") == 0
        record.end("a", "another")


def test_an_engine_that_dies_of_every_request_is_broken() -> None:
    record = DeathRecord()
    assert [kill_alone(record, f"k{n}") for n in range(5)] == [0, 0, 0, 1, 2]
