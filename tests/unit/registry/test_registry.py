"""Registry of a run: claims, engines and their deaths, and shards of the ledger of which no row is written twice."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pipeline.output.key_set import KeySet
from pipeline.registry import EngineEntry, EngineList, RequestRegistry, pack_receipts, unpack_receipts
from pipeline.registry.deaths import EngineId

ENGINE, NEXT, OTHER = EngineId("a", 1), EngineId("a", 2), EngineId("b", 3)


@pytest.fixture
def made() -> RequestRegistry:
    """A registry of a round in which `done` is done and `again` was asked twice; the node "gone" is."""
    made = RequestRegistry(lambda node: node != "gone")
    made.begin_round(KeySet.of(["done"]), {"again": 2}, True)
    for engine in (ENGINE, OTHER):
        made.begin_process(engine, "here", False)
        made.add_engine(EngineEntry(engine, "here", None))
    return made


def document(source: str, doc_id: str | None = "d") -> Any:
    return {"source": source, "doc_id": doc_id, "page_count": 1}


def claim(made: RequestRegistry, source: str, keys: list[str], doc_id: str | None = "d") -> dict[str, int]:
    (wanted,) = made.claim([(document(source, doc_id), keys)])
    return wanted


def write(made: RequestRegistry, engine: EngineId, shard: str, keys: list[str], load: int = 0) -> None:
    made.begin_shard(engine, shard, keys)
    made.end_shard(engine, shard, keys, b"", load)


# --- claims


def test_a_document_asks_what_is_not_done_with_the_number_of_its_attempt(made: RequestRegistry) -> None:
    assert claim(made, "a.pdf", ["done", "again", "new"]) == {"again": 3, "new": 1}


def test_documents_of_one_call_are_claimed_one_after_another(made: RequestRegistry) -> None:
    asked = [(document("a.pdf"), ["k1", "done"]), (document("b.pdf", "e"), ["done"]), (document("c.pdf"), ["k1", "done"])]
    assert made.claim(asked) == [{"k1": 1}, {}, {}]
    assert [found["source"] for found in made.take_news().identified] == ["b.pdf", "c.pdf"]


def test_of_two_files_of_the_same_bytes_one_is_asked_and_the_other_is_news(made: RequestRegistry) -> None:
    assert claim(made, "a.pdf", ["k1", "k2"]) == {"k1": 1, "k2": 1}
    for keys in (["k1"], ["k2"]):  # before, while and after the first one's requests are written
        assert claim(made, "b.pdf", ["k1", "k2"]) == {}
        write(made, ENGINE, f"s {keys}", keys)
    assert claim(made, "b.pdf", ["k1", "k2"]) == {}
    assert [found["source"] for found in made.take_news().identified] == ["b.pdf"] * 3


def test_nothing_is_kept_of_documents_whose_requests_are_written(made: RequestRegistry) -> None:
    for number in range(10):
        claim(made, f"{number}.pdf", [f"{number} 1", f"{number} 2"], f"d{number}")
    write(made, ENGINE, "s1", [f"{number} 1" for number in range(10)])
    assert len(made.owners) == 10
    write(made, ENGINE, "s2", [f"{number} 2" for number in range(9)])
    assert (list(made.owners), made.claimed, made.writing) == (["d9"], {"9 2": "d9"}, {})


def test_a_renderer_that_starts_again_claims_what_is_not_written(made: RequestRegistry) -> None:
    claim(made, "a.pdf", ["k1", "k2"])
    write(made, ENGINE, "s1", ["k1"])
    assert claim(made, "a.pdf", ["k1", "k2"]) == {"k2": 1}


def test_a_document_that_opens_at_the_second_time_is_another_ones_no_more(made: RequestRegistry) -> None:
    claim(made, "a.pdf", ["unopened"])
    claim(made, "a.pdf", ["k1"])
    write(made, ENGINE, "s1", ["k1"])
    write(made, ENGINE, "s2", ["unopened"])  # its renderer had died, the request had not
    assert (made.owners, made.claimed) == ({}, {})


def test_unread_documents_share_nothing(made: RequestRegistry) -> None:
    assert claim(made, "a.pdf", ["k1"], None) == {"k1": 1}
    assert claim(made, "b.pdf", ["k2"], None) == {"k2": 1}


def test_the_other_documents_wait_until_the_first_are_good(made: RequestRegistry) -> None:
    made.begin_round(KeySet(), {}, False)
    assert not made.is_open()
    made.open_gate()
    assert made.is_open()


# --- shards


def test_what_is_in_the_ledger_is_not_written_again(made: RequestRegistry) -> None:
    assert made.begin_shard(ENGINE, "s1", ["done", "k1"]) == ({"done"}, {})


def test_what_a_living_engine_is_about_to_write_another_does_not(made: RequestRegistry) -> None:
    made.begin_shard(ENGINE, "s1", ["k1"])
    assert made.begin_shard(OTHER, "s2", ["k1", "k2"]) == ({"k1"}, {})


def test_what_a_dead_engine_was_about_to_write_depends_on_whether_its_shard_is_there(made: RequestRegistry) -> None:
    made.begin_shard(ENGINE, "s1", ["k1"])
    made.begin_process(NEXT, "here", True)
    assert made.begin_shard(OTHER, "s2", ["k1", "k2"]) == (set(), {"k1": "s1"})


def test_what_is_written_is_news_once(made: RequestRegistry) -> None:
    made.begin_shard(ENGINE, "s1", ["k1"])
    receipts: list[Any] = [{"key": "k1", "status": "extracted"}]
    made.end_shard(ENGINE, "s1", ["k1"], pack_receipts(receipts), 7)
    news = made.take_news()
    assert ([unpack_receipts(packed) for packed in news.receipts], news.shards) == ([receipts], [("s1", 1)])
    assert made.list_engines(0, False).loads == [7, 0]
    assert made.take_news().receipts == []


# --- engines


def test_an_engine_that_died_is_not_offered_until_it_has_loaded_again(made: RequestRegistry) -> None:
    made.record_death(ENGINE, "out of memory")
    assert made.list_engines(0, False).ids == [OTHER]
    assert made.begin_process(NEXT, "here", True) == (1, "out of memory")
    assert made.judge_death(ENGINE, "k1") == (True, "out of memory")
    made.add_engine(EngineEntry(NEXT, "here", None))
    assert made.list_engines(0, False).ids == [OTHER, NEXT]


def test_a_renderer_is_given_each_engine_once(made: RequestRegistry) -> None:
    first = made.list_engines(0, False)
    assert [entry.id for entry in first.added] == [ENGINE, OTHER]
    made.begin_process(NEXT, "here", True)
    second = made.list_engines(first.number, False)
    assert (second.added, second.ids) == ([], [OTHER])
    assert made.list_engines(second.number, False) == EngineList(second.number, [], None, [0])
    made.add_engine(EngineEntry(NEXT, "here", None))
    assert [entry.id for entry in made.list_engines(first.number, False).added] == [NEXT]


def test_a_death_is_judged_when_something_tells_of_it(made: RequestRegistry) -> None:
    assert made.judge_death(ENGINE, "k1") is None
    made.begin_process(NEXT, "here", True)
    assert made.judge_death(ENGINE, "k1") == (True, "its process ended without a message")


def test_the_end_of_a_machine_is_no_failure_of_its_engine(made: RequestRegistry) -> None:
    made.begin_process(EngineId("c", 4), "gone", False)
    assert made.judge_death(EngineId("c", 4), "k1") == (False, "")
    assert made.begin_process(EngineId("c", 5), "here", True) == (0, "")


def test_an_engine_that_was_not_needed_dies_of_nothing(made: RequestRegistry) -> None:
    made.remove_engine("a")
    assert made.judge_death(ENGINE, "k1") == (False, "")
    assert "a" not in made.take_news().nodes


def test_the_driver_learns_that_all_engines_are_full_and_why_a_run_ends(made: RequestRegistry) -> None:
    made.list_engines(0, True)
    made.end_run("there is no memory for the weights")
    made.end_run("later")
    news = made.take_news()
    assert (news.is_full, news.fatal, news.loaded) == (True, "there is no memory for the weights", {"a": "here", "b": "here"})


def test_its_process_imports_little() -> None:
    """It starts with each run: no Arrow, no pydantic, nothing of `pipeline.flow`."""
    code = "import sys, pipeline.registry; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"ray", "pyarrow", "pydantic", "jsonschema", "torch", "pipeline.flow", "pipeline.job", "pipeline.stages"} & set(loaded)
