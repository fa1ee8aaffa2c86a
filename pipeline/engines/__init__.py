"""Engines answer requests. One protocol, one file for each way of serving; batching is each engine's own business."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pipeline import decoding, schema
from pipeline.demo import CHECKPOINT
from pipeline.errors import JobError
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
    """Return the job as it can run here: without a GPU, as `model.without_gpu` says. The demonstration model says its revision."""
    model = job.sections.model
    if job.uses_demo or (not gpus and model.without_gpu == "demo"):
        return job.with_demo()
    if gpus or model.without_gpu == "cpu":
        return job
    raise JobError(
        f"{job.file}: there is no GPU for {model.name}; set model.without_gpu to demo (the small demonstration model) or cpu (very slow), "
        "or run on a machine with one"
    )


def gpu_count() -> int:
    """Return how many GPUs this machine has."""
    import torch

    return torch.cuda.device_count()


def check(job: Job) -> tuple[str, ...]:
    """Return what the grammar leaves to the validator; raise JobError when model or schema cannot be used at all.

    Loads no model.
    """
    name = job.sections.model.name
    looks_like_folder = name.startswith((".", "/", "~")) or folder(job).is_dir()
    if looks_like_folder and not (folder(job) / "config.json").is_file():
        raise JobError(f"{job.file}: model.name is {name!r}, but {folder(job)} holds no checkpoint (no config.json)")
    return decoding.check(schema.compact(job.schema))


def folder(job: Job) -> Path:
    """Return where the job's model lies, if it is a folder: relative to the job file, or in this package."""
    return CHECKPOINT if job.uses_demo else job.file.parent / Path(job.sections.model.name).expanduser()


def load(job: Job, threads: int | None = None) -> Engine:
    """Load the job's engine; minutes for a large model."""
    from pipeline.engines.transformers import TransformersEngine

    model = job.sections.model
    engine = TransformersEngine(
        str(folder(job)) if folder(job).is_dir() else model.name,
        revision=None if job.uses_demo else model.revision,
        dtype=model.dtype,
        batch_size=model.batch_size,
        threads=threads,
        max_model_len=model.max_model_len,
        rope_scaling=model.rope_scaling,
        lora=model.lora,
    )
    engine.model = model.name
    return engine
