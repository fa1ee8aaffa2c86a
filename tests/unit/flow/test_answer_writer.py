"""Writer beside an engine: a shard every few seconds, and no row that another process has written."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RunError
from pipeline.flow import answer_writer
from pipeline.flow.answer_writer import AnswerWriter
from pipeline.output import Output
from pipeline.output.key_set import KeySet
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.shards import read_shards
from pipeline.output.sources import read_sources
from pipeline.registry import RequestRegistry, unpack_receipts
from pipeline.registry.deaths import EngineId
from tests.support.ray_actors import LocalActor

ENGINE = EngineId("a", 1)


class Desk:
    """A writer, its registry and its output."""

    def __init__(self, folder: Path) -> None:
        self.output, self.registry = Output(folder), RequestRegistry(lambda node: True)
        self.output.create()

    def work(self, work: Callable[[AnswerWriter], Awaitable[Any]]) -> Any:
        async def begin() -> Any:
            self.registry.begin_round(KeySet.of(["done"]), {}, True)
            self.registry.begin_process(ENGINE, "here", False)
            return await work(AnswerWriter(self.output, LocalActor(self.registry), ENGINE, lambda: 3))

        return asyncio.run(asyncio.wait_for(begin(), 60))

    def read_keys(self) -> list[str]:
        return sorted(read_shards(self.output.requests, ["key"], LEDGER_SCHEMA)["key"].to_pylist())


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "out")


def add(writer: AnswerWriter, *keys: str) -> None:
    for key in keys:
        row: Any = {"key": key, "attempt": 1, "source": f"{key}.pdf", "doc_id": key, "page_count": 2, "status": "extracted", "pages": []}
        writer.add([row | {"size_bytes": 5, "version": "1"}], 2.0, 1.0)


def test_a_request_is_written_with_the_rows_that_asked_again(desk: Desk) -> None:
    """Where another engine has written the request, it has written those of its own."""

    async def write(writer: AnswerWriter) -> None:
        for key in ("done", "new"):
            row: Any = {
                "attempt": 1,
                "source": "a.pdf",
                "doc_id": "a",
                "page_count": 1,
                "status": "extracted",
                "size_bytes": 5,
                "version": "1",
            }
            writer.add([row | {"key": key}, row | {"key": f"{key} again", "rule": "sum"}], 2.0, 1.0)
        assert await writer.flush()

    desk.work(write)
    assert desk.read_keys() == ["new", "new again"]
    (receipts,) = map(unpack_receipts, desk.registry.take_news().receipts)
    assert [(receipt["key"], receipt["rule"]) for receipt in receipts] == [("new", None), ("new again", "sum")]


async def wait_until(happened: Callable[[], Any]) -> None:
    while not happened():
        await asyncio.sleep(0.01)


def test_rows_are_written_after_a_while_without_being_asked_for(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_writer, "FIRST_S", 0.05)

    async def work(writer: AnswerWriter) -> None:
        add(writer, "k1")
        await wait_until(desk.read_keys)
        add(writer, "k2")
        await wait_until(lambda: len(desk.read_keys()) == 2)

    desk.work(work)
    assert desk.read_keys() == ["k1", "k2"]


def test_many_rows_do_not_wait(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_writer, "MAX_ROWS", 3)

    async def work(writer: AnswerWriter) -> None:
        writer.period_s = 3600.0
        add(writer, "k1", "k2", "k3")
        await wait_until(lambda: not writer.rows)

    desk.work(work)
    assert desk.read_keys() == ["k1", "k2", "k3"]


def test_a_shard_has_receipts_and_completes_the_list_of_sources(desk: Desk) -> None:
    async def work(writer: AnswerWriter) -> Any:
        add(writer, "k1", "k2")
        assert await writer.flush()
        return desk.registry.take_news()

    news = desk.work(work)
    (receipts,) = map(unpack_receipts, news.receipts)
    assert [(one["key"], one["pages_shown"], one["actor"], one["busy_s"]) for one in receipts] == [
        ("k1", 0, "a 1", 1.0),
        ("k2", 0, "a 1", 1.0),
    ]
    assert "answer" not in receipts[0]
    assert [rows for _, rows in news.shards] == [2]
    assert read_sources(desk.output)["page_count"].to_pylist() == [2, 2]


def test_what_is_done_or_another_engine_writes_is_left_out(desk: Desk) -> None:
    async def work(writer: AnswerWriter) -> None:
        desk.registry.begin_process(EngineId("b", 2), "here", False)
        desk.registry.begin_shard(EngineId("b", 2), "other.parquet", ["k1"])
        add(writer, "done", "k1", "k2")
        await writer.flush()

    desk.work(work)
    assert desk.read_keys() == ["k2"]


@pytest.mark.parametrize(("is_there", "written"), [(True, ["k2"]), (False, ["k1", "k2"])])
def test_what_a_dead_engine_was_to_write_is_written_once(desk: Desk, is_there: bool, written: list[str]) -> None:
    """Either way the driver learns once that it is in the ledger."""

    async def work(writer: AnswerWriter) -> None:
        desk.registry.begin_process(EngineId("b", 2), "here", False)
        desk.registry.begin_shard(EngineId("b", 2), "other.parquet", ["k1"])
        desk.registry.begin_process(EngineId("b", 3), "here", True)
        if is_there:
            desk.output.requests.put("other.parquet", b"")
        add(writer, "k1", "k2")
        await writer.flush()
        desk.output.requests.remove(["other.parquet"])

    desk.work(work)
    assert desk.read_keys() == written
    news = desk.registry.take_news()
    assert sorted(one["key"] for packed in news.receipts for one in unpack_receipts(packed)) == ["k1", "k2"]
    assert ("other.parquet", 1) in news.shards or not is_there
    assert not desk.registry.writing


def test_a_ledger_that_cannot_be_written_ends_the_run_and_keeps_the_rows(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(output: Output, rows: Any, name: str) -> None:
        raise RunError("cannot write: No space left on device")

    async def work(writer: AnswerWriter) -> Any:
        add(writer, "k1")
        assert not await writer.flush()
        assert list(writer.rows) == ["k1"]
        return desk.registry.take_news()

    with monkeypatch.context() as patch:
        patch.setattr(answer_writer, "write_rows", refuse)
        assert desk.work(work).fatal == "cannot write: No space left on device"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=12))
def test_each_answer_is_in_the_ledger_once_wherever_it_is_flushed(added: list[tuple[str, bool]]) -> None:
    async def work(writer: AnswerWriter) -> None:
        for key, is_flushed in added:
            add(writer, key)
            if is_flushed:
                await writer.flush()
        await writer.flush()

    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(Path(folder) / "out")
        desk.work(work)
        assert desk.read_keys() == sorted({key for key, _ in added})
        assert sorted(read_sources(desk.output)["source"].to_pylist()) == sorted({f"{key}.pdf" for key, _ in added})
