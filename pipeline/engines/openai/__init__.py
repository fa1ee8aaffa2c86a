"""Engine `openai`: requests with page images come in, completions go out, with log-probabilities where the server reports them.
A server with OpenAI's Chat Completions API, such as vLLM's or a hosted one, answers them; a request that it refuses raises DocumentError.

Before a run starts, `check_server` asks whether the server is there, and `resolve_server` finds out what it can do and returns the
job with that in place of each `auto`: the run's actors do not repeat the probe, and `job.yaml` records its result.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pipeline.budget import CELL_PX, ImageSize, count_visual_tokens
from pipeline.engines.event_loop import EventLoopThread
from pipeline.engines.openai import probe
from pipeline.engines.openai.chat import RetryableError, ServerProfile, build_body
from pipeline.engines.openai.client import ChatClient, RetryPolicy
from pipeline.errors import DocumentError, EngineDead, JobError
from pipeline.job import Job
from pipeline.records import Completion, Request

Value = TypeVar("Value")


class OpenAIEngine:
    """A server that is reached by HTTP."""

    name = "openai"

    def __init__(
        self, base_url: str, profile: ServerProfile, policy: RetryPolicy, key: str | None = None, max_request_tokens: int | None = None,
        cell_px: int = CELL_PX,
    ) -> None:  # fmt: skip
        """Start the engine's event loop. Connections are opened by the first requests."""
        self.model, self.profile, self.max_request_tokens, self._cell_px = profile.model, profile, max_request_tokens, cell_px
        self.loop_thread = EventLoopThread("openai-engine")
        self._client = ChatClient(base_url, key, policy)
        self._slots = asyncio.Semaphore(policy.concurrency)

    async def complete(self, request: Request) -> Completion:
        """Return the answer to one request; called from any event loop.

        Raises DocumentError when only this request fails, EngineDead when the server cannot be reached any more.
        """
        check_page_tokens(request, self.max_request_tokens, self._cell_px)
        return await self.loop_thread.run(self.send(request, self.profile))

    def measure_silence_s(self) -> float:
        """Return 0: the limits on time of a call (`model.idle_timeout_s`, `model.timeout_s`) end one that gets no answer."""
        return 0.0

    def close(self) -> None:
        """Close all connections. Requests still waiting fail with EngineDead."""
        self.loop_thread.close(on_close=self._client.close)

    # The following methods run in the engine's own loop.

    async def send(self, request: Request, profile: ServerProfile) -> Completion:
        """Return the answer to one request. Its body, which holds the pages, is built when one of the `concurrency` slots is free."""
        async with self._slots:
            body = await asyncio.to_thread(build_body, request, profile)
            return await self._client.complete(body, request.sampling.max_tokens)

    async def fetch_models(self) -> list[dict[str, Any]] | None:
        """Return the server's list of models; None if it has no such list."""
        return await self._client.fetch_models()


def check_page_tokens(request: Request, max_request_tokens: int | None, cell_px: int) -> None:
    """Raise DocumentError for a request whose pages and answer alone exceed the job's limit; its text only the server can count."""
    images = [part for message in request.messages for part in message.parts if not isinstance(part, str)]
    read = sum(count_visual_tokens(ImageSize(image.shape[1], image.shape[0]), cell_px) for image in images)
    written = request.sampling.max_tokens
    if max_request_tokens and read + written > max_request_tokens:
        found = f"the request needs more than {read + written:,} tokens ({read:,} for its pages and up to {written:,} to write)"
        way_out = "lower pages.per_request or sampling.max_tokens, or raise limits.max_request_tokens"
        raise DocumentError("too_long", f"{found}, limits.max_request_tokens allows {max_request_tokens:,}: {way_out}")


def check_server(job: Job) -> None:
    """Check that the server can be reached and accepts the key; nothing else. Raises JobError."""
    inspect_server(job, lambda engine: engine.fetch_models())


def resolve_server(job: Job) -> Job:
    """Return the job with what the server can do in place of each `auto`. Costs up to a dozen short requests. Raises JobError."""
    model = job.sections.model
    if "auto" not in (model.name, model.server, model.structure) and model.logprobs is not None:
        return job
    return inspect_server(job, lambda engine: survey_server(job, engine))


async def survey_server(job: Job, engine: OpenAIEngine) -> Job:
    """Return the job with the model's name, the kind of server and its way of structured output; check that vLLM resizes no page."""
    model = job.sections.model
    cards = await engine.fetch_models() or [] if "auto" in (model.name, model.server) else []
    name = select_only_model(probe.list_models(cards)) if model.name == "auto" else model.name
    server = model.server if model.server != "auto" else "vllm" if probe.is_vllm_server(cards) else "other"
    named = job.with_model(name=name, server=server)
    subject = probe.ProbeSubject(job.system_message, job.request_schema, job.sampling)
    wanted = None if model.structure == "auto" else model.structure
    found = await probe.probe_server(engine.send, subject, build_server_profile(named), wanted, model.logprobs)
    if found.vllm:
        await probe.check_page_sizes(engine.send, subject, found, job.budget)
    return named.with_model(structure=found.structure, logprobs=found.logprobs)


def select_only_model(names: list[str]) -> str:
    """Return the only name in a list of models. Raises JobError."""
    if len(names) != 1:
        found = f"it lists {len(names)} models ({', '.join(names[:5])})" if names else "it lists no model"
        raise JobError(f"{found}: say which one in model.name")
    return names[0]


def inspect_server(job: Job, inspect: Callable[[OpenAIEngine], Coroutine[Any, Any, Value]]) -> Value:
    """Return what `inspect` returns for an engine of the job's server. Every error becomes a JobError, because no run has started."""
    engine = load_openai_engine(job)
    try:
        return engine.loop_thread.run_blocking(inspect(engine))
    except (RetryableError, DocumentError, JobError, EngineDead) as error:
        message = error.message if isinstance(error, RetryableError | DocumentError) else str(error)
        raise JobError(f"{job.file}: model.base_url {job.sections.model.base_url}: {message}", job.file, "model.base_url") from None
    finally:
        engine.close()


def load_openai_engine(job: Job) -> OpenAIEngine:
    """Return the engine for the job's server. Raises JobError when its key is missing."""
    model = job.sections.model
    policy = RetryPolicy(model.concurrency, model.idle_timeout_s, model.timeout_s, model.max_retries)
    longest, cell_px = job.sections.limits.max_request_tokens, job.budget.cell_px
    return OpenAIEngine(str(model.base_url), build_server_profile(job), policy, read_api_key(job), longest, cell_px)


def build_server_profile(job: Job) -> ServerProfile:
    """Return the server's profile as the job gives it."""
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
    """Return the key from the environment variable that the job names; None if it names none. Raises JobError."""
    name = job.sections.model.api_key_env
    if name is None:
        return None
    found = os.environ.get(name, "").strip()
    if not found:
        raise JobError(
            f"{job.file}: model.api_key_env names the environment variable {name}, which is not set", job.file, "model.api_key_env"
        )
    if not (found.isascii() and found.isprintable()):
        raise JobError(
            f"{job.file}: the environment variable {name} (model.api_key_env) holds characters that cannot be part of a key",
            job.file,
            "model.api_key_env",
        )
    return found
