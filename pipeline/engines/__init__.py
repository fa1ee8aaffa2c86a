"""Engines answer requests. One protocol, one file for each way of serving; batching is each engine's own business."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from pipeline import decoding, schema
from pipeline.demo import CHECKPOINT
from pipeline.engines import files
from pipeline.errors import JobError, PipelineError, RunError
from pipeline.job import Job
from pipeline.records import Completion, Request


class Engine(Protocol):
    """A loaded model that answers.

    Runs without Ray, so that it can be tested and measured alone. Hundreds of `complete` calls may wait at once.
    """

    name: str
    """`transformers`, `vllm` or `openai`."""
    model: str
    """The checkpoint's hub id or folder, as records show it."""

    async def complete(self, request: Request) -> Completion:
        """Return the answer to one request.

        Raises DocumentError when this request alone cannot be answered (too long, unusable schema), EngineDead when
        the engine is beyond use.
        """
        ...

    def close(self) -> None:
        """Release the model. Requests still waiting fail with EngineDead."""
        ...


def choose(job: Job, gpus: float) -> Job:
    """Return the job as it can run here: without a GPU, as `model.without_gpu` says. The demonstration model says its revision.

    A server needs no GPU here: it is asked which model it has and how it keeps to the schema, and the job says so from then on.
    """
    model = job.sections.model
    if model.engine == "openai":
        need_client(job)
        from pipeline.engines import openai

        return openai.resolve(job)
    if job.uses_demo or (not gpus and model.without_gpu == "demo"):
        return job.with_demo()
    if gpus or model.without_gpu == "cpu":
        return job
    raise JobError(
        f"{job.file}: there is no GPU for {model.name}; set model.without_gpu to demo (the small demonstration model) or cpu (very slow), "
        "or run on a machine with one"
    )


def need_client(job: Job) -> None:
    """Raise JobError where the library that speaks to servers is missing."""
    if find_spec("httpx2") is None:
        raise JobError(f"{job.file}: model.engine is openai, which needs the package httpx2: pip install 'pipeline[openai]'")


def gpu_count() -> int:
    """Return how many GPUs this machine has."""
    import torch

    return torch.cuda.device_count()


def check(job: Job) -> tuple[str, ...]:
    """Return what the grammar leaves to the validator; raise JobError when model or schema cannot be used at all.

    Loads no model. A server is asked whether it is there and takes the key; what it makes of a schema, `choose` finds out.
    """
    if job.sections.model.engine == "openai":
        need_client(job)
        from pipeline.engines import openai

        openai.check(job)
        return ()
    name, lora = job.sections.model.name, job.sections.model.lora
    if job.uses_demo or is_place(job, name):
        if not (folder(job) / "config.json").is_file():
            raise JobError(f"{job.file}: model.name is {name!r}, but {folder(job)} holds no checkpoint (no config.json)")
        files.check(folder(job))
    if lora and is_place(job, lora):
        if not (place(job, lora) / "adapter_model.safetensors").is_file():
            raise JobError(f"{job.file}: model.lora is {lora!r}, but {place(job, lora)} holds no adapter_model.safetensors")
        files.header(place(job, lora) / "adapter_model.safetensors")
    return decoding.check(schema.compact(job.schema))


def folder(job: Job) -> Path:
    """Return where the job's model lies, if it is a folder: relative to the job file, or in this package."""
    return CHECKPOINT if job.uses_demo else place(job, job.sections.model.name)


def place(job: Job, name: str) -> Path:
    """Return where something that the job names lies, if it is a folder."""
    return job.file.parent / os.path.expanduser(name)  # pathlib's own raises for the home of nobody


def is_place(job: Job, name: str) -> bool:
    """Say whether a name means a folder, there or not, and no hub id."""
    return name.startswith((".", "/", "~")) or place(job, name).is_dir()


def load(job: Job, threads: int | None = None) -> Engine:
    """Load the job's engine; minutes for a large model.

    Raises JobError for a checkpoint that cannot be used, RunError when it does not load for any other reason.
    """
    if job.sections.model.engine == "openai":
        need_client(job)
        from pipeline.engines import openai

        return openai.load(openai.resolve(job))
    from pipeline.engines.transformers import TransformersEngine

    model = job.sections.model
    try:
        engine = TransformersEngine(
            str(folder(job)) if folder(job).is_dir() else model.name,
            revision=None if job.uses_demo else model.revision,
            dtype=model.dtype,
            batch_size=model.batch_size,
            threads=threads,
            max_model_len=model.max_model_len,
            max_request_tokens=job.sections.limits.max_request_tokens,
            rope_scaling=model.rope_scaling,
            lora=str(place(job, model.lora)) if model.lora and is_place(job, model.lora) else model.lora,
        )
    except PipelineError:
        raise
    except Exception as error:  # any: what libraries make of a stranger's numbers, or of a GPU that is full, has no common class
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RunError(f"the model {model.name} does not load: {reason}") from error
    engine.model = model.name
    return engine
