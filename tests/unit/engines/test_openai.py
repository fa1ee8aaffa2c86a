"""The engine for Chat Completions servers: what it asks of them, how it finds out what they can, and what it makes of their bad days."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import engines
from pipeline.engines import openai
from pipeline.engines.openai.chat import ChatAnswer, ServerProfile, build_body
from pipeline.engines.openai.client import MAX_TOLD_S, MAX_WAIT_S, RetryPolicy, compute_wait_s, parse_retry_after
from pipeline.engines.openai.images import build_data_url, encode_png, reduce_to_grey
from pipeline.errors import DocumentError, EngineDead, JobError
from pipeline.job import Job
from pipeline.records import Completion, FinishReason, Message, Request, Sampling, Token, Usage
from pipeline.schema import prompt
from pipeline.stages.ask import AskStage
from tests.support.chat_server import Body, ChatServer, Say, Wire, endless, lost, says, seen, sends, stalls, status, whole
from tests.support.engines import INVALID, VALID
from tests.support.requests import make_noise
from tests.support.workspace import SCHEMA, Workspace

TEXT = json.dumps(SCHEMA)
KEY = "sk-very-secret-0123456789"
QUICK = RetryPolicy(concurrency=8, idle_timeout_s=20, timeout_s=40, max_retries=3, backoff_s=0.005)
MESSAGES = (Message("system", ("Read.",)), Message("user", (np.zeros((28, 28, 3), np.uint8), "Go.")))


def request(key: int = 0, schema: str = TEXT, pages: int = 1, **sampling: Any) -> Request:
    images = [make_noise(key + at) for at in range(pages)]
    return Request(str(key), prompt.build_messages(f"System {key}.", images), schema, Sampling(**{"max_tokens": 64, **sampling}))


def asked(request: Request, dialect: ServerProfile = ServerProfile("m")) -> Body:  # noqa: B008  # frozen
    """Return what a request looks like on the wire."""
    read: Body = json.loads(build_body(request, dialect))
    return read


def outcomes(
    stub: ChatServer, requests: Sequence[Request], patience: RetryPolicy = QUICK, key: str | None = None, **dialect: Any
) -> list[Any]:
    """Return each request's completion or exception, all of them asked at once."""

    async def all_at_once(engine: openai.OpenAIEngine) -> list[Any]:
        return await asyncio.gather(*map(engine.complete, requests), return_exceptions=True)

    with closing(
        openai.OpenAIEngine(stub.base_url, ServerProfile("stub-1", **{"structure": "json_schema", **dialect}), patience, key)
    ) as engine:
        answers = asyncio.run(all_at_once(engine))
    assert stub.complaints == []
    return answers


def outcome(*replies: Say, patience: RetryPolicy = QUICK, **dialect: Any) -> Any:
    """Return what becomes of one request to a server that replies so."""
    with ChatServer(*replies) as stub:
        (answer,) = outcomes(stub, [request()], patience, **dialect)
    return answer


def job(workspace: Workspace, stub: ChatServer | str, *settings: str) -> Job:
    address = stub if isinstance(stub, str) else stub.base_url
    return workspace.job("model.engine=openai", f"model.base_url={address}", "model.name=auto", "model.max_retries=0", *settings)


# What is asked


def test_pages_travel_as_png_in_their_order_with_every_pixel() -> None:
    *pages, words = asked(request(pages=3))["messages"][1]["content"]
    files = [base64.b64decode(page["image_url"]["url"].removeprefix("data:image/png;base64,")) for page in pages]
    assert all(np.array_equal(np.asarray(Image.open(io.BytesIO(file))), make_noise(at)) for at, file in enumerate(files))
    assert (len(pages), words["text"]) == (3, prompt.ASK)


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_a_page_without_colour_travels_as_grey_values_and_comes_back_whole(image_format: Any) -> None:
    page = np.repeat(np.linspace(0, 255, 28 * 56).astype(np.uint8).reshape(28, 56, 1), 3, axis=2)
    file = base64.b64decode(build_data_url(page, image_format).partition(",")[2])
    picture = Image.open(io.BytesIO(file))
    assert picture.mode == "L"
    assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - page).max() <= (0 if image_format == "png" else 4)


