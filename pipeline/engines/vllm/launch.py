"""A job and a checkpoint -> vLLM's engine, started. Knows no request.

`arguments` says what the job wants, `engine_arguments` adds what the checkpoint and this package need, `started` waits for vLLM and sees
to it that no process of its own outlives this one.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import redirect_stdout
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pipeline.budget import compute_area_bounds
from pipeline.engines import checkpoint, checkpoint_files
from pipeline.engines.vllm import launch
from pipeline.errors import JobError
from pipeline.job import Job

SAME_NAMES = (
    "dtype", "max_model_len", "tensor_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization", "max_num_seqs", "quantization",
    "kv_cache_dtype", "enforce_eager", "enable_prefix_caching",
)  # fmt: skip
"""What a job and vLLM's engine call the same."""
CPU_CACHE_BYTES = 4 * 2**30
"""Attention cache on a CPU, where vLLM would take nearly all the memory there is."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The room that vLLM can keep for an adapter."""
WATCH = "while read -r line; do processes=$line; done; kill -9 $processes"
"""What a shell does that holds a pipe from this process: when that closes, because this process has died, vLLM's shall die too."""
WATCH_PERIOD_S = 0.5


def collect_arguments(job: Job) -> dict[str, Any]:
    """Return what a job says of vLLM's engine, by vLLM's names; what it leaves to vLLM is left out."""
    model = job.sections.model
    low, high = compute_area_bounds(job.sections.pages.budget)
    return {
        **{name: getattr(model, name) for name in SAME_NAMES if getattr(model, name) is not None},
        "limit_mm_per_prompt": {"image": job.pages_per_request, "video": 0, **(model.limit_mm_per_prompt or {})},
        "mm_processor_kwargs": {"size": {"shortest_edge": low, "longest_edge": high}},
        **model.engine_args,
    }


def check_vllm_arguments(job: Job) -> None:
    """Raise JobError for an argument that this version of vLLM does not know. Imports vLLM, which takes seconds, only to look one up."""
    given = job.sections.model.engine_args
    if not given:
        return
    launch.silence_vllm()
    with redirect_stdout(sys.stderr):  # what it prints is no data
        from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in fields(AsyncEngineArgs)}
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise JobError(f"{job.file}: model.engine_args: the engine of this vLLM has no argument {name}{hint}")


def prepare_environment(threads: int | None) -> int:
    """Set what vLLM reads from the environment, unless it is set; return the length of its log.

    Its processes are started afresh (`spawn`): a fork of a process that has threads can hang. It tells nobody how it is used. On a CPU it
    would bind its threads to all cores, as every other engine beside it would.
    """
    wanted = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    if not torch.cuda.is_available():
        wanted |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads or torch.get_num_threads())}
    os.environ.update({name: value for name, value in wanted.items() if name not in os.environ})
    return launch.configure_vllm_log()


def build_engine_arguments(folder: Path, config: Any, stretched: bool, lora: Path | None, given: Mapping[str, Any]) -> Any:
    """Return the arguments of vLLM's engine: what is given, and what the checkpoint and this package need.

    `config` is the checkpoint's own; `stretched` says that its rotary scaling is the job's.
    """
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    arguments = {"max_model_len": checkpoint.count_context_tokens(config), "disable_log_stats": True, "use_tqdm_on_load": False, **given}
    if stretched:
        text = config.get_text_config()
        longest = max(text.max_position_embeddings, checkpoint.count_context_tokens(config))  # vLLM takes it for the stretched length
        ropes = {"text_config": {"rope_parameters": text.rope_parameters, "max_position_embeddings": longest}}
        arguments["hf_overrides"] = {**ropes, **given.get("hf_overrides", {})}
    if current_platform.is_cpu() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ and "gpu_memory_utilization" not in given:
        arguments.setdefault("kv_cache_memory_bytes", CPU_CACHE_BYTES)
    if lora:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": find_lora_rank(lora)}
    structure = StructuredOutputsConfig(backend="guidance", disable_any_whitespace=True)
    fixed = {"model": str(folder), "load_format": "safetensors", "logprobs_mode": "raw_logprobs", "structured_outputs_config": structure}
    return AsyncEngineArgs(**arguments, **fixed)


def find_lora_rank(folder: Path) -> int:
    """Return the rank for which vLLM keeps room: the least that an adapter fits. Raises JobError for a folder without one."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise JobError(f"model.lora: {folder} holds no adapter_model.safetensors; adapters in other formats are not read")
    rank = checkpoint_files.read_json_file(folder / "adapter_config.json").get("r")
    if not isinstance(rank, int) or not 0 < rank <= LORA_RANKS[-1]:
        raise JobError(f"{folder}: adapter_config.json says the rank r is {rank!r}; allowed are 1 to {LORA_RANKS[-1]}")
    return next(room for room in LORA_RANKS if room >= rank)


async def start_vllm(engine: Any) -> Any:
    """Return vLLM's engine, started in the loop that it will live in."""
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(engine)


def start_with_watch(begin: Callable[[], Future[Any]]) -> tuple[Any, subprocess.Popen[bytes]]:
    """Return what starts, and what ends its processes when this one is killed: on their own they wait on, with all the GPU's memory."""
    others, starting = set(multiprocessing.active_children()), begin()
    shell = subprocess.Popen(["/bin/sh", "-c", WATCH], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, bufsize=0)
    try:
        done = False
        while not done:
            done = bool(wait([starting], WATCH_PERIOD_S).done)
            processes = " ".join(str(child.pid) for child in set(multiprocessing.active_children()) - others)
            if shell.stdin and processes:
                shell.stdin.write(f"{processes}\n".encode())
        return starting.result(), shell
    except BaseException:
        release_watch(shell)
        raise


def release_watch(shell: subprocess.Popen[bytes]) -> None:
    """End a watch without what it would do at the end."""
    shell.kill()
    shell.communicate()


RAISED_LINE = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Interrupt)): (.+)$", re.MULTILINE)
"""The line of a traceback that says what was raised."""
EMPTY_REASONS = ("Engine core initialization failed", "EngineCore encountered an issue", "cancelled", "WorkerProc initialization failed")
"""What the processes further up say about it, in whose tracebacks no reason stands."""


@cache
def make_log_folder() -> tempfile.TemporaryDirectory[str]:
    """Return where this process keeps its log; it goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="pipeline-vllm-")


def find_log_file() -> Path:
    return Path(make_log_folder().name) / "errors.log"


def configure_vllm_log() -> int:
    """Have the vLLM of this process and of those it starts log errors to stderr and into a file, nothing else; return the file's length.

    vLLM's own way is every step of its work on stdout, where data belongs. A configuration that is set already stays.
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
    """Have vLLM say nothing but errors while it is imported: it reads its configuration later."""
    logging.getLogger("vllm").setLevel(logging.ERROR)


def read_reason_since(length: int) -> str:
    """Return the first reason that was logged after the file had this length; "" where there is none."""
    if not find_log_file().exists():
        return ""
    with find_log_file().open("rb") as opened:
        opened.seek(length)
        text = opened.read().decode(errors="replace")
    reasons = [f"{kind}: {said}" for kind, said in RAISED_LINE.findall(text) if not said.startswith(EMPTY_REASONS)]
    return " ".join(reasons[0].split())[:600] if reasons else ""
