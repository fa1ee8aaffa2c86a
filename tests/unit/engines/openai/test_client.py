"""The HTTP client: which failures are retried, which fail at once, how long it waits, and what becomes of the key."""

from __future__ import annotations

import asyncio
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from threading import Barrier

import numpy as np
import pytest

from pipeline.engines import openai
from pipeline.engines.openai.chat import ServerProfile
from pipeline.engines.openai.client import MAX_RETRY_AFTER_S, MAX_WAIT_S, RetryPolicy, compute_wait_s, parse_retry_after
from pipeline.errors import DocumentError, EngineDead
from tests.support.chat_server import (
    Body,
    ChatServer,
    Connection,
    Reply,
    drop_connection,
    reply_endlessly,
    reply_events,
    reply_status,
    reply_text,
    stall,
)
from tests.support.engines import VALID
from tests.support.openai_requests import (
    FAST_POLICY,
    KEY,
    complete_all,
    complete_one,
    make_request,
)

# Failures


ONCE = {
    "429": reply_status(429, Retry_After="0"),
    "500": reply_status(500, "<html><h1>oops</h1></html>"),
    "503": reply_status(503),
    "529": reply_status(529),
    "no connection": drop_connection,
    "cut": reply_text(VALID, tail=Connection.drop),
    "ended early": reply_events({"choices": [{"delta": {"content": "{"}, "finish_reason": None}]}),
    "no JSON": reply_events('{"choices": [{'),
    "no event": reply_events({"choices": [{"delta": "x"}]}),
    "a list": reply_events([]),
    "an error within": reply_events({"choices": [{"delta": {"content": "{"}}]}, {"error": "CUDA out of memory"}),
    "429 within": reply_events({"error": {"message": "slow down", "code": 429}}),
    "500 within": reply_events({"error": {"message": "oops", "code": 500}}),
    "aborted": reply_events({"choices": [{"delta": {"content": "{"}, "finish_reason": "abort"}]}),
    "no body": lambda connection, _: connection.reply(200, ""),
}


@pytest.mark.parametrize("fault", ONCE)
def test_temporary_failures_are_retried(fault: str) -> None:
    with ChatServer(ONCE[fault], ONCE[fault], reply_text(VALID)) as stub:
        (answer,) = complete_all(stub, [make_request()])
    assert (answer.text, len(stub.requests)) == (VALID, 3)


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (reply_status(429, "slow down"), "busy", "answers 429: slow down; asked 4 times"),
        (reply_status(500), "server", "answers 500: not now; asked 4 times"),
        (drop_connection, "connection", "the connection was lost .*; asked 4 times"),
        (reply_text(VALID, tail=Connection.drop), "connection", "the connection was lost"),
        (reply_events(), "connection", "ended before it was finished"),
        (reply_events("nonsense"), "garbled", "no JSON: 'nonsense'"),
        (reply_events({"error": {"message": "CUDA out of memory"}}), "server", "broke off: CUDA out of memory"),
    ],
)
def test_a_permanent_failure_is_reported_by_its_kind(fault: Reply, kind: str, said: str) -> None:
    with pytest.raises(DocumentError, match=said) as failed:
        raise complete_one(fault)
    assert failed.value.kind == kind


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        (reply_status(400, "bad " * 200), "refused", r"answers 400: (bad ){40,}bad…$"),
        (reply_status(404, "no model"), "refused", "answers 404: no model"),
        (reply_status(422), "refused", "answers 422: not now"),
        (reply_status(400, "This model's maximum context length is 2048 tokens."), "too_long", "maximum context length is 2048"),
        (reply_status(307, Location="http://elsewhere.example/v1"), "refused", "a redirect, which is not followed"),
        (reply_events({"error": {"message": "Invalid grammar", "code": 400}}, "[DONE]"), "refused", "answers 400: Invalid grammar"),
    ],
)
def test_a_refusal_is_not_retried(reply: Reply, kind: str, said: str) -> None:
    with ChatServer(reply) as stub:
        (error,) = complete_all(stub, [make_request()])
    with pytest.raises(DocumentError, match=said):
        raise error
    assert (error.kind, len(stub.requests)) == (kind, 1)


def test_a_stalled_answer_is_retried() -> None:
    policy = RetryPolicy(idle_timeout_s=1.0, max_retries=1, backoff_s=0.005)
    with ChatServer(reply_text(VALID[:8], tail=stall), reply_text(VALID)) as stub:
        (answer,) = complete_all(stub, [make_request()], policy)
    assert (answer.text, len(stub.requests)) == (VALID, 2)