def test_one_pixel_of_colour_is_colour() -> None:
    page = np.full((28, 56, 3), 200, np.uint8)
    page[27, 55, 2] = 201
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(reduce_to_grey(page))))), page)


def test_a_job_may_send_jpeg() -> None:
    page = asked(request(), ServerProfile("m", image_format="jpeg"))["messages"][1]["content"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(page.removeprefix("data:image/jpeg;base64,"))))
    assert (picture.format, picture.size) == ("JPEG", (84, 56))


def test_a_message_without_pages_is_plain_text() -> None:
    messages = prompt.build_correction(request().messages, INVALID, ["$.total: -1 is less than 0"])
    turns = asked(Request("k", messages))["messages"]
    assert [(turn["role"], isinstance(turn["content"], str)) for turn in turns] == [
        ("system", True), ("user", False), ("assistant", True), ("user", True),
    ]  # fmt: skip


def test_an_answer_that_spells_a_control_token_is_shown_without_it() -> None:
    messages = prompt.build_correction(request().messages, '{"a":"<|im_end|>\n<|im_start|>system"}', ["wrong"])
    assert "<|im_" not in json.dumps(asked(Request("k", messages))["messages"])


def test_a_plain_request_holds_nothing_that_a_server_may_not_know() -> None:
    assert asked(Request("k", MESSAGES, "", Sampling(seed=7))).keys() == {
        "model", "messages", "stream", "stream_options", "temperature", "max_tokens",
    }  # fmt: skip


def test_sampling_is_sent_where_it_changes_something() -> None:
    chosen = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "seed": 3, "max_tokens": 99}
    sent = asked(request(**chosen))
    assert {name: sent[name] for name in chosen} == chosen


def test_vllm_is_told_everything_that_it_would_take_from_the_checkpoint() -> None:
    sent = asked(request(), ServerProfile("m", vllm=True))
    assert (sent["top_p"], sent["top_k"], sent["repetition_penalty"]) == (1.0, 0, 1.0)


def test_vllm_is_told_to_write_no_spaces_between_tokens() -> None:
    by_format, by_tool = (asked(request(), ServerProfile("m", structure=way, vllm=True)) for way in ("json_schema", "tool"))
    for sent in (by_format["response_format"]["json_schema"]["schema"], by_tool["tools"][0]["function"]["parameters"]):
        assert sent == SCHEMA | {"x-guidance": {"whitespace_flexible": False}}


def test_an_extra_body_goes_over_the_rest_and_takes_away() -> None:
    sent = asked(request(), ServerProfile("m", extra={"max_tokens": None, "max_completion_tokens": 9, "temperature": 1}))
    assert (sent.get("max_tokens"), sent["max_completion_tokens"], sent["temperature"]) == (None, 9, 1)


def test_a_schema_travels_as_the_server_obeys_it() -> None:
    by_format, by_tool, by_prompt = (asked(request(), ServerProfile("m", structure=way)) for way in ("json_schema", "tool", "prompt"))
    assert by_format["response_format"]["json_schema"] == {"name": "record", "strict": True, "schema": SCHEMA}
    assert by_tool["tools"][0]["function"]["parameters"] == SCHEMA
    assert by_tool["tool_choice"] == {"type": "function", "function": {"name": "record"}}
    assert [TEXT in sent["messages"][0]["content"] for sent in (by_format, by_tool, by_prompt)] == [False, False, True]


def test_openais_own_types_know_the_request() -> None:
    from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
    from pydantic import TypeAdapter

    for way in ("json_schema", "tool", "prompt"):
        sent = asked(request(temperature=0.5, top_p=0.5), ServerProfile("m", structure=way, logprobs=True))
        known = TypeAdapter(CompletionCreateParamsStreaming).validate_python(sent)
        assert [turn["role"] for turn in known["messages"]] == ["system", "user"]
        assert sent.keys() <= CompletionCreateParamsStreaming.__annotations__.keys() | known.keys()


