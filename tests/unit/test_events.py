"""Event log: JSON lines, and records of a logger."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pipeline import events
from pipeline.errors import JobError

ROW = {"key": "c1", "attempt": 1, "source": "a\nb.pdf", "first_page": 1, "last_page": 4, "status": "failed", "asks": 2}


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_event_is_a_line_with_its_time_and_facts(tmp_path: Path) -> None:
    with events.write_events_to(tmp_path / "log.jsonl"):
        events.emit_event("run_started", job="invoices", documents=3)
    (line,) = lines(tmp_path / "log.jsonl")
    assert {**line, "at": None} == {"at": None, "event": "run_started", "job": "invoices", "documents": 3}
    assert str(line["at"]).endswith("+00:00")


def test_a_request_says_its_key_and_why_it_failed(tmp_path: Path) -> None:
    with events.write_events_to(tmp_path / "log.jsonl"):
        events.emit_answer_event({**ROW, "failure": {"stage": "generate", "kind": "length", "message": "cut\u2028short"}})
    (line,) = lines(tmp_path / "log.jsonl")
    assert (line["key"], line["source"], line["failure"], line["message"]) == ("c1", "a\nb.pdf", "generate/length", "cut\u2028short")


def test_what_asks_nothing_is_no_event(tmp_path: Path) -> None:
    with events.write_events_to(tmp_path / "log.jsonl"):
        events.emit_answer_event({**ROW, "key": None})
    assert lines(tmp_path / "log.jsonl") == []


def test_a_log_grows_and_nothing_listens_afterwards(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with events.write_events_to(tmp_path / "log.jsonl"):
            events.emit_event(name)
    events.emit_event("three")
    assert [line["event"] for line in lines(tmp_path / "log.jsonl")] == ["one", "two"]


def test_a_log_that_cannot_be_written_stops_before_anything_starts(tmp_path: Path) -> None:
    with (
        pytest.raises(JobError, match=r"cannot write the log .*: No such file or directory"),
        events.write_events_to(tmp_path / "no" / "log"),
    ):
        raise AssertionError


def test_a_program_can_listen_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pipeline.events"):
        events.emit_event("shard", file="a.parquet")
    assert [(record.msg, vars(record)["facts"]) for record in caplog.records] == [("shard", {"file": "a.parquet"})]


def test_a_log_may_be_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with events.write_events_to(Path("-")):
        events.emit_event("one")
    said = capsys.readouterr()
    assert (said.out, json.loads(said.err)["event"]) == ("", "one")
