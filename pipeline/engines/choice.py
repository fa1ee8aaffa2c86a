"""Choice of what is `auto`: which engine runs a job's model, and how it holds the weights, for the GPUs that there are.

In: a job, the number of GPUs, and of a GPU its memory. Out: an engine and the reason for it in one line; `bf16` or `int4`; or a
JobError that says what would fit. Memory is counted from config.json alone, before any weights are fetched. Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from pipeline.engines.model_files import read_model_file
from pipeline.errors import JobError
from pipeline.job import Job
from pipeline.version import DISTRIBUTION

ROOM_BYTES = 3 * 10**9
"""Memory beside the weights: CUDA's context, the tensors of a first pass over 16,384 tokens of a 7B model (2 GB) and a small cache."""
VLLM_SHARE = 0.92
"""vLLM's own default of `gpu_memory_utilization`."""
INT4_BYTES = 0.5 + (2 + 0.5) / 128
"""Bytes of a weight in the AWQ layout: 4 bits, and in groups of 128 a float16 scale and a 4-bit zero."""
SMALLER_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct-AWQ"


@dataclass(frozen=True)
class WeightBytes:
    """Memory of a model's weights."""

    unpacked: int
    """With 16 bits for each weight."""
    packed: int | None
    """With 4 bits for each weight of the language model's layers, as an AWQ checkpoint stores them; None for a plain one."""


def choose_engine(job: Job, gpus: float) -> str:
    """Return the engine of a job: its own, or what is best where `model.engine` is `auto`."""
    model = job.sections.model
    if model.engine != "auto":
        return model.engine
    return "transformers" if find_hindrance(job, gpus) else "vllm"


def explain_engine(given: Job, resolved: Job, gpus: float | None) -> str:
    """Return why a job's engine is what it is, as a clause; `gpus` is None where an earlier run has chosen."""
    if given.sections.model.engine != "auto":
        return "model.engine says so"
    if gpus is None:
        return "as this output was begun"
    if resolved.uses_demo:
        return "it runs the demonstration model"
    return find_hindrance(given, gpus) or "there is a GPU, and vllm is installed"


def find_hindrance(job: Job, gpus: float) -> str:
    """Return why `auto` is not vllm here, as a clause; "" where it is."""
    if not gpus:
        return "there is no GPU"
    if job.uses_demo:
        return "it runs the demonstration model"
    if job.sections.ray.gpus_per_actor < 1:
        return "ray.gpus_per_actor is less than one GPU"
    if job.sections.model.weights != "auto":
        return "model.weights is for transformers"
    if find_spec("vllm") is None:
        return f"there is a GPU, and vllm, several times as fast, is not installed: pip install '{DISTRIBUTION}[vllm]'"
    return ""