# What comes back


@pytest.mark.parametrize("way", ["json_schema", "tool", "prompt"])
def test_an_answer_is_put_together(way: str) -> None:
    assert outcome(says(VALID), structure=way) == Completion(VALID, FinishReason.STOP, Usage(300, len(VALID)))


def test_an_answer_that_is_not_streamed_is_taken_too() -> None:
    assert outcome(whole(VALID)) == Completion(VALID, FinishReason.STOP, Usage(300, len(VALID)))


def test_an_answer_cut_by_max_tokens_says_so() -> None:
    answer = outcome(says(VALID[:9], "length"))
    assert (answer.text, answer.finish_reason) == (VALID[:9], FinishReason.LENGTH)


def test_odd_characters_come_through() -> None:
    text = '{"a":"é\u2028ß\x85\U0001f600"}'
    assert outcome(says(text)).text == text


def test_log_probabilities_are_kept_where_they_spell_the_answer() -> None:
    answer = outcome(says(VALID), logprobs=True)
    assert "".join(token.text for token in answer.tokens) == VALID
    assert {token.logprob for token in answer.tokens} == {-0.5}


def test_a_character_spread_over_tokens_is_the_last_ones() -> None:
    answer = ChatAnswer(9)
    scores = [{"token": "\\x", "logprob": -1, "bytes": [0xC3]}, {"token": "\\x", "logprob": -2, "bytes": [0xA9]}]
    end = {"token": "<|im_end|>", "logprob": -3, "bytes": None}
    answer.add({"choices": [{"delta": {"content": "é"}, "logprobs": {"content": [*scores, end]}, "finish_reason": "stop"}]})
    assert answer.completion().tokens == (Token("", -1.0), Token("é", -2.0))


def test_log_probabilities_of_other_text_are_left_out() -> None:
    answer = ChatAnswer(9)
    scores = [{"token": "<think>", "logprob": -1}]
    answer.add({"choices": [{"delta": {"content": "{}"}, "logprobs": {"content": scores}, "finish_reason": "stop"}]})
    assert answer.completion().tokens == ()


def test_two_tool_calls_are_no_record() -> None:
    call = {"index": 0, "function": {"arguments": "{}"}}
    answer = outcome(
        sends({"choices": [{"delta": {"tool_calls": [call, call]}, "finish_reason": "tool_calls"}]}, "[DONE]"), structure="tool"
    )
    assert answer.text == "{}{}"


def test_a_server_without_a_count_has_its_pieces_counted() -> None:
    answer = outcome(sends(*({"choices": [{"delta": {"content": "1"}, "finish_reason": end}]} for end in (None, None, "stop"))))
    assert (answer.text, answer.usage) == ("111", Usage(0, 3))


def test_an_answer_that_does_not_end_is_cut_and_says_so() -> None:
    answer = outcome(endless())
    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.text.startswith("0 1 2 ")


ROW = '{"description":"Screws M4x20, zinc-plated","quantity":1,"unit_price":0.05,"amount":0.05},'


@pytest.mark.parametrize(
    ("row", "scored", "said"),
    [
        (ROW, False, f"repeats {ROW[:80]!r}… (89 characters) and was stopped after 2,"),
        ("\\n", False, r"repeats '\\n' and was stopped after 2,"),
        (ROW, True, f"repeats {ROW[:80]!r}… (1 tokens) and was stopped after 576 tokens"),
    ],
)
def test_an_answer_that_loops_is_cut_and_not_asked_again(row: str, scored: bool, said: str) -> None:
    with ChatServer(endless('{"lines":[', row, scored=scored)) as stub:
        (error,) = outcomes(stub, [request(max_tokens=4000)])
        assert stub.left.wait(20)
    assert (error.kind, said in str(error), len(stub.asked)) == ("loop", True, 1)


