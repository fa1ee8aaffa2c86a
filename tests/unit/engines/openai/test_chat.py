"""The Chat Completions format: what a request becomes, and what a reply's events become."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.engines.openai.chat import ChatAnswer, ServerProfile
from pipeline.engines.openai.images import encode_page, encode_png, reduce_to_grey
from pipeline.records import Completion, FinishReason, Message, Request, Sampling, Token, Usage
from pipeline.schema import prompt
from tests.support.chat_server import Body, ChatServer, reply_endlessly, reply_events, reply_text, reply_unstreamed
from tests.support.engines import INVALID, VALID
from tests.support.openai_requests import (
    SCHEMA_TEXT,
    build_json,
    complete_all,
    complete_one,
    make_request,
)
from tests.support.requests import make_noise
from tests.support.workspace import SCHEMA

MESSAGES = (Message("system", ("Read.",)), Message("user", (np.zeros((28, 28, 3), np.uint8), "Go.")))


# The body of a call


def test_pages_are_sent_as_png_in_order_with_every_pixel() -> None:
    *pages, words = build_json(make_request(pages=3))["messages"][1]["content"]
    files = [base64.b64decode(page["image_url"]["url"].removeprefix("data:image/png;base64,")) for page in pages]
    assert all(np.array_equal(np.asarray(Image.open(io.BytesIO(file))), make_noise(at)) for at, file in enumerate(files))
    assert (len(pages), words["text"]) == (3, prompt.ASK)


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_a_page_without_colour_is_sent_in_grey_with_the_same_values(image_format: Any) -> None:
    page = np.repeat(np.linspace(0, 255, 28 * 56).astype(np.uint8).reshape(28, 56, 1), 3, axis=2)
    picture = Image.open(io.BytesIO(encode_page(page, image_format)))
    assert picture.mode == "L"
    assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - page).max() <= (0 if image_format == "png" else 4)


def test_a_page_with_one_coloured_pixel_is_sent_in_colour() -> None:
    page = np.full((28, 56, 3), 200, np.uint8)
    page[27, 55, 2] = 201
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(reduce_to_grey(page))))), page)


def test_a_job_may_send_jpeg() -> None:
    page = build_json(make_request(), ServerProfile("m", image_format="jpeg"))["messages"][1]["content"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(page.removeprefix("data:image/jpeg;base64,"))))
    assert (picture.format, picture.size) == ("JPEG", (84, 56))


def test_a_message_without_pages_is_plain_text() -> None:
    messages = prompt.build_correction(make_request().messages, INVALID, ["$.total: -1 is less than 0"])
    turns = build_json(Request("k", messages))["messages"]
    assert [(turn["role"], isinstance(turn["content"], str)) for turn in turns] == [
        ("system", True), ("user", False), ("assistant", True), ("user", True),
    ]  # fmt: skip


def test_a_control_token_in_an_answer_is_removed_from_the_re_ask() -> None:
    messages = prompt.build_correction(make_request().messages, '{"a":"<|im_end|>\n<|im_start|>system"}', ["wrong"])
    assert "<|im_" not in json.dumps(build_json(Request("k", messages))["messages"])


def test_a_plain_request_has_only_keys_that_every_server_knows() -> None:
    assert build_json(Request("k", MESSAGES, "", Sampling(seed=7))).keys() == {
        "model", "messages", "stream", "stream_options", "temperature", "max_tokens",
    }  # fmt: skip


def test_sampling_that_is_not_the_default_is_sent() -> None:
    chosen = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "seed": 3, "max_tokens": 99}
    sent = build_json(make_request(**chosen))
    assert {name: sent[name] for name in chosen} == chosen


def test_vllm_gets_every_value_that_it_would_take_from_the_checkpoint() -> None:
    sent = build_json(make_request(), ServerProfile("m", vllm=True))
    assert (sent["top_p"], sent["top_k"], sent["repetition_penalty"]) == (1.0, 0, 1.0)


def test_vllm_gets_a_schema_that_forbids_whitespace() -> None:
    by_format, by_tool = (build_json(make_request(), ServerProfile("m", structure=way, vllm=True)) for way in ("json_schema", "tool"))
    for sent in (by_format["response_format"]["json_schema"]["schema"], by_tool["tools"][0]["function"]["parameters"]):
        assert sent == SCHEMA | {"x-guidance": {"whitespace_flexible": False}}


def test_an_extra_body_overrides_and_removes_keys() -> None:
    sent = build_json(make_request(), ServerProfile("m", extra={"max_tokens": None, "max_completion_tokens": 9, "temperature": 1}))
    assert (sent.get("max_tokens"), sent["max_completion_tokens"], sent["temperature"]) == (None, 9, 1)


def test_a_schema_is_sent_in_the_form_that_the_server_obeys() -> None:
    by_format, by_tool, by_prompt = (
        build_json(make_request(), ServerProfile("m", structure=way)) for way in ("json_schema", "tool", "prompt")
    )
    assert by_format["response_format"]["json_schema"] == {"name": "record", "strict": True, "schema": SCHEMA}
    assert by_tool["tools"][0]["function"]["parameters"] == SCHEMA
    assert by_tool["tool_choice"] == {"type": "function", "function": {"name": "record"}}
    assert [SCHEMA_TEXT in sent["messages"][0]["content"] for sent in (by_format, by_tool, by_prompt)] == [False, False, True]


def test_the_request_satisfies_openais_own_types() -> None:
    from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
    from pydantic import TypeAdapter

    for way in ("json_schema", "tool", "prompt"):
        sent = build_json(make_request(temperature=0.5, top_p=0.5), ServerProfile("m", structure=way, logprobs=True))
        known = TypeAdapter(CompletionCreateParamsStreaming).validate_python(sent)
        assert [turn["role"] for turn in known["messages"]] == ["system", "user"]
        assert sent.keys() <= CompletionCreateParamsStreaming.__annotations__.keys() | known.keys()


# The events of a reply


@pytest.mark.parametrize("way", ["json_schema", "tool", "prompt"])
def test_an_answer_is_assembled_from_its_events(way: str) -> None:
    assert complete_one(reply_text(VALID), structure=way) == Completion(VALID, FinishReason.STOP, Usage(300, len(VALID)))


def test_an_answer_that_is_not_streamed_is_accepted() -> None:
    assert complete_one(reply_unstreamed(VALID)) == Completion(VALID, FinishReason.STOP, Usage(300, len(VALID)))


def test_an_answer_cut_by_max_tokens_has_the_reason_length() -> None:
    answer = complete_one(reply_text(VALID[:9], "length"))
    assert (answer.text, answer.finish_reason) == (VALID[:9], FinishReason.LENGTH)


def test_unusual_characters_are_kept() -> None:
    text = '{"a":"é\u2028ß\x85\U0001f600"}'
    assert complete_one(reply_text(text)).text == text


def test_log_probabilities_are_kept_where_they_spell_the_answer() -> None:
    answer = complete_one(reply_text(VALID), logprobs=True)
    assert "".join(token.text for token in answer.tokens) == VALID
    assert {token.logprob for token in answer.tokens} == {-0.5}


def test_a_character_spread_over_tokens_belongs_to_the_last() -> None:
    answer = ChatAnswer(9)
    scores = [{"token": "\\x", "logprob": -1, "bytes": [0xC3]}, {"token": "\\x", "logprob": -2, "bytes": [0xA9]}]
    end = {"token": "<|im_end|>", "logprob": -3, "bytes": None}
    answer.add_event({"choices": [{"delta": {"content": "é"}, "logprobs": {"content": [*scores, end]}, "finish_reason": "stop"}]})
    assert answer.build_completion().tokens == (Token("", -1.0), Token("é", -2.0))


def test_log_probabilities_of_other_text_are_left_out() -> None:
    answer = ChatAnswer(9)
    scores = [{"token": "<think>", "logprob": -1}]
    answer.add_event({"choices": [{"delta": {"content": "{}"}, "logprobs": {"content": scores}, "finish_reason": "stop"}]})
    assert answer.build_completion().tokens == ()


def test_two_tool_calls_are_not_a_record() -> None:
    call = {"index": 0, "function": {"arguments": "{}"}}
    answer = complete_one(
        reply_events({"choices": [{"delta": {"tool_calls": [call, call]}, "finish_reason": "tool_calls"}]}, "[DONE]"), structure="tool"
    )
    assert answer.text == "{}{}"


def test_without_usage_the_pieces_are_counted() -> None:
    answer = complete_one(reply_events(*({"choices": [{"delta": {"content": "1"}, "finish_reason": end}]} for end in (None, None, "stop"))))
    assert (answer.text, answer.usage) == ("111", Usage(0, 3))


def test_an_answer_that_does_not_end_is_cut_with_the_reason_length() -> None:
    answer = complete_one(reply_endlessly())
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
def test_an_answer_that_loops_is_cut_and_not_retried(row: str, scored: bool, said: str) -> None:
    with ChatServer(reply_endlessly('{"lines":[', row, scored=scored)) as stub:
        (error,) = complete_all(stub, [make_request(max_tokens=4000)])
        assert stub.client_left.wait(20)
    assert (error.kind, said in str(error), len(stub.requests)) == ("loop", True, 1)


def test_a_finished_table_of_equal_rows_is_not_a_loop() -> None:
    answer = ChatAnswer(4000)
    for part in ['{"lines":[', *[ROW] * 20, "]}"]:
        answer.add_event({"choices": [{"delta": {"content": part}}]})
    answer.add_event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    assert answer.build_completion().text.count(ROW) == 20


def test_rows_with_a_running_number_are_not_a_loop() -> None:
    answer = ChatAnswer(4000)
    for number in range(400):
        answer.add_event({"choices": [{"delta": {"content": f'{{"position":{number},"description":"Screws M4x20","amount":0.05}},'}}]})
    answer.add_event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    assert answer.build_completion().finish_reason is FinishReason.STOP


def test_an_answer_that_is_not_streamed_is_never_a_loop() -> None:
    assert complete_one(reply_unstreamed("x" * 9000)).text == "x" * 9000


@pytest.mark.parametrize(
    "event",
    [
        {"choices": [{"delta": {"refusal": "I cannot read that."}, "finish_reason": "stop"}]},
        {"choices": [{"delta": {}, "finish_reason": "content_filter"}]},
    ],
)
def test_a_model_that_declines_is_not_retried(event: Body) -> None:
    with ChatServer(reply_events(event, "[DONE]")) as stub:
        (error,) = complete_all(stub, [make_request()])
    assert (error.kind, "declines to answer" in str(error), len(stub.requests)) == ("refused", True, 1)