def read_gpu_memory() -> tuple[int, ...]:
    """Return the memory in bytes of each GPU that this process may use, as nvidia-smi counts it; empty where that is not known."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = [f"--id={visible}"] if visible else []
    query = [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits", *chosen]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return tuple(int(line) * 2**20 for line in said.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()


def count_weight_bytes(config: Mapping[str, Any]) -> WeightBytes:
    """Return the memory of the weights that a checkpoint's config.json describes; biases and norms, one in a thousand, are left out.

    Older checkpoints have the language model's numbers beside those of the vision tower, newer ones in `text_config`. Raises KeyError,
    TypeError for numbers that are missing.
    """
    text, vision = {**config, **config.get("text_config", {})}, config["vision_config"]
    hidden, layers, heads = text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]
    size = text.get("head_dim") or hidden // heads
    attention = 2 * hidden * size * (heads + text.get("num_key_value_heads", heads))
    linear = layers * (attention + 3 * hidden * text["intermediate_size"])
    embeddings = text["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    width = vision.get("embed_dim") or vision["hidden_size"]
    inner = vision.get("intermediate_size") or width * vision.get("mlp_ratio", 4)
    gates = 3 if config.get("model_type") == "qwen2_5_vl" else 2
    joined = width * vision.get("spatial_merge_size", 2) ** 2
    mergers = 1 + len(vision.get("deepstack_visual_indexes", ()))
    tower = vision["depth"] * (4 * width * width + gates * width * inner) + mergers * joined * (joined + hidden)
    packed = int(linear * INT4_BYTES + 2 * (embeddings + tower))
    is_awq = (config.get("quantization_config") or {}).get("quant_method") == "awq"
    return WeightBytes(int(2 * (linear + embeddings + tower)), packed if is_awq else None)


def choose_weights(job: Job, gpu_bytes: int, sizes: WeightBytes) -> Literal["bf16", "int4"]:
    """Return how the engine `transformers` holds the weights on a GPU with so much memory: unpacked where they fit.

    Raises JobError, with what would fit, where neither fits or the job asks for what does not.
    """
    model, room = job.sections.model, int(gpu_bytes * min(1.0, job.sections.ray.gpus_per_actor)) - ROOM_BYTES
    fitting = "bf16" if sizes.unpacked <= room else "int4" if sizes.packed and sizes.packed <= room and not model.lora else None
    if model.weights == "int4" and sizes.packed and sizes.packed <= room:
        return "int4"
    if fitting == "bf16" or (fitting == "int4" and model.weights != "bf16"):
        return "bf16" if fitting == "bf16" else "int4"
    raise JobError(describe_misfit(job, room, sizes), job.file, "model.name")


def describe_misfit(job: Job, room: int, sizes: WeightBytes) -> str:
    """Return the sentence about a model that no GPU here holds, and what would fit."""
    model = job.sections.model
    needs = f"{sizes.unpacked / 1e9:.1f} GB in bf16" + (f", {sizes.packed / 1e9:.1f} GB packed" if sizes.packed else "")
    least = sizes.packed or sizes.unpacked
    ways = []
    if sizes.packed and sizes.packed <= room and model.lora:
        ways.append("leave out model.lora, or merge it into the checkpoint: an adapter cannot be merged into packed weights")
    elif sizes.packed and sizes.packed <= room:
        ways.append("set model.weights to int4 or auto")
    if not sizes.packed:
        ways.append("take its AWQ copy, which needs less than half of that")
    gpus = 2
    while gpus < 16 and least > gpus * (room + ROOM_BYTES) * VLLM_SHARE - gpus * ROOM_BYTES:
        gpus *= 2
    ways += [f"a smaller model ({SMALLER_MODEL})", f"model.engine: vllm with model.tensor_parallel_size: {gpus}"]
    return (
        f"{job.file}: {model.name} needs {needs}, and the GPU has room for {max(0, room) / 1e9:.1f} GB of weights beside "
        f"{ROOM_BYTES / 1e9:.0f} GB for its work; what would fit: {'; '.join(ways)}"
    )


def check_vllm_memory(job: Job, gpu_bytes: int, sizes: WeightBytes) -> None:
    """Raise JobError, with what would fit, for a model whose weights vLLM cannot hold on the GPUs that the job gives it."""
    model = job.sections.model
    share = model.gpu_memory_utilization or VLLM_SHARE
    room = int(gpu_bytes * share) - ROOM_BYTES
    if (sizes.packed or sizes.unpacked) > room * model.gpus:
        raise JobError(describe_misfit(job, room * model.gpus, sizes), job.file, "model.name")


def resolve_weights(job: Job) -> Job:
    """Return a job whose model is to be loaded on this machine's GPU, with `model.weights` decided.

    It stays `auto` where the memory or the model's numbers are not known. Raises JobError where the model does not fit.
    """
    memory, config = read_gpu_memory(), read_model_file(job, "config.json", fetch=True)
    try:
        sizes = count_weight_bytes(config or {})
    except (KeyError, TypeError):
        return job
    if not memory:
        return job
    if job.sections.model.engine == "vllm":
        check_vllm_memory(job, min(memory), sizes)
        return job
    return job.with_model(weights=choose_weights(job, min(memory), sizes))