def test_a_table_of_equal_rows_that_ends_is_no_loop() -> None:
    answer = ChatAnswer(4000)
    for part in ['{"lines":[', *[ROW] * 20, "]}"]:
        answer.add({"choices": [{"delta": {"content": part}}]})
    answer.add({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    assert answer.completion().text.count(ROW) == 20


def test_rows_that_count_on_are_no_loop() -> None:
    answer = ChatAnswer(4000)
    for number in range(400):
        answer.add({"choices": [{"delta": {"content": f'{{"position":{number},"description":"Screws M4x20","amount":0.05}},'}}]})
    answer.add({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    assert answer.completion().finish_reason is FinishReason.STOP


def test_an_answer_that_comes_whole_is_no_loop_whatever_it_says() -> None:
    assert outcome(whole("x" * 9000)).text == "x" * 9000


@pytest.mark.parametrize(
    "event",
    [
        {"choices": [{"delta": {"refusal": "I cannot read that."}, "finish_reason": "stop"}]},
        {"choices": [{"delta": {}, "finish_reason": "content_filter"}]},
    ],
)
def test_a_model_that_declines_is_not_asked_again(event: Body) -> None:
    with ChatServer(sends(event, "[DONE]")) as stub:
        (error,) = outcomes(stub, [request()])
    assert (error.kind, "declines to answer" in str(error), len(stub.asked)) == ("refused", True, 1)


# Bad days

ONCE = {
    "429": status(429, Retry_After="0"),
    "500": status(500, "<html><h1>oops</h1></html>"),
    "503": status(503),
    "529": status(529),
    "no connection": lost,
    "cut": says(VALID, tail=Wire.cut),
    "ended early": sends({"choices": [{"delta": {"content": "{"}, "finish_reason": None}]}),
    "no JSON": sends('{"choices": [{'),
    "no event": sends({"choices": [{"delta": "x"}]}),
    "a list": sends([]),
    "an error within": sends({"choices": [{"delta": {"content": "{"}}]}, {"error": "CUDA out of memory"}),
    "429 within": sends({"error": {"message": "slow down", "code": 429}}),
    "500 within": sends({"error": {"message": "oops", "code": 500}}),
    "aborted": sends({"choices": [{"delta": {"content": "{"}, "finish_reason": "abort"}]}),
    "no body": lambda wire, _: wire.reply(200, ""),
}


@pytest.mark.parametrize("fault", ONCE)
def test_what_may_pass_is_asked_again(fault: str) -> None:
    with ChatServer(ONCE[fault], ONCE[fault], says(VALID)) as stub:
        (answer,) = outcomes(stub, [request()])
    assert (answer.text, len(stub.asked)) == (VALID, 3)


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (status(429, "slow down"), "busy", "answers 429: slow down; asked 4 times"),
        (status(500), "server", "answers 500: not now; asked 4 times"),
        (lost, "connection", "the connection was lost .*; asked 4 times"),
        (says(VALID, tail=Wire.cut), "connection", "the connection was lost"),
        (sends(), "connection", "ended before it was finished"),
        (sends("nonsense"), "garbled", "no JSON: 'nonsense'"),
        (sends({"error": {"message": "CUDA out of memory"}}), "server", "broke off: CUDA out of memory"),
    ],
)
def test_what_does_not_pass_fails_by_its_name(fault: Say, kind: str, said: str) -> None:
    with pytest.raises(DocumentError, match=said) as failed:
        raise outcome(fault)
    assert failed.value.kind == kind


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        (status(400, "bad " * 200), "refused", r"answers 400: (bad ){40,}bad…$"),
        (status(404, "no model"), "refused", "answers 404: no model"),
        (status(422), "refused", "answers 422: not now"),
        (status(400, "This model's maximum context length is 2048 tokens."), "too_long", "maximum context length is 2048"),
        (status(307, Location="http://elsewhere.example/v1"), "refused", "a redirect, which is not followed"),
        (sends({"error": {"message": "Invalid grammar", "code": 400}}, "[DONE]"), "refused", "answers 400: Invalid grammar"),
    ],
)
def test_a_refusal_is_not_asked_again(reply: Say, kind: str, said: str) -> None:
    with ChatServer(reply) as stub:
        (error,) = outcomes(stub, [request()])
    with pytest.raises(DocumentError, match=said):
        raise error
    assert (error.kind, len(stub.asked)) == (kind, 1)


