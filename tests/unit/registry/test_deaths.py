"""Deaths of engines: which request is to blame, and which deaths count."""

from __future__ import annotations

from pipeline.registry.deaths import DeathRecord, EngineId

ENGINE = EngineId("a", 1)


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
