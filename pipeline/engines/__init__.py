"""Engines: requests come in, completions go out. One protocol, one folder for each way of serving; each engine does its own batching.

check_engine     what can be checked of a job's model and schema before anything is started
resolve_engine   the job with the model that runs here
load_engine      the engine of a resolved job
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from pipeline.engines import checkpoint_files, model_cache
from pipeline.engines.choice import choose_engine, explain_engine, read_gpu_memory, resolve_weights
from pipeline.engines.limits import resolve_limits
from pipeline.engines.model_files import find_model_folder, read_model_file, resolve_cell_px
from pipeline.errors import JobError, PipelineError, RunError
from pipeline.job import Job
from pipeline.records import Completion, Request
from pipeline.schema import grammar
from pipeline.schema.request_schema import list_unforced_keywords
from pipeline.storage.location import is_store_url
from pipeline.version import DISTRIBUTION

ENGINE_PACKAGES = {"openai": "httpx2", "vllm": "vllm"}
"""The package that each engine needs; this package's extra of the same name installs it."""


__all__ = ["check_engine", "count_gpus", "explain_engine", "load_engine", "resolve_engine"]


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

    def measure_silence_s(self) -> float:
        """Return for how long the engine has had requests and no token; 0 while it has none, or watches over its answers itself."""
        ...

    def close(self) -> None:
        """Release the model. Requests still waiting fail with EngineDead."""
        ...


def resolve_engine(job: Job, gpus: float) -> Job:
    """Return the job with the model that runs here, and with all that is `auto` decided; `load_engine` takes such a job.

    `model.weights` alone stays open: it depends on the GPU that the model is loaded on.

    A server is asked which model it has and how it keeps to the schema. Without a GPU, `model.without_gpu` decides. A model in an object
    store or on the hub gets its revision, as does an adapter on the hub, the demonstration model this package's version, and each the size
    of its visual tokens. Raises JobError when there is no GPU for the model, when a hub id is not known, or not in the cache where the hub
    cannot be reached.
    """
    model = job.sections.model
    check_package(job)
    if model.engine == "openai":
        from pipeline.engines import openai

        return openai.resolve_server(job)
    if job.uses_demo or (not gpus and model.without_gpu == "demo"):
        return resolve_cell_px(job.with_demo())
    if not gpus and model.without_gpu != "cpu":
        raise JobError(
            f"{job.file}: there is no GPU for {model.name}; set model.without_gpu to demo (the small demonstration model) or cpu (very "
            "slow), or run on a machine with one",
            job.file,
            "model.without_gpu",
        )
    job = job.with_model(engine=choose_engine(job, gpus))
    if is_store_url(model.name):
        job = job.with_model(revision=model_cache.resolve_store_revision(model.name, model.revision))
    elif not job.is_local_path(model.name):
        job = job.with_model(revision=resolve_hub_revision(job, "model.name", model.name, model.revision, "config.json"))
    if model.lora and not job.is_local_path(model.lora):
        found = resolve_hub_revision(job, "model.lora", model.lora, model.lora_revision, "adapter_config.json")
        job = job.with_model(lora_revision=found)
    job = resolve_cell_px(job)
    if job.sections.model.engine == "vllm":
        memory = read_gpu_memory() if gpus else ()
        job = resolve_limits(job, min(memory, default=None), read_model_file(job, "config.json", fetch=True))
    return job


def resolve_hub_revision(job: Job, key: str, name: str, revision: str | None, file: str) -> str:
    """Return the commit that a revision of a hub's repository means now, so that all machines load the same weights.

    `key` is the job's, `file` one that every such repository has. Raises JobError when a hub id is not known, or not in the cache where
    the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=revision)).parent.name  # …/snapshots/COMMIT/config.json
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors, a malformed id is a ValueError
        reason = " ".join(str(error).split())[:300]
        raise JobError(
            f"{job.file}: {key} is {name!r}, neither a folder nor a repository of the hub with {file}: {reason}", job.file, key
        ) from None


def check_package(job: Job) -> None:
    """Raise JobError where the library of the job's engine is not installed."""
    engine = job.sections.model.engine
    if engine in ENGINE_PACKAGES and find_spec(ENGINE_PACKAGES[engine]) is None:
        package = ENGINE_PACKAGES[engine]
        raise JobError(
            f"{job.file}: model.engine is {engine}, which needs the package {package}: pip install '{DISTRIBUTION}[{engine}]'",
            job.file,
            "model.engine",
        )


def count_gpus() -> int:
    """Return how many GPUs this machine has."""
    import torch

    return torch.cuda.device_count()