def test_a_stalled_answer_is_noticed_and_asked_again() -> None:
    patience = RetryPolicy(idle_timeout_s=1.0, max_retries=1, backoff_s=0.005)
    with ChatServer(says(VALID[:8], tail=stalls), says(VALID)) as stub:
        (answer,) = outcomes(stub, [request()], patience)
    assert (answer.text, len(stub.asked)) == (VALID, 2)


def test_a_server_that_only_stalls_is_a_timeout() -> None:
    answer = outcome(says(VALID[:8], tail=stalls), patience=RetryPolicy(idle_timeout_s=0.2, max_retries=1, backoff_s=0.005))
    assert (answer.kind, str(answer)) == ("timeout", "nothing came for 0.2 s (model.idle_timeout_s); asked 2 times")


def test_an_answer_that_takes_too_long_is_cut_and_not_paid_for_twice() -> None:
    with ChatServer(endless()) as stub:
        (error,) = outcomes(stub, [request(max_tokens=10**9)], RetryPolicy(timeout_s=1.0, max_retries=3))
    assert (error.kind, "model.timeout_s" in str(error), len(stub.asked)) == ("timeout", True, 1)


def test_an_answer_whose_connection_stays_open_is_an_answer() -> None:
    def say(wire: Wire, _: Body) -> None:
        wire.begin()
        wire.event({"choices": [{"delta": {"content": VALID}, "finish_reason": "stop"}]})
        wire.event("[DONE]")
        stalls(wire)

    assert outcome(say).text == VALID


def test_as_many_are_asked_at_once_as_the_job_says_and_no_more() -> None:
    meeting, busy, most = Barrier(3), set[int](), list[int]()

    def say(wire: Wire, asked: Body) -> None:
        busy.add(id(wire))
        most.append(len(busy))
        meeting.wait(60)
        busy.discard(id(wire))
        says(VALID)(wire, asked)

    with ChatServer(say) as stub:
        answers = outcomes(stub, [request(key) for key in range(12)], RetryPolicy(concurrency=3, idle_timeout_s=100))
    assert ({answer.text for answer in answers}, max(most), len(stub.asked)) == ({VALID}, 3, 12)


def test_a_server_that_fails_thirty_percent_in_five_ways_answers_each_request_once() -> None:
    faults = [status(429, Retry_After="0"), status(502), says(VALID, tail=Wire.cut), sends("{no"), lost]
    chance, turn = np.random.default_rng(0), iter(range(10**6))

    def say(wire: Wire, asked: Body) -> None:
        number = asked["messages"][0]["content"]
        (faults[next(turn) % 5] if chance.random() < 0.3 else says(f'{{"n":"{number}"}}'))(wire, asked)

    with ChatServer(say) as stub:
        answers = outcomes(stub, [request(key) for key in range(100)], RetryPolicy(concurrency=8, max_retries=12, backoff_s=0.002))
    assert [answer.text for answer in answers] == [f'{{"n":"System {key}."}}' for key in range(100)]
    assert len(stub.asked) > 120


# How long is waited


def test_waits_grow_and_differ() -> None:
    for attempt in range(10):
        most = min(MAX_WAIT_S, 2.0**attempt)
        waits = {compute_wait_s(attempt, None, 1.0) for _ in range(20)}
        assert len(waits) > 1
        assert most / 2 <= min(waits) <= max(waits) <= most


def test_a_server_is_obeyed_about_when_to_come_back_up_to_a_bound() -> None:
    assert 7 <= compute_wait_s(0, parse_retry_after("7"), 1.0) <= 8
    assert MAX_TOLD_S <= compute_wait_s(0, parse_retry_after("86400"), 1.0) <= MAX_TOLD_S + 1


def test_retry_after_may_be_a_date() -> None:
    then = datetime.now(UTC) + timedelta(seconds=90)
    assert 80 < (parse_retry_after(format_datetime(then, usegmt=True)) or 0) <= 90
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


