"""Requests of one engine: side by side as a rule, alone after two deaths of an engine, not at all after three."""

from __future__ import annotations

import asyncio

import numpy as np

from pipeline.errors import DocumentError
from pipeline.flow.quarantine import DeathRecord, EngineId, Quarantine
from pipeline.records import Completion, Request
from pipeline.stages.ask import AskStage
from tests.support.engines import ScriptedEngine, make_completion
from tests.support.ray_actors import Method
from tests.support.stages import Row
from tests.support.workspace import Workspace

SIZE = {"page_no": 1, "width_px": 28, "height_px": 28, "dpi": 200.0, "visual_tokens": 1, "warnings": []}
ENGINE = EngineId("a", 1)
PLACE: Row = {"source": "a.pdf", "attempt": 1, "first_page": 1, "last_page": 1, "page_count": 1}
REQUEST: Row = PLACE | {"pages": [SIZE], "pixels": [np.zeros((28, 28, 3), np.uint8)]}


class Registry:
    """The registry's part that a quarantine calls."""

    def __init__(self) -> None:
        self.record = DeathRecord()
        self.begin_alone, self.end_alone = map(Method, (self.record.begin_alone, self.record.end_alone))


def answer(workspace: Workspace, engine: ScriptedEngine, registry: Registry, **deaths: int) -> dict[str, Row]:
    """Return the answered rows of requests that were under way at so many deaths."""

    async def gather() -> list[Row]:
        quarantine = Quarantine(AskStage(workspace.job(), engine), registry, ENGINE)
        found = await asyncio.gather(*(quarantine.answer_rows(REQUEST | {"key": key}, died, "gone") for key, died in deaths.items()))
        return [rows[0] for rows in found]

    return {row["key"]: row for row in asyncio.run(asyncio.wait_for(gather(), 60))}


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


def test_requests_are_under_way_together(workspace: Workspace) -> None:
    engine = CountingEngine()
    answer(workspace, engine, Registry(), k1=0, k2=0, k3=1)
    assert engine.beside == {"k1": 2, "k2": 2, "k3": 2}


def test_an_engine_that_fails_on_one_request_costs_that_one_alone(workspace: Workspace) -> None:
    def stumble_over_k2(request: Request) -> Completion:
        if request.key == "k2":
            raise DocumentError("engine", "the engine failed on this request")
        return make_completion()

    rows = answer(workspace, ScriptedEngine(stumble_over_k2), Registry(), k1=0, k2=0, k3=0)
    assert {key: row["status"] for key, row in rows.items()} == {"k1": "extracted", "k2": "failed", "k3": "extracted"}


def test_a_request_at_two_deaths_is_asked_alone_and_the_others_beside_each_other(workspace: Workspace) -> None:
    registry, engine = Registry(), CountingEngine()
    rows = answer(workspace, engine, registry, k1=1, k2=2, k3=0, k4=0)
    assert [row["status"] for row in rows.values()] == ["extracted"] * 4
    assert engine.beside == {"k1": 0, "k2": 0, "k3": 1, "k4": 1}  # k2 goes before those that come after it
    assert registry.record.alone == {}


def test_a_request_at_three_deaths_is_not_asked(workspace: Workspace) -> None:
    engine = CountingEngine()
    rows = answer(workspace, engine, Registry(), k1=0, k2=3)
    assert "k2" not in engine.beside
    assert (rows["k2"]["status"], rows["k2"]["model"]) == ("failed", "script-1")
    assert rows["k2"]["failure"] == {
        "stage": "generate",
        "kind": "engine_died",
        "message": "the engine died 3 times with this request, the last time with no other: gone",
    }


def test_a_row_that_failed_before_it_was_asked_does_not_wait(workspace: Workspace) -> None:
    async def ask() -> Row:
        quarantine = Quarantine(AskStage(workspace.job(), ScriptedEngine()), Registry(), ENGINE)
        failed = REQUEST | {"key": "k1", "status": "failed", "failure": {"stage": "render", "kind": "broken", "message": "no page"}}
        async with quarantine.turnstile.enter(alone=True):
            return (await asyncio.wait_for(quarantine.answer_rows(failed, 2, "gone"), 60))[0]

    assert asyncio.run(ask())["failure"]["kind"] == "broken"


# --- what is to blame


def test_a_death_counts_for_the_requests_under_way() -> None:
    record = DeathRecord()
    assert record.judge(ENGINE, "k1") == (False, "")
    record.record_death(ENGINE, "out of memory")
    assert record.is_known(ENGINE)
    assert record.judge(ENGINE, "k1") == (True, "out of memory")


def test_a_death_without_a_reason_is_known_when_the_engine_is_replaced() -> None:
    record = DeathRecord()
    assert record.count_replacement(ENGINE) == (1, "its process ended without a message")
    assert record.judge(ENGINE, "k1") == (True, "its process ended without a message")
    later = ENGINE._replace(pid=2)
    record.record_death(later, "out of memory")
    assert record.count_replacement(later) == (2, "out of memory")


def test_requests_that_wait_for_one_that_is_alone_are_not_to_blame() -> None:
    record = DeathRecord()
    record.begin_alone(ENGINE, "k1")
    record.record_death(ENGINE, "gone again")
    assert (record.judge(ENGINE, "k1"), record.judge(ENGINE, "k2")) == ((True, "gone again"), (False, "gone again"))


def test_the_end_of_a_machine_or_of_an_idle_engine_counts_for_no_request() -> None:
    record = DeathRecord()
    record.forget(ENGINE)
    assert (record.is_known(ENGINE), record.judge(ENGINE, "k1")) == (True, (False, ""))


def kill_alone(record: DeathRecord, pid: int) -> int:
    """Let an engine die of a suspect; return how many replacements count."""
    engine = EngineId("a", pid)
    record.begin_alone(engine, f"k{pid}")
    record.record_death(engine, "gone")
    return record.count_replacement(engine)[0]


def test_the_death_of_a_request_that_is_alone_is_not_the_engines_failure() -> None:
    record = DeathRecord()
    for pid in range(5):
        assert kill_alone(record, pid) == 0
        record.pardon_again()


def test_an_engine_that_dies_of_every_request_is_broken() -> None:
    record = DeathRecord()
    assert [kill_alone(record, pid) for pid in range(5)] == [0, 0, 0, 1, 2]
