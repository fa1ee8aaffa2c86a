"""Requests, jobs and one-call helpers for tests of the engine `openai`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from pipeline.engines.openai import OpenAIEngine
from pipeline.engines.openai.chat import ServerProfile, build_body
from pipeline.engines.openai.client import RetryPolicy
from pipeline.job import Job
from pipeline.records import Request, Sampling
from pipeline.schema import prompt
from tests.support.chat_server import Body, ChatServer, Reply
from tests.support.requests import make_noise
from tests.support.workspace import SCHEMA, Workspace

SCHEMA_TEXT = json.dumps(SCHEMA)
KEY = "sk-very-secret-0123456789"
FAST_POLICY = RetryPolicy(concurrency=8, idle_timeout_s=20, timeout_s=40, max_retries=3, backoff_s=0.005)


def make_request(number: int = 0, schema: str = SCHEMA_TEXT, pages: int = 1, **sampling: Any) -> Request:
    """Return a request about pages of noise that differ with its number."""
    images = [make_noise(number + page) for page in range(pages)]
    return Request(str(number), prompt.build_messages(f"System {number}.", images), schema, Sampling(**{"max_tokens": 64, **sampling}))


def build_json(request: Request, profile: ServerProfile = ServerProfile("m")) -> Body:  # noqa: B008  # frozen
    """Return a request's body as the server parses it."""
    body: Body = json.loads(build_body(request, profile))
    return body


def complete_all(
    stub: ChatServer, requests: Sequence[Request], policy: RetryPolicy = FAST_POLICY, key: str | None = None, **profile: Any
) -> list[Any]:
    """Send all requests at once; return each one's completion or exception."""

    async def gather(engine: OpenAIEngine) -> list[Any]:
        return await asyncio.gather(*map(engine.complete, requests), return_exceptions=True)

    with closing(OpenAIEngine(stub.base_url, ServerProfile("stub-1", **{"structure": "json_schema", **profile}), policy, key)) as engine:
        outcomes = asyncio.run(gather(engine))
    assert stub.complaints == []
    return outcomes


def complete_one(*replies: Reply, policy: RetryPolicy = FAST_POLICY, **profile: Any) -> Any:
    """Return the completion or exception of one request to a server that gives these replies."""
    with ChatServer(*replies) as stub:
        (outcome,) = complete_all(stub, [make_request()], policy, **profile)
    return outcome


def make_openai_job(workspace: Workspace, server: ChatServer | str, *settings: str) -> Job:
    """Return a job whose engine is this server, given by its stub or its address."""
    address = server if isinstance(server, str) else server.base_url
    return workspace.job("model.engine=openai", f"model.base_url={address}", "model.name=auto", "model.max_retries=0", *settings)