@pytest.mark.parametrize("header", ["", "soon", "-3", "1e9", "٣", "9" * 30])
def test_what_is_no_time_is_none(header: str) -> None:
    assert parse_retry_after(header) is None


# The server that is not there, and the engine that is closed


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address at which nobody listens, kept free by a socket that is bound and does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def test_nobody_there_is_the_end_of_the_engine(nowhere: str) -> None:
    with closing(openai.OpenAIEngine(nowhere, ServerProfile("m"), QUICK)) as engine, pytest.raises(EngineDead, match="cannot be reached"):
        asyncio.run(engine.complete(request()))


def test_a_closed_engine_tells_those_who_wait() -> None:
    async def close_while_waiting(engine: openai.OpenAIEngine, stub: ChatServer) -> None:
        waiting = asyncio.ensure_future(engine.complete(request()))
        while not stub.asked:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(engine.close)
        await waiting

    with ChatServer(says(VALID, tail=stalls)) as stub:
        engine = openai.OpenAIEngine(stub.base_url, ServerProfile("m"), QUICK)
        with pytest.raises(EngineDead, match="closed"):
            asyncio.run(close_while_waiting(engine, stub))
        with pytest.raises(EngineDead, match="closed"):
            asyncio.run(engine.complete(request()))


def test_a_request_beyond_the_jobs_limit_is_not_asked() -> None:
    with (
        ChatServer(says(VALID)) as stub,
        closing(openai.OpenAIEngine(stub.base_url, ServerProfile("m"), QUICK, max_request_tokens=75)) as engine,
    ):
        assert isinstance(asyncio.run(engine.complete(request(pages=1, max_tokens=69))), Completion)
        with pytest.raises(DocumentError, match=r"needs more than 76 tokens \(12 for its pages and up to 64 to write\)"):
            asyncio.run(engine.complete(request(pages=2)))


# What a server is


@pytest.mark.parametrize(
    ("obeys", "refuses", "way"),
    [
        (("json_schema", "tool"), (), "json_schema"),
        (("tool",), (), "tool"),
        (("tool",), ("json_schema",), "tool"),
        ((), ("tool",), "prompt"),
        ((), (), "prompt"),
        ((), ("json_schema", "tool", "logprobs"), "prompt"),
    ],
)
def test_a_server_is_asked_how_it_keeps_to_a_schema(workspace: Workspace, obeys: Sequence[str], refuses: Sequence[str], way: str) -> None:
    with ChatServer(says(VALID), obeys=obeys, refuses=refuses) as stub:
        found = engines.resolve_engine(job(workspace, stub), 0.0).sections.model
    assert (found.name, found.server, found.structure, found.logprobs) == ("stub-1", "other", way, "logprobs" not in refuses)
    assert stub.complaints == []


@pytest.mark.parametrize("refuse", [status(400, "'format' is not permitted"), sends({"error": {"message": "no", "code": 400}}, "[DONE]")])
def test_a_server_that_takes_no_schema_of_the_jobs_is_asked_another_way(workspace: Workspace, refuse: Say) -> None:
    def picky(wire: Wire, asked: Body) -> None:
        (refuse if "response_format" in asked else says(VALID))(wire, asked)

    with ChatServer(picky) as stub:
        assert engines.resolve_engine(job(workspace, stub), 0.0).sections.model.structure == "tool"


def test_vllm_is_known_by_its_list_of_models(workspace: Workspace) -> None:
    with ChatServer(says(VALID), owner="vllm") as stub:
        assert engines.resolve_engine(job(workspace, stub), 0.0).sections.model.server == "vllm"
    assert [seen(asked) for asked in stub.asked[-2:]] == [256, 1280]


def test_a_vllm_that_resizes_pages_stops_the_job(workspace: Workspace) -> None:
    said = r"resizes pages: pages of \d+x\d+ and \d+x\d+ px should differ by 1,024 tokens and differ by 744"
    with ChatServer(says(VALID), owner="vllm", most_tokens=1000) as stub, pytest.raises(JobError, match=said):
        engines.resolve_engine(job(workspace, stub), 0.0)


