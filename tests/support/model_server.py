"""Chat Completions server in front of the engine `transformers`, so that all engines can be asked the same.

A stub with scripted replies cannot show what became of the pages on their way.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from pipeline.engines.transformers import TransformersEngine
from pipeline.errors import DocumentError, EngineDead
from pipeline.records import Completion, Message, Request, Sampling
from tests.support.chat_server import Body, Connection, Reply, reply_status

SAMPLING_KEYS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed")


def reply_by_engine(engine: TransformersEngine) -> Reply:
    """Answer with what the model makes of a request's own bytes."""

    def reply(connection: Connection, body: Body) -> None:
        try:
            answer = asyncio.run(engine.complete(parse_request(body)))
        except DocumentError as error:
            return reply_status(400, error.message)(connection, body)
        except EngineDead:
            return connection.drop()
        return stream_completion(connection, answer)

    return reply


def parse_request(body: Body) -> Request:
    """Return the request that a body asks."""
    sampling = Sampling(**{name: body[name] for name in SAMPLING_KEYS if name in body})
    schema = json.dumps(body["response_format"]["json_schema"]["schema"]) if "response_format" in body else ""
    return Request("", tuple(Message(turn["role"], tuple(parse_parts(turn["content"]))) for turn in body["messages"]), schema, sampling)


def parse_parts(content: Any) -> list[Any]:
    """Return a message's texts and pages."""
    if isinstance(content, str):
        return [content]
    return [part["text"] if part["type"] == "text" else decode_page(part["image_url"]["url"]) for part in content]


def decode_page(url: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")).copy()


def stream_completion(connection: Connection, answer: Completion) -> None:
    """Stream an answer token by token."""
    connection.begin_stream()
    for token in answer.tokens:
        scores = {"content": [{"token": token.text, "logprob": token.logprob}]}
        connection.send_event({"choices": [{"index": 0, "delta": {"content": token.text}, "finish_reason": None, "logprobs": scores}]})
    connection.send_event({"choices": [{"index": 0, "delta": {}, "finish_reason": str(answer.finish_reason)}]})
    read, written = answer.usage.prompt_tokens, answer.usage.completion_tokens
    connection.send_event({"choices": [], "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}})
    connection.send_event("[DONE]")
    connection.end_stream()
