"""Registry of a run: claims, engines and their deaths, and shards of the ledger of which no row is written twice."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.flow.quarantine import EngineId
from pipeline.flow.registry import EngineEntry, RequestRegistry
from pipeline.output.key_set import KeySet
from pipeline.output.ledger import LedgerState

ENGINE, NEXT, OTHER = EngineId("a", 1), EngineId("a", 2), EngineId("b", 3)


@pytest.fixture
def made() -> RequestRegistry:
    """A registry of a round in which `done` is done and `again` was asked twice; the node "gone" is."""
    made = RequestRegistry(lambda node: node != "gone")
    made.begin_round(LedgerState(KeySet.of(["done"]), {"again": 2}), True)
    for engine in (ENGINE, OTHER):
        made.begin_process(engine, "here", False)
        made.add_engine(EngineEntry(engine, "here", None))
    return made


def document(source: str, doc_id: str | None = "d") -> Any:
    return {"source": source, "doc_id": doc_id, "page_count": 1}


def receipt(key: str) -> Any:
    return {"key": key, "status": "extracted"}


# --- claims


def test_a_document_asks_what_is_not_done_with_the_number_of_its_attempt(made: RequestRegistry) -> None:
    assert made.claim(document("a.pdf"), ["done", "again", "new"]) == {"again": 3, "new": 1}


def test_of_two_files_of_the_same_bytes_one_is_asked_and_the_other_is_news(made: RequestRegistry) -> None:
    assert made.claim(document("a.pdf"), ["k1"]) == {"k1": 1}
    assert made.claim(document("b.pdf"), ["k1"]) == {}
    assert [found["source"] for found in made.take_news().identified] == ["b.pdf"]


def test_a_renderer_that_starts_again_claims_what_is_not_written(made: RequestRegistry) -> None:
    made.claim(document("a.pdf"), ["k1", "k2"])
    made.begin_shard(ENGINE, "s1", ["k1"])
    made.end_shard(ENGINE, "s1", [receipt("k1")], 0)
    assert made.claim(document("a.pdf"), ["k1", "k2"]) == {"k2": 1}


def test_unread_documents_share_nothing(made: RequestRegistry) -> None:
    assert made.claim(document("a.pdf", None), ["k1"]) == {"k1": 1}
    assert made.claim(document("b.pdf", None), ["k2"]) == {"k2": 1}


def test_the_other_documents_wait_until_the_first_are_good(made: RequestRegistry) -> None:
    made.begin_round(LedgerState(KeySet(), {}), False)
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
    made.end_shard(ENGINE, "s1", [receipt("k1")], 7)
    news = made.take_news()
    assert (news.receipts, news.shards, made.engines["a"].load) == ([receipt("k1")], [("s1", 1)], 7)
    assert made.take_news().receipts == []


# --- engines


def test_an_engine_that_died_is_not_offered_until_it_has_loaded_again(made: RequestRegistry) -> None:
    made.record_death(ENGINE, "out of memory")
    assert [entry.id for entry in made.list_engines(False)] == [OTHER]
    assert made.begin_process(NEXT, "here", True) == (1, "out of memory")
    assert made.judge_death(ENGINE, "k1") == (True, "out of memory")
    made.add_engine(EngineEntry(NEXT, "here", None))
    assert {entry.id for entry in made.list_engines(False)} == {NEXT, OTHER}


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
    made.list_engines(True)
    made.end_run("there is no memory for the weights")
    made.end_run("later")
    news = made.take_news()
    assert (news.is_full, news.fatal, news.loaded) == (True, "there is no memory for the weights", {"a": "here", "b": "here"})