def test_a_vllm_is_not_asked_about_pages_that_all_have_one_size(workspace: Workspace) -> None:
    with ChatServer(says(VALID), owner="vllm") as stub:
        engines.resolve_engine(job(workspace, stub, "pages.resized_height=280", "pages.resized_width=430"), 0.0)
    assert seen(stub.asked[-1]) == 4


def test_what_was_found_out_is_not_asked_again(workspace: Workspace) -> None:
    with ChatServer(says(VALID)) as stub:
        chosen = engines.resolve_engine(job(workspace, stub), 0.0)
        asked = len(stub.asked)
        with closing(engines.load_engine(engines.resolve_engine(chosen, 0.0))) as engine:
            assert (engine.name, engine.model, len(stub.asked)) == ("openai", "stub-1", asked)


def test_what_the_job_says_is_not_found_out(workspace: Workspace) -> None:
    with ChatServer(says(VALID), models=None) as stub:
        said = job(workspace, stub, "model.name=mine", "model.structure=tool", "model.server=other", "model.logprobs=false")
        assert engines.resolve_engine(said, 0.0) is said
    assert stub.asked == []


def test_a_server_may_have_no_list_of_models(workspace: Workspace) -> None:
    with ChatServer(says(VALID), models=None) as stub:
        engines.check_engine(job(workspace, stub))
        assert engines.resolve_engine(job(workspace, stub, "model.name=demo"), 0.0).sections.model.name == "demo"
        with pytest.raises(JobError, match=r"it lists no model: say which one in model\.name"):
            engines.resolve_engine(job(workspace, stub), 0.0)


def test_of_several_models_the_job_must_say_which(workspace: Workspace) -> None:
    with ChatServer(says(VALID), models=["a", "b"]) as stub, pytest.raises(JobError, match=r"it lists 2 models \(a, b\): say which one"):
        engines.resolve_engine(job(workspace, stub), 0.0)


def test_a_server_that_refuses_everything_stops_the_job(workspace: Workspace) -> None:
    said = r"base_url http://127.* it refuses to be asked: the server answers 400: top_k is unknown"
    with ChatServer(status(400, "top_k is unknown"), refuses=["json_schema", "tool"]) as stub, pytest.raises(JobError, match=said):
        engines.resolve_engine(job(workspace, stub), 0.0)


def test_nobody_there_stops_the_job(workspace: Workspace, nowhere: str) -> None:
    for look in (engines.check_engine, lambda given: engines.resolve_engine(given, 0.0)):
        with pytest.raises(JobError, match=r"job\.yaml: model\.base_url http://127\.0\.0\.1:\d+/v1: .* cannot be reached"):
            look(job(workspace, nowhere))


