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
from pipeline.engines import structure
from pipeline.engines.background import Background
from pipeline.engines.chat import Broken, Dialect, body
from pipeline.engines.endpoint import Endpoint, Patience
from pipeline.errors import DocumentError, EngineDead, JobError
from pipeline.job import Job
from pipeline.records import Completion, Request

Value = TypeVar("Value")


class OpenAIEngine:
    """A server that answers elsewhere."""

    name = "openai"

    def __init__(
        self, base_url: str, dialect: Dialect, patience: Patience, key: str | None = None, max_request_tokens: int | None = None
    ) -> None:
        """Open no connection yet."""
        self.model, self.dialect, self.max_request_tokens = dialect.model, dialect, max_request_tokens
        self.background = Background("openai-engine")
        self._endpoint = Endpoint(base_url, key, patience)
        self._places = asyncio.Semaphore(patience.concurrency)

    async def complete(self, request: Request) -> Completion:
        """Return the answer to one request; from any event loop.

        Raises DocumentError when this request alone fails, EngineDead when the server cannot be reached any more.
        """
        check_length(request, self.max_request_tokens)
        return await self.background.answer(self.ask(request, self.dialect))

    def close(self) -> None:
        """Cut all connections. Requests still waiting fail with EngineDead."""
        self.background.close(last=self._endpoint.close)

    # What follows runs in the engine's own loop.

    async def ask(self, request: Request, dialect: Dialect) -> Completion:
        """Return the answer to a request; waits until one of the places is free, before its pages are written out."""
        async with self._places:
            written = await asyncio.to_thread(body, request, dialect)
            return await self._endpoint.ask(written, request.sampling.max_tokens)

    async def models(self) -> list[dict[str, Any]] | None:
        """Return the models that the server lists, as it describes them."""
        return await self._endpoint.models()


def check_length(request: Request, allowed: int | None) -> None:
    """Refuse a request whose pages and answer alone are more than the job allows; its words only the server can count."""
    images = [part for message in request.messages for part in message.parts if not isinstance(part, str)]
    read, written = sum(image.shape[0] * image.shape[1] // CELL_AREA for image in images), request.sampling.max_tokens
    if allowed and read + written > allowed:
        found = f"the request needs more than {read + written:,} tokens ({read:,} for its pages and up to {written:,} to write)"
        way_out = "lower pages.per_request or sampling.max_tokens, or raise limits.max_request_tokens"
        raise DocumentError("too_long", f"{found}, limits.max_request_tokens allows {allowed:,}: {way_out}")


def check(job: Job) -> None:
    """Ask the server whether it is there and takes the key; nothing else. Raises JobError."""
    looked_at(job, lambda engine: engine.models())


def resolve(job: Job) -> Job:
    """Return the job with what the server is in place of each `auto`. Costs up to a dozen short requests. Raises JobError."""
    model = job.sections.model
    if "auto" not in (model.name, model.server, model.structure) and model.logprobs is not None:
        return job
    return looked_at(job, lambda engine: survey(job, engine))


async def survey(job: Job, engine: OpenAIEngine) -> Job:
    """Find out the model's name, which server it is, how it keeps to the job's schema, and of vLLM whether pages keep their size."""
    model = job.sections.model
    cards = await engine.models() or [] if "auto" in (model.name, model.server) else []
    name = only(structure.listed(cards)) if model.name == "auto" else model.name
    server = model.server if model.server != "auto" else "vllm" if structure.is_vllm(cards) else "other"
    named = job.with_model(name=name, server=server)
    subject = structure.Subject(job.system, schema.compact(job.schema), job.sampling)
    wanted = None if model.structure == "auto" else model.structure
    found = await structure.probe(engine.ask, subject, dialect(named), wanted, model.logprobs)
    if found.vllm:
        await structure.check_sizes(engine.ask, subject, found, job.sections.pages.budget)
    return named.with_model(structure=found.structure, logprobs=found.logprobs)


def only(names: list[str]) -> str:
    """Return the one model that a server has."""
    if len(names) != 1:
        found = f"it lists {len(names)} models ({', '.join(names[:5])})" if names else "it lists no model"
        raise JobError(f"{found}: say which one in model.name")
    return names[0]


def looked_at(job: Job, look: Callable[[OpenAIEngine], Coroutine[Any, Any, Value]]) -> Value:
    """Return what a look at the job's server shows; whatever goes wrong is the job's fault, for nothing has started."""
    engine = load(job)
    try:
        return engine.background.wait(look(engine))
    except (Broken, DocumentError, JobError, EngineDead) as error:
        message = error.message if isinstance(error, Broken | DocumentError) else str(error)
        raise JobError(f"{job.file}: model.base_url {job.sections.model.base_url}: {message}") from None
    finally:
        engine.close()


def load(job: Job) -> OpenAIEngine:
    """Return the engine that speaks to the job's server. Raises JobError when its key is missing."""
    model = job.sections.model
    patience = Patience(model.concurrency, model.idle_timeout_s, model.timeout_s, model.max_retries)
    return OpenAIEngine(str(model.base_url), dialect(job), patience, key(job), job.sections.limits.max_request_tokens)


def dialect(job: Job) -> Dialect:
    """Return how the job says its server is spoken to."""
    model = job.sections.model
    return Dialect(
        model.name,
        structure="prompt" if model.structure == "auto" else model.structure,
        vllm=model.server == "vllm",
        logprobs=bool(model.logprobs),
        image_format=model.image_format,
        extra=model.extra_body,
    )


def key(job: Job) -> str | None:
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
