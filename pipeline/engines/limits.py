"""Limits of vLLM's scheduler and caches, computed from a job's pages, its model's numbers and the memory of its GPUs.

vLLM's own defaults are for text: it would put one page of a four-page request through the vision tower in a step, and reserve 8 GiB of
host memory for images that are asked about again seconds later or never. Imports neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.budget import compute_area_bounds
from pipeline.engines.choice import (
    VLLM_SHARE,
    check_vllm_memory,
    choose_engine,
    choose_weights,
    count_weight_bytes,
    explain_engine,
    read_gpu_memory,
)
from pipeline.engines.model_files import read_model_file
from pipeline.errors import JobError
from pipeline.job import Job

LARGE_GPU_BYTES = 70 * 10**9
STEP_TOKENS = {True: 8192, False: 4096}
"""Least tokens of a step on a large GPU and on another; vLLM's default for its Python engine is 2,048 on any."""
MOST_STEP_TOKENS = 16_384
TEXT_TOKENS, ANSWER_TOKENS = 512, 512
"""Tokens of a request beside its pages: the prompt's text, and an answer as it usually is."""
WORK_BYTES = 5 * 10**9
"""Memory of a GPU beside weights and cache: CUDA, its graphs, and the tensors of a step."""
MOST_SEQUENCES = 256
CACHE_GIB = 1.0


@dataclass(frozen=True)
class VLLMLimits:
    """vLLM's arguments of the same names."""

    max_num_batched_tokens: int | None
    """Tokens that a step computes, and the visual tokens that it puts through the vision tower; None: vLLM's own default."""
    max_num_seqs: int
    mm_processor_cache_gb: float


def compute_limits(job: Job, gpu_bytes: int | None, config: Mapping[str, Any] | None) -> VLLMLimits:
    """Return the limits of a job's engine: what the job says, and where it says nothing what suits its GPU.

    `gpu_bytes` is None where the memory is not known, `config` the checkpoint's config.json. A step takes all pages of a request. Requests
    at once: as many as the cache has room for at their full length,

        (GPUs x (memory x share - 5 GB) - weights) / bytes of a token in the cache / tokens of a request
    """
    model = job.sections.model
    page_tokens = compute_area_bounds(job.budget)[1] // job.budget.cell_area
    pages_tokens = page_tokens * job.images_per_request
    step = model.max_num_batched_tokens
    if step is None and gpu_bytes:
        step = max(STEP_TOKENS[gpu_bytes >= LARGE_GPU_BYTES], min(-(-pages_tokens // 1024) * 1024, MOST_STEP_TOKENS))
    cache_gb = model.mm_processor_cache_gb
    if cache_gb is None:
        cache_gb = CACHE_GIB if job.sections.extract.re_asks or job.images_per_request > job.pages_per_request else 0.0
    sequences = model.max_num_seqs or model.sequences
    if not model.max_num_seqs and gpu_bytes and config:
        share = model.gpu_memory_utilization or VLLM_SHARE
        try:
            sizes, token = count_weight_bytes(config), count_token_bytes(config, model.kv_cache_dtype.startswith("fp8"))
        except (KeyError, TypeError):
            return VLLMLimits(step, sequences, cache_gb)
        room = model.gpus * (gpu_bytes * share - WORK_BYTES) - (sizes.packed or sizes.unpacked)
        fitting = int(room) // (token * (pages_tokens + TEXT_TOKENS + min(job.sections.sampling.max_tokens, ANSWER_TOKENS)))
        sequences = max(8, min(MOST_SEQUENCES, fitting // 8 * 8))
    return VLLMLimits(step, sequences, cache_gb)


def count_token_bytes(config: Mapping[str, Any], is_fp8: bool) -> int:
    """Return the bytes of one token's keys and values in all layers. Raises KeyError, TypeError for numbers that are missing."""
    text = {**config, **config.get("text_config", {})}
    size = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    heads = text.get("num_key_value_heads", text["num_attention_heads"])
    return int(2 * text["num_hidden_layers"] * heads * size * (1 if is_fp8 else 2))


def resolve_limits(job: Job, gpu_bytes: int | None, config: Mapping[str, Any] | None) -> Job:
    """Return a job of the engine vllm with its limits decided."""
    return job.with_model(**asdict(compute_limits(job, gpu_bytes, config)))


def describe_engine(job: Job) -> dict[str, Any]:
    """Return which engine a job has on this machine and why, its limits, its weights' memory, and whether a GPU here has that.

    Asks neither hub nor store; what is not known is null.
    """
    memory, config = read_gpu_memory(), read_model_file(job, "config.json", fetch=False)
    engine = choose_engine(job, len(memory))
    found: dict[str, Any] = {"engine": engine, "reason": explain_engine(job, job, len(memory)), "gpu_bytes": list(memory)}
    try:
        sizes = count_weight_bytes(config or {}) if engine != "openai" else None
    except (KeyError, TypeError):
        sizes = None
    if engine == "vllm":
        found["vllm"] = asdict(compute_limits(job, min(memory, default=None), config))
    found |= {"weights_bytes": sizes and sizes.unpacked, "packed_bytes": sizes and sizes.packed, "misfit": None}
    if memory and sizes:
        try:
            if engine == "vllm":
                check_vllm_memory(job, min(memory), sizes)
            else:
                found["weights"] = choose_weights(job, min(memory), sizes)
        except JobError as error:
            found["misfit"] = str(error)
    return found