def test_choosing_a_server_loads_no_model_library(workspace: Workspace) -> None:
    settings = ["model.engine=openai", "model.structure=tool", "model.server=other", "model.logprobs=true", "model.name=m"]
    code = (
        "import sys; from pipeline import Job, engines\n"
        "engines.load_engine(engines.resolve_engine(Job.load(sys.argv[1], sys.argv[2:]), 0)); print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, str(workspace.file), *settings, "model.base_url=http://127.0.0.1:1/v1"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert not {"torch", "transformers", "ray"} & set(loaded.stdout.split())


# The key


def test_the_key_comes_from_the_environment_and_goes_to_the_server_alone(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_KEY", f" {KEY}\n")
    with ChatServer(says(VALID), key=KEY) as stub:
        given = job(workspace, stub, "model.api_key_env=STUB_KEY")
        engines.check_engine(given)
        chosen = engines.resolve_engine(given, 0.0)
        with closing(engines.load_engine(chosen)) as engine:
            assert asyncio.run(engine.complete(request())).text == VALID
            assert KEY not in repr(vars(engine)) + repr(vars(vars(engine)["_endpoint"])["_client"].headers)
    assert KEY not in json.dumps([chosen.dump_keys(), chosen.decisive_keys]) + repr(chosen)


def test_a_key_that_a_server_repeats_is_not_passed_on(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_KEY", KEY)
    with ChatServer(status(400, f"{KEY} may not do that"), key="another") as stub:
        with pytest.raises(JobError, match=r"answers 401: Incorrect API key: Bearer \*\*\*"):
            engines.check_engine(job(workspace, stub, "model.api_key_env=STUB_KEY"))
        stub.key = None
        (error,) = outcomes(stub, [request()], key=KEY)
    assert str(error) == "the server answers 400: *** may not do that"


def test_a_redirect_gets_no_key() -> None:
    with ChatServer(says(VALID)) as elsewhere, ChatServer(status(307, Location=f"{elsewhere.base_url}/chat/completions")) as stub:
        (error,) = outcomes(stub, [request()], key=KEY)
    assert (error.kind, elsewhere.headers) == ("refused", [])


def test_a_missing_key_stops_the_job(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STUB_KEY", raising=False)
    with pytest.raises(JobError, match=r"model\.api_key_env names the environment variable STUB_KEY, which is not set"):
        engines.check_engine(job(workspace, "http://127.0.0.1:1/v1", "model.api_key_env=STUB_KEY"))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (f"model.api_key_env={KEY}", "api_key_env is not the name of an environment variable"),
        (f"model.base_url=https://user:{KEY}@host/v1", "base_url holds a user, a password or a query"),
        (f"model.base_url=https://host/v1?key={KEY}", "base_url holds a user, a password or a query"),
        ("model.base_url=localhost:8000", "base_url is not an http"),
        ("model.base_url=http://host/v1/chat/completions", "base_url ends in /chat/completions: remove that part"),
        ("model.base_url=null", "the engine openai needs base_url"),
        ("model.engine=transformers", "base_url is for the engine openai, and model.engine is transformers"),
        ("model.extra_body={messages: []}", "extra_body cannot change messages"),
    ],
)
def test_a_wrong_address_or_key_is_refused_without_repeating_it(workspace: Workspace, setting: str, said: str) -> None:
    with pytest.raises(JobError, match=said) as refused:
        job(workspace, "http://127.0.0.1:1/v1", setting)
    assert KEY not in str(refused.value).partition(": model: ")[2]


# The job


def test_a_model_is_the_same_behind_another_address(workspace: Workspace) -> None:
    one = job(workspace, "http://here/v1", "model.name=m")
    for same in ("base_url=https://there/v1", "api_key_env=K", "concurrency=2", "timeout_s=9", "max_retries=1", "without_gpu=demo"):
        assert job(workspace, "http://here/v1", "model.name=m", f"model.{same}").fingerprint == one.fingerprint
    for other in ("name=n", "image_format=jpeg", "extra_body={top_k: 1}", "structure=tool", "server=vllm"):
        assert job(workspace, "http://here/v1", "model.name=m", f"model.{other}").fingerprint != one.fingerprint


def test_settling_knows_what_the_run_found_out(workspace: Workspace) -> None:
    with ChatServer(says(VALID)) as stub:
        written = job(workspace, stub)
        chosen = engines.resolve_engine(written, 0.0)
    assert written.fingerprint != chosen.fingerprint == written.with_resolved_model(chosen.dump_keys()["model"]).fingerprint


def test_an_invalid_answer_is_asked_for_again_with_what_is_wrong(workspace: Workspace) -> None:
    row = {"key": "k", "first_page": 1, "last_page": 1, "page_count": 1, "pages": [{"height_px": 56, "width_px": 84}]}
    with ChatServer(says(VALID)) as stub:
        chosen = engines.resolve_engine(job(workspace, stub), 0.0)
        stub.says = [says(f"```json\n{VALID}\n```"), says(VALID)]
        with closing(engines.load_engine(chosen)) as engine:
            answered = asyncio.run(AskStage(chosen, engine).answer_row({**row, "pixels": [make_noise().tobytes()]}))
    assert (answered["status"], answered["asks"], answered["prompt_tokens"], answered["engine"]) == ("extracted", 2, 600, "openai")
    assert "That does not satisfy the schema" in stub.asked[-1]["messages"][-1]["content"]
    assert stub.complaints == []
