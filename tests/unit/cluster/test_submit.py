"""The log and the end of a submitted run, and what is refused as a job server; no cluster. `tests/ray/test_submit.py` has one."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cluster import submit
from pipeline.errors import JobError
from pipeline.report import ExitCode
from tests.support.held_server import HeldAnswer, serve_held

# --- a run's log and its end, without a cluster


async def spoken(*chunks: str) -> AsyncIterator[str]:
    for chunk in chunks:
        yield chunk


def test_a_log_that_is_read_again_from_its_beginning_is_written_once() -> None:
    written: list[str] = []
    log = submit.LogReader(written.append)
    for chunks in (["one\n", "tw"], ["one\nt", "wo\n"], ["one\ntwo\nthree\n"]):
        asyncio.run(log.read(spoken(*chunks)))
    assert "".join(written) == "one\ntwo\nthree\n"


def test_a_log_that_is_silent_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent() -> AsyncIterator[str]:
        yield "one\n"
        await asyncio.Event().wait()

    monkeypatch.setattr(submit, "LOG_SILENT_S", 0.01)
    written: list[str] = []
    asyncio.run(submit.LogReader(written.append).read(silent()))
    assert written == ["one\n"]


def test_the_events_in_a_log_go_to_a_file_and_its_words_to_who_reads() -> None:
    words, file = list[str](), io.StringIO()
    for log in (submit.LogSplitter(words.append, file), submit.LogSplitter(words.append, None)):
        for text in ("starting\n{", '"at": "2026", "event": "request"}\n3 of 12', ' documents\n{"documents": 12}\n'):
            log.write(text)
    assert words == ["starting\n", "3 of 12 documents\n", '{"documents": 12}\n'] * 2
    assert file.getvalue() == '{"at": "2026", "event": "request"}\n'


@pytest.mark.parametrize(
    ("status", "code", "message", "ends", "says"),
    [
        ("SUCCEEDED", 0, None, ExitCode.OK, ""),
        ("FAILED", 1, "…", ExitCode.DOCUMENTS_FAILED, ""),
        ("FAILED", 2, "…", ExitCode.JOB_WRONG, ""),
        ("FAILED", 3, "…", ExitCode.RUN_BROKEN, ""),
        ("FAILED", 143, "…", ExitCode.TERMINATED, ""),
        ("FAILED", -9, "…", ExitCode.RUN_BROKEN, "its process ended with status -9"),
        ("FAILED", 127, "…", ExitCode.RUN_BROKEN, "its process ended with status 127"),
        ("FAILED", None, "no\nimage", ExitCode.RUN_BROKEN, "broke off: no image;"),
        ("STOPPED", None, None, ExitCode.TERMINATED, "the run was stopped; what was answered is kept"),
    ],
)
def test_the_end_of_a_run_is_its_exit_code(status: str, code: int | None, message: str | None, ends: ExitCode, says: str) -> None:
    found: Any = SimpleNamespace(status=submit.JobStatus(status), driver_exit_code=code, message=message)
    exit_code, word = submit.read_exit_code(found)
    assert exit_code is ends
    assert says in word if says else word == ""


# --- what is no job server


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "http://user@head:8265", "http://head:8265/x"])
def test_what_is_no_address_of_a_job_server_is_refused(address: str) -> None:
    with pytest.raises(JobError, match="expected a cluster's job server, such as http://HEAD:8265"):
        submit.JobServer(address)


def test_where_no_job_server_is_is_said_at_once() -> None:
    with pytest.raises(JobError, match=r"nothing answers at http://127\.0\.0\.1:1: Connection refused"):
        submit.JobServer("http://127.0.0.1:1")


def test_without_the_clients_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "find_spec", lambda name: None)
    with pytest.raises(JobError, match=r"pip install 'pipeline-documents\[cluster\]'"):
        submit.JobServer("http://127.0.0.1:1")


def test_another_server_is_none() -> None:
    HeldAnswer.due.set()
    with serve_held(HeldAnswer) as address, pytest.raises(JobError, match=f"{address}: "):
        submit.JobServer(address)
