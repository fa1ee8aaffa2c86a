"""A Chat Completions server with a model behind it: the engine `transformers`, so that all engines can be asked the same.

A stub that answers as it is told cannot say what became of the pages on their way.
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
from tests.support.chat_server import Body, Say, Wire, status

TAKEN = ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed")


def answering(engine: TransformersEngine) -> Say:
    """Answer with what the model makes of a request's own bytes."""

    def say(wire: Wire, body: Body) -> None:
        try:
            answer = asyncio.run(engine.complete(read(body)))
        except DocumentError as error:
            return status(400, error.message)(wire, body)
        except EngineDead:
            return wire.cut()
        return write(wire, answer)

    return say


def read(body: Body) -> Request:
    """Return the request that a body asks."""
    sampling = Sampling(**{name: body[name] for name in TAKEN if name in body})
    schema = json.dumps(body["response_format"]["json_schema"]["schema"]) if "response_format" in body else ""
    return Request("", tuple(Message(turn["role"], tuple(parts(turn["content"]))) for turn in body["messages"]), schema, sampling)


def parts(content: Any) -> list[Any]:
    """Return a message's texts and pages."""
    if isinstance(content, str):
        return [content]
    return [part["text"] if part["type"] == "text" else page(part["image_url"]["url"]) for part in content]


def page(url: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")).copy()


def write(wire: Wire, answer: Completion) -> None:
    """Stream an answer token by token."""
    wire.begin()
    for token in answer.tokens:
        scores = {"content": [{"token": token.text, "logprob": token.logprob}]}
        wire.event({"choices": [{"index": 0, "delta": {"content": token.text}, "finish_reason": None, "logprobs": scores}]})
    wire.event({"choices": [{"index": 0, "delta": {}, "finish_reason": str(answer.finish_reason)}]})
    read, written = answer.usage.prompt_tokens, answer.usage.completion_tokens
    wire.event({"choices": [], "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}})
    wire.event("[DONE]")
    wire.end()
