"""vLLM start: a job and a checkpoint become vLLM's engine arguments and a started engine; its error log explains a failed start.

`collect_arguments` takes what the job sets, `build_engine_arguments` adds what the checkpoint and this package need, and
`start_with_killer` starts vLLM and makes its processes end with this one. vLLM raises only general errors ("Engine core initialization
failed"): the reason is in its log, which `configure_vllm_log` directs into a file and `read_reason_since` searches.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import redirect_stdout
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pipeline.budget import compute_area_bounds
from pipeline.engines import checkpoint, checkpoint_files
from pipeline.errors import JobError
from pipeline.job import Job
from pipeline.processes import OrphanKiller
from pipeline.wording import suggest_word

SAME_NAMES = (
    "dtype", "max_model_len", "tensor_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization", "quantization",
    "kv_cache_dtype", "enforce_eager", "enable_prefix_caching", "max_num_batched_tokens", "mm_processor_cache_gb",
)  # fmt: skip
"""Keys with the same name in a job and in vLLM's engine arguments."""
NORMALIZE = "mm_device_do_normalize"
"""Argument by which a vLLM that has it takes pages as bytes and normalises them in the model; 0.24 has none, 0.32 has it."""
CPU_CACHE_BYTES = 4 * 2**30
"""Attention cache on a CPU: by default vLLM would reserve nearly all memory."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of `max_lora_rank` that vLLM accepts."""
RAISED_LINE = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Interrupt)): (.+)$", re.MULTILINE)
"""The line of a traceback with the exception."""
GENERAL_REASONS = ("Engine core initialization failed", "EngineCore encountered an issue", "cancelled", "WorkerProc initialization failed")
"""Messages of the parent processes, which do not contain the reason."""
WATCH_PERIOD_S = 0.5
TABLE_LENGTHS = 4
"""Lengths of the trained context in vLLM's table of positions for Qwen2-VL and Qwen2.5-VL (`positions_factor` in its mrope.py)."""


def collect_arguments(job: Job) -> dict[str, Any]:
    """Return the engine arguments that a job sets, by vLLM's names; those that it does not set are left out."""
    model = job.sections.model
    low, high = compute_area_bounds(job.budget)
    return {
        **{name: getattr(model, name) for name in SAME_NAMES if getattr(model, name) is not None},
        "max_num_seqs": model.sequences,
        "limit_mm_per_prompt": {"image": job.most_images, "video": 0, **(model.limit_mm_per_prompt or {})},
        "mm_processor_kwargs": {"size": {"shortest_edge": low, "longest_edge": high}},
        **model.engine_args,
    }


def check_vllm_arguments(job: Job) -> None:
    """Raise JobError for an unknown name in `model.engine_args`. Imports vLLM, which takes seconds, only if there is one to check."""
    given = job.sections.model.engine_args
    if not given:
        return
    silence_vllm()
    with redirect_stdout(sys.stderr):  # the import prints, and stdout is for data
        known = list_known_arguments()
    for name in given:
        if name not in known:
            wrong = f"the engine of this vLLM has no argument {name}{suggest_word(name, known)}"
            raise JobError(f"{job.file}: model.engine_args: {wrong}", job.file, "model.engine_args")


def prepare_environment(threads: int | None) -> int:
    """Set the environment variables that vLLM reads, unless they are set; return the length of its error log.

    Its processes are spawned, because a fork of a process with threads can hang. It sends no usage statistics. On a CPU it does not
    bind its threads to cores: each of several engines would bind them to all cores.
    """
    wanted = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    if not torch.cuda.is_available():
        wanted |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads or torch.get_num_threads())}
    os.environ.update({name: value for name, value in wanted.items() if name not in os.environ})
    return configure_vllm_log()


def build_engine_arguments(folder: Path, config: Any, stretched: bool, lora: Path | None, given: Mapping[str, Any]) -> Any:
    """Return vLLM's engine arguments: those given, and those that the checkpoint and this package need.

    `config` is the checkpoint's config; `stretched` is true if its rotary scaling comes from the job.
    """
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    arguments = {"max_model_len": checkpoint.count_context_tokens(config), "disable_log_stats": True, "use_tqdm_on_load": False, **given}
    if stretched:
        text = config.get_text_config()
        longest = max(text.max_position_embeddings, checkpoint.count_context_tokens(config))  # vLLM expects the stretched length here
        overrides = {"text_config": {"rope_parameters": convert_yarn(config), "max_position_embeddings": longest}}
        arguments["hf_overrides"] = {**overrides, **given.get("hf_overrides", {})}
    if arguments.get("dtype", "auto") == "auto" and is_awq_config(config) and current_platform.has_device_capability(80):
        arguments["dtype"] = "bfloat16"  # the folder says float16, in which these models overflow (vllm#13817)
    if current_platform.is_cpu() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ and "gpu_memory_utilization" not in given:
        arguments.setdefault("kv_cache_memory_bytes", CPU_CACHE_BYTES)
    if lora:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": find_lora_rank(lora)}
    structure = StructuredOutputsConfig(backend="guidance", disable_any_whitespace=True)
    fixed = {"model": str(folder), "load_format": "safetensors", "logprobs_mode": "raw_logprobs", "structured_outputs_config": structure}
    if NORMALIZE in list_known_arguments():
        arguments[NORMALIZE] = True
    return AsyncEngineArgs(**arguments, **fixed)