def check_engine(job: Job) -> tuple[str, ...]:
    """Return what the grammar leaves to the validator; raise JobError when model or schema cannot be used at all.

    Loads no model. A server is asked whether it is there and takes the key; what it makes of a schema, `resolve_engine` finds out.
    """
    check_package(job)
    if job.sections.model.engine == "openai":
        from pipeline.engines import openai

        openai.check_server(job)
        return ()
    uses_vllm = job.sections.model.engine == "vllm" or (job.sections.model.engine == "auto" and find_spec("vllm") is not None)
    if uses_vllm and job.sections.model.engine_args:  # only then is vLLM's own import, many seconds, of use
        from pipeline.engines.vllm import launch

        launch.check_vllm_arguments(job)
    name, lora = job.sections.model.name, job.sections.model.lora
    if is_store_url(name):
        model_cache.resolve_store_revision(name, job.sections.model.revision)
    elif job.uses_demo or job.is_local_path(name):
        if not (find_model_folder(job) / "config.json").is_file():
            raise JobError(
                f"{job.file}: model.name is {name!r}, but {find_model_folder(job)} holds no checkpoint (no config.json)",
                job.file,
                "model.name",
            )
        checkpoint_files.check_checkpoint_files(find_model_folder(job), any_quantization=uses_vllm)
    if lora and job.is_local_path(lora):
        if not (job.resolve_local_path(lora) / "adapter_model.safetensors").is_file():
            raise JobError(
                f"{job.file}: model.lora is {lora!r}, but {job.resolve_local_path(lora)} holds no adapter_model.safetensors",
                job.file,
                "model.lora",
            )
        checkpoint_files.read_safetensors_header(job.resolve_local_path(lora) / "adapter_model.safetensors")
    notes = grammar.check_grammar(job.request_schema)
    unforced = list_unforced_keywords(job.schema) if job.sections.extract.absent == "allow" else []
    return (*notes, *(f"{grammar.NOT_ENFORCED} {pointer}" for pointer in unforced))


def load_engine(job: Job, threads: int | None = None, on_gpu: bool = False) -> Engine:
    """Load the engine of a job that `resolve_engine` returned; minutes for a large model.

    `on_gpu` says that a GPU is reserved for it. Raises JobError for a checkpoint that cannot be used, RunError when it does not load for
    any other reason, a GPU that torch cannot use among them.
    """
    check_package(job)
    if on_gpu:
        check_cuda()
        job = resolve_weights(job)
    model = job.sections.model
    if model.engine == "openai":
        from pipeline.engines import openai

        return openai.load_openai_engine(job)
    loads = load_vllm_engine if model.engine == "vllm" else load_transformers_engine
    try:
        engine = loads(job, threads)
    except PipelineError:
        raise
    except Exception as error:  # any: what libraries make of a stranger's numbers, or of a GPU that is full, has no common class
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RunError(f"the model {model.name} does not load: {reason}") from error
    engine.model = model.name
    return engine


def check_cuda() -> None:
    """Raise RunError when torch cannot use a GPU: the model would run on the CPU, minutes per page, beside an idle GPU."""
    import torch

    if torch.cuda.is_available():
        return
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    raise RunError(
        f"Ray reserves a GPU for the model, but torch {torch.__version__}, built {built}, cannot use it; the NVIDIA driver is "
        f"{read_driver_version() or 'not installed'}: install a driver for this torch, or a torch for this driver"
    )


def read_driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Return the version of the NVIDIA driver of this machine; "" if there is none."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", file.read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def load_transformers_engine(job: Job, threads: int | None) -> Engine:
    """Load a model into this process."""
    from pipeline.engines.transformers import TransformersEngine

    model = job.sections.model
    return TransformersEngine(
        find_weights(job),
        revision=None if job.uses_demo or is_store_url(model.name) else model.revision,
        dtype=model.dtype,
        batch_size=model.batch_size,
        threads=threads,
        max_model_len=model.max_model_len,
        max_request_tokens=job.sections.limits.max_request_tokens,
        rope_scaling=model.rope_scaling,
        lora=find_adapter(job),
        keep_int4=model.weights == "int4",
        part_tokens=model.max_num_batched_tokens,
        logprobs=model.logprobs is not False,
        enforce_eager=model.enforce_eager,
    )


def load_vllm_engine(job: Job, threads: int | None) -> Engine:
    """Load a model into processes of vLLM's own."""
    from pipeline.engines.vllm import VLLMEngine
    from pipeline.engines.vllm.launch import collect_arguments

    model = job.sections.model
    return VLLMEngine(
        find_weights(job),
        collect_arguments(job),
        revision=None if job.uses_demo or is_store_url(model.name) else model.revision,
        threads=threads,
        max_request_tokens=job.sections.limits.max_request_tokens,
        rope_scaling=model.rope_scaling,
        lora=find_adapter(job),
        logprobs=model.logprobs is not False,
    )


def find_weights(job: Job) -> str:
    """Return the folder of the job's model, or its hub id. One in an object store is copied to this machine, if it is not yet."""
    model = job.sections.model
    if is_store_url(model.name):
        return str(model_cache.copy_checkpoint(model.name, str(model.revision)))
    return str(find_model_folder(job)) if find_model_folder(job).is_dir() else job.sections.model.name


def find_adapter(job: Job) -> Path | None:
    """Return the folder of the job's LoRA adapter, if it has one; fetched from the hub where that has it. Raises JobError."""
    from pipeline.engines.checkpoint import locate_checkpoint

    model = job.sections.model
    if not model.lora:
        return None
    return job.resolve_local_path(model.lora) if job.is_local_path(model.lora) else locate_checkpoint(model.lora, model.lora_revision)