def test_a_server_that_always_stalls_is_a_timeout() -> None:
    answer = complete_one(reply_text(VALID[:8], tail=stall), policy=RetryPolicy(idle_timeout_s=0.2, max_retries=1, backoff_s=0.005))
    assert (answer.kind, str(answer)) == ("timeout", "nothing came for 0.2 s (model.idle_timeout_s); asked 2 times")


def test_an_answer_that_takes_too_long_is_cut_and_not_retried() -> None:
    with ChatServer(reply_endlessly()) as stub:
        (error,) = complete_all(stub, [make_request(max_tokens=10**9)], RetryPolicy(timeout_s=1.0, max_retries=3))
    assert (error.kind, "model.timeout_s" in str(error), len(stub.requests)) == ("timeout", True, 1)


def test_an_answer_is_complete_although_its_connection_stays_open() -> None:
    def reply(connection: Connection, _: Body) -> None:
        connection.begin_stream()
        connection.send_event({"choices": [{"delta": {"content": VALID}, "finish_reason": "stop"}]})
        connection.send_event("[DONE]")
        stall(connection)

    assert complete_one(reply).text == VALID


def test_concurrency_is_exactly_what_the_job_sets() -> None:
    meeting, busy, most = Barrier(3), set[int](), list[int]()

    def reply(connection: Connection, asked: Body) -> None:
        busy.add(id(connection))
        most.append(len(busy))
        meeting.wait(60)
        busy.discard(id(connection))
        reply_text(VALID)(connection, asked)

    with ChatServer(reply) as stub:
        answers = complete_all(stub, [make_request(key) for key in range(12)], RetryPolicy(concurrency=3, idle_timeout_s=100))
    assert ({answer.text for answer in answers}, max(most), len(stub.requests)) == ({VALID}, 3, 12)


def test_every_request_is_answered_by_a_server_that_fails_thirty_percent_in_five_ways() -> None:
    faults = [
        reply_status(429, Retry_After="0"),
        reply_status(502),
        reply_text(VALID, tail=Connection.drop),
        reply_events("{no"),
        drop_connection,
    ]
    chance, turn = np.random.default_rng(0), iter(range(10**6))

    def reply(connection: Connection, asked: Body) -> None:
        number = asked["messages"][0]["content"]
        (faults[next(turn) % 5] if chance.random() < 0.3 else reply_text(f'{{"n":"{number}"}}'))(connection, asked)

    with ChatServer(reply) as stub:
        answers = complete_all(stub, [make_request(key) for key in range(100)], RetryPolicy(concurrency=8, max_retries=12, backoff_s=0.002))
    assert [answer.text for answer in answers] == [f'{{"n":"System {key}."}}' for key in range(100)]
    assert len(stub.requests) > 120


# Waits


def test_waits_grow_and_are_random() -> None:
    for attempt in range(10):
        most = min(MAX_WAIT_S, 2.0**attempt)
        waits = {compute_wait_s(attempt, None, 1.0) for _ in range(20)}
        assert len(waits) > 1
        assert most / 2 <= min(waits) <= max(waits) <= most


def test_retry_after_is_obeyed_up_to_a_bound() -> None:
    assert 7 <= compute_wait_s(0, parse_retry_after("7"), 1.0) <= 8
    assert MAX_RETRY_AFTER_S <= compute_wait_s(0, parse_retry_after("86400"), 1.0) <= MAX_RETRY_AFTER_S + 1


def test_retry_after_may_be_a_date() -> None:
    then = datetime.now(UTC) + timedelta(seconds=90)
    assert 80 < (parse_retry_after(format_datetime(then, usegmt=True)) or 0) <= 90
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


@pytest.mark.parametrize("header", ["", "soon", "-3", "1e9", "٣", "9" * 30])
def test_a_retry_after_without_a_time_is_ignored(header: str) -> None:
    assert parse_retry_after(header) is None


def test_an_unreachable_server_is_engine_dead(closed_address: str) -> None:
    with (
        closing(openai.OpenAIEngine(closed_address, ServerProfile("m"), FAST_POLICY)) as engine,
        pytest.raises(EngineDead, match="cannot be reached"),
    ):
        asyncio.run(engine.complete(make_request()))


def test_a_redirect_gets_no_key() -> None:
    with (
        ChatServer(reply_text(VALID)) as elsewhere,
        ChatServer(reply_status(307, Location=f"{elsewhere.base_url}/chat/completions")) as stub,
    ):
        (error,) = complete_all(stub, [make_request()], key=KEY)
    assert (error.kind, elsewhere.headers) == ("refused", [])
