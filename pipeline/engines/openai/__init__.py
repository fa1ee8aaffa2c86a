"""Requests -> answers by a server that speaks OpenAI's Chat Completions. Knows no document and no Ray.

`check` and `resolve` ask the server what it is before anything starts; what they find stands in the job from then on, so that
the actors of a run need not ask again and `job.yaml` says it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pipeline import schema
from pipeline.budget import CELL_AREA
from pipeline.engines.event_loop import EventLoopThread
from pipeline.engines.openai import probe
from pipeline.engines.openai.chat import RetryableError, ServerProfile, build_body
from pipeline.engines.openai.client import ChatClient, RetryPolicy
from pipeline.errors import DocumentError, EngineDead, JobError
from pipeline.job import Job
from pipeline.records import Completion, Request

Value = TypeVar("Value")


class OpenAIEngine:
    """A server that answers elsewhere."""

    name = "openai"

    def __init__(
        self, base_url: str, dialect: ServerProfile, patience: RetryPolicy, key: str | None = None, max_request_tokens: int | None = None
    ) -> None:
        """Open no connection yet."""
        self.model, self.dialect, self.max_request_tokens = dialect.model, dialect, max_request_tokens
        self.background = EventLoopThread("openai-engine")
        self._endpoint = ChatClient(base_url, key, patience)
        self._places = asyncio.Semaphore(patience.concurrency)

    async def complete(self, request: Request) -> Completion:
        """Return the answer to one request; from any event loop.

        Raises DocumentError when this request alone fails, EngineDead when the server cannot be reached any more.
        """
        check_page_tokens(request, self.max_request_tokens)
        return await self.background.answer(self.ask(request, self.dialect))

    def close(self) -> None:
        """Cut all connections. Requests still waiting fail with EngineDead."""
        self.background.close(last=self._endpoint.close)

    # What follows runs in the engine's own loop.

    async def ask(self, request: Request, dialect: ServerProfile) -> Completion:
        """Return the answer to a request; waits until one of the places is free, before its pages are written out."""
        async with self._places:
            written = await asyncio.to_thread(build_body, request, dialect)
            return await self._endpoint.ask(written, request.sampling.max_tokens)

    async def models(self) -> list[dict[str, Any]] | None:
        """Return the models that the server lists, as it describes them."""
        return await self._endpoint.models()


def check_page_tokens(request: Request, allowed: int | None) -> None:
    """Refuse a request whose pages and answer alone are more than the job allows; its words only the server can count."""
    images = [part for message in request.messages for part in message.parts if not isinstance(part, str)]
    read, written = sum(image.shape[0] * image.shape[1] // CELL_AREA for image in images), request.sampling.max_tokens
    if allowed and read + written > allowed:
        found = f"the request needs more than {read + written:,} tokens ({read:,} for its pages and up to {written:,} to write)"
        way_out = "lower pages.per_request or sampling.max_tokens, or raise limits.max_request_tokens"
        raise DocumentError("too_long", f"{found}, limits.max_request_tokens allows {allowed:,}: {way_out}")


def check_server(job: Job) -> None:
    """Ask the server whether it is there and takes the key; nothing else. Raises JobError."""
    inspect_server(job, lambda engine: engine.models())


def resolve_server(job: Job) -> Job:
    """Return the job with what the server is in place of each `auto`. Costs up to a dozen short requests. Raises JobError."""
    model = job.sections.model
    if "auto" not in (model.name, model.server, model.structure) and model.logprobs is not None:
        return job
    return inspect_server(job, lambda engine: survey_server(job, engine))


async def survey_server(job: Job, engine: OpenAIEngine) -> Job:
    """Find out the model's name, which server it is, how it keeps to the job's schema, and of vLLM whether pages keep their size."""
    model = job.sections.model
    cards = await engine.models() or [] if "auto" in (model.name, model.server) else []
    name = select_only_model(probe.list_models(cards)) if model.name == "auto" else model.name
    server = model.server if model.server != "auto" else "vllm" if probe.is_vllm_server(cards) else "other"
    named = job.with_model(name=name, server=server)
    subject = probe.ProbeSubject(job.system_message, schema.dump_compact_schema(job.schema), job.sampling)
    wanted = None if model.structure == "auto" else model.structure
    found = await probe.probe_server(engine.ask, subject, build_server_profile(named), wanted, model.logprobs)
    if found.vllm:
        await probe.check_page_sizes(engine.ask, subject, found, job.sections.pages.budget)
    return named.with_model(structure=found.structure, logprobs=found.logprobs)


def select_only_model(names: list[str]) -> str:
    """Return the one model that a server has."""
    if len(names) != 1:
        found = f"it lists {len(names)} models ({', '.join(names[:5])})" if names else "it lists no model"
        raise JobError(f"{found}: say which one in model.name")
    return names[0]


def inspect_server(job: Job, look: Callable[[OpenAIEngine], Coroutine[Any, Any, Value]]) -> Value:
    """Return what a look at the job's server shows; whatever goes wrong is the job's fault, for nothing has started."""
    engine = load_openai_engine(job)
    try:
        return engine.background.wait(look(engine))
    except (RetryableError, DocumentError, JobError, EngineDead) as error:
        message = error.message if isinstance(error, RetryableError | DocumentError) else str(error)
        raise JobError(f"{job.file}: model.base_url {job.sections.model.base_url}: {message}") from None
    finally:
        engine.close()


def load_openai_engine(job: Job) -> OpenAIEngine:
    """Return the engine that speaks to the job's server. Raises JobError when its key is missing."""
    model = job.sections.model
    patience = RetryPolicy(model.concurrency, model.idle_timeout_s, model.timeout_s, model.max_retries)
    return OpenAIEngine(str(model.base_url), build_server_profile(job), patience, read_api_key(job), job.sections.limits.max_request_tokens)


def build_server_profile(job: Job) -> ServerProfile:
    """Return how the job says its server is spoken to."""
    model = job.sections.model
    return ServerProfile(
        model.name,
        structure="prompt" if model.structure == "auto" else model.structure,
        vllm=model.server == "vllm",
        logprobs=bool(model.logprobs),
        image_format=model.image_format,
        extra=model.extra_body,
    )


def read_api_key(job: Job) -> str | None:
    """Return the key from the environment variable that the job names."""
    name = job.sections.model.api_key_env
    if name is None:
        return None
    found = os.environ.get(name, "").strip()
    if not found:
        raise JobError(f"{job.file}: model.api_key_env names the environment variable {name}, which is not set")
    if not (found.isascii() and found.isprintable()):
        raise JobError(f"{job.file}: the environment variable {name} (model.api_key_env) holds characters that no key has")
    return found