def list_known_arguments() -> set[str]:
    """Return the arguments that the engine of this vLLM has."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    return {field.name for field in fields(AsyncEngineArgs)}


def convert_yarn(config: Any) -> dict[str, Any]:
    """Return a checkpoint's rotary scaling in the form in which vLLM computes from it what transformers does.

    For Qwen2-VL and Qwen2.5-VL, vLLM 0.32 makes its table of positions four times as long, and takes that length for the trained one when
    it looks for the dimensions that YaRN stretches (arXiv:2309.00071, section 3.2: those with fewer than `beta` rotations over the trained
    length). Four times the rotations over four times the length are the same dimensions: `tests/vllm/test_vllm_families.py`.
    """
    rope = dict(config.get_text_config().rope_parameters)
    if rope.get("rope_type") == "yarn" and config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        rope |= {name: TABLE_LENGTHS * rope.get(name, beta) for name, beta in (("beta_fast", 32), ("beta_slow", 1))}
    return rope


def is_awq_config(config: Any) -> bool:
    """Say whether a checkpoint's config is that of AWQ weights."""
    given = getattr(config, "quantization_config", None) or {}
    return (given if isinstance(given, dict) else given.to_dict()).get("quant_method") == "awq"


def find_lora_rank(folder: Path) -> int:
    """Return the `max_lora_rank` for an adapter: the smallest allowed value that is not below its rank. Raises JobError."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise JobError(f"model.lora: {folder} holds no adapter_model.safetensors; adapters in other formats are not read")
    rank = checkpoint_files.read_json_file(folder / "adapter_config.json").get("r")
    if not isinstance(rank, int) or not 0 < rank <= LORA_RANKS[-1]:
        raise JobError(f"{folder}: adapter_config.json says the rank r is {rank!r}; allowed are 1 to {LORA_RANKS[-1]}")
    return next(allowed for allowed in LORA_RANKS if allowed >= rank)


async def start_vllm(engine_arguments: Any) -> Any:
    """Return vLLM's started engine, which belongs to the running event loop."""
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(engine_arguments)


def start_with_killer(begin: Callable[[], Future[Any]]) -> tuple[Any, OrphanKiller]:
    """Return what `begin` starts, and what kills its processes when this one is killed: else they stay, with all the GPU's memory."""
    others, starting = set(multiprocessing.active_children()), begin()
    killer = OrphanKiller()
    try:
        done = False
        while not done:
            done = bool(wait([starting], WATCH_PERIOD_S).done)
            killer.name_processes(child.pid for child in set(multiprocessing.active_children()) - others if child.pid)
        return starting.result(), killer
    except BaseException:
        killer.release()
        raise


@cache
def make_log_folder() -> tempfile.TemporaryDirectory[str]:
    """Return the temporary folder of this process's vLLM log, which is deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="pipeline-vllm-")


def find_log_file() -> Path:
    return Path(make_log_folder().name) / "errors.log"


def configure_vllm_log() -> int:
    """Make vLLM, in this process and in its children, log only errors, to stderr and to a file; return the file's length.

    By default vLLM logs every step to stdout, which is for data. A configuration that the environment names is kept.
    """
    silence_vllm()
    handlers = {
        "stderr": {"class": "logging.StreamHandler", "stream": "ext://sys.stderr", "level": "ERROR"},
        "file": {"class": "logging.FileHandler", "filename": str(find_log_file()), "level": "ERROR", "delay": True},
    }
    loggers = {"vllm": {"handlers": list(handlers), "level": "ERROR", "propagate": False}}
    config = Path(make_log_folder().name) / "logging.json"
    config.write_text(json.dumps({"version": 1, "disable_existing_loggers": False, "handlers": handlers, "loggers": loggers}))
    os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(config))
    return find_log_file().stat().st_size if find_log_file().exists() else 0


def silence_vllm() -> None:
    """Make vLLM log only errors while it is imported; it reads its logging configuration later."""
    logging.getLogger("vllm").setLevel(logging.ERROR)


def read_reason_since(offset: int) -> str:
    """Return the first exception with a reason in the log after this offset in bytes; "" if there is none."""
    if not find_log_file().exists():
        return ""
    with find_log_file().open("rb") as opened:
        opened.seek(offset)
        text = opened.read().decode(errors="replace")
    reasons = [f"{kind}: {message}" for kind, message in RAISED_LINE.findall(text) if not message.startswith(GENERAL_REASONS)]
    return " ".join(reasons[0].split())[:600] if reasons else ""
