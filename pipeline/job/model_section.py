"""Pydantic model of a job file's section `model`: the keys that choose a model and the engine that serves it.

Also `Section`, the base class of all sections.
"""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

UNKNOWN_SEQUENCES = 64
"""Requests that vLLM answers together on a GPU whose memory is not known."""


class Section(BaseModel):
    """A section of the job file: immutable; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    name: str = Field(
        description="Hub id or folder of a Qwen3-VL, Qwen2.5-VL or Qwen2-VL checkpoint, AWQ or not; `demo` is the one in this package. "
        "With the engine `openai`, the server's name for its model; `auto`, the default there, takes the only one that the server lists."
    )
    revision: str | None = Field(None, description="Commit of the hub repository; default: the newest one.")
    engine: Literal["auto", "transformers", "vllm", "openai"] = Field(
        "auto",
        description="What runs the model. `auto` is `vllm` where there are a GPU and vLLM, else `transformers`, in this process; an output "
        "that was begun with one of them stays with it. `vllm` answers many more requests at once on a GPU; it must be installed "
        "(`pipeline-documents[vllm]`), takes a minute or more to start and nearly all of the GPU's memory. `openai` is any Chat "
        "Completions server at `model.base_url`: it needs no GPU here, and every page leaves this machine.",
    )
    without_gpu: Literal["stop", "demo", "cpu"] = Field(
        "stop",
        description="What to do where there is no GPU: stop with exit code 2, use the demonstration model of this package (reported on the "
        "terminal and noted in every record; it reads its own samples, all other documents fail), or run the named model on the CPU "
        "(minutes per page for 7B).",
    )
    cell_px: int | None = Field(
        None,
        ge=4,
        le=256,
        description="Side in pixels of the square that one visual token covers. Default: the checkpoint's own, 28 for Qwen2-VL and "
        "Qwen2.5-VL, 32 for Qwen3-VL. To be set for a server alone, where the default is 28; a wrong one has every page resized.",
    )
    box_units: Literal["auto", "pixels", "thousandths"] = Field(
        "auto",
        description="In what the model counts where it is asked for the place of a value (`evidence.model`): pixels of the page image, as "
        "Qwen2.5-VL, or thousandths of its width and height, as Qwen2-VL and Qwen3-VL. Default: by the checkpoint's family; of a server by "
        "the model's name, thousandths where that does not say it. With the wrong one no place is right, and nothing is read again.",
    )
    stall_s: float = Field(
        300.0,
        gt=0,
        description="Longest time in which the engine `transformers` or `vllm` may have requests and write no token; then its process "
        "ends and is replaced. Large models on a CPU need more for a page; more also waits longer for a GPU that hangs.",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="Weights' type; `auto` is float32 on a CPU; on a GPU bfloat16 for AWQ, where the GPU has it, else the checkpoint's "
        "own; for plain checkpoints with `vllm` what vLLM chooses.",
    )
    weights: Literal["auto", "bf16", "int4"] = Field(
        "auto",
        description="How `transformers` holds the 4-bit weights of an AWQ checkpoint. `bf16` unpacks them to `model.dtype` at load: 16.6 "
        "GB for 7B, and as fast at the usual batch sizes. `int4` leaves them packed (6.9 GB for 7B; NVIDIA GPUs) and multiplies in float16 "
        "by autoawq's kernels. `auto` packs only what does not fit the GPU otherwise. `vllm` always runs them packed.",
    )
    batch_size: int = Field(
        8,
        ge=1,
        le=512,
        description="Requests that the engine `transformers` answers together. More use the GPU better and cost more of its memory.",
    )
    max_model_len: int | None = Field(
        None, ge=256, description="Longest prompt and answer in tokens; a request that exceeds it fails. Default: the model's own."
    )
    rope_scaling: dict[str, Any] | None = Field(
        None, description="YaRN settings for contexts beyond 32,768 tokens. Costs accuracy of positions in short contexts."
    )
    lora: str | None = Field(
        None,
        description="Folder or hub id of a LoRA adapter. `transformers` merges it into the weights (needs the package `peft`); `vllm` "
        "applies it beside them, to the language model alone, which costs some speed.",
    )
    lora_revision: str | None = Field(None, description="Commit of the adapter's hub repository; default: the newest one.")
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        description="GPUs over which `vllm` splits each layer; an actor reserves that many, times `pipeline_parallel_size`. For models "
        "larger than one GPU, and for answers that come sooner; costs throughput per GPU where the model fits one.",
    )
    pipeline_parallel_size: int = Field(
        1,
        ge=1,
        description="Groups of layers that `vllm` puts on GPUs of their own. Needs less traffic between them than `tensor_parallel_size`, "
        "and answers later.",
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the GPU's memory that `vllm` takes; default: 0.92, vLLM's own. More holds more requests at once; too "
        "much leaves none for large pages. On a CPU the default is 4 GiB of attention cache.",
    )
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Requests that `vllm` answers together; as many again wait, and each has its pages in memory, 3 MB a page. "
        "Default: as many as the GPU's cache has room for, at most 256; 64 where its memory is not known. From where the cache is full "
        "on, more make `vllm` do work twice.",
    )
    max_num_batched_tokens: int | None = Field(
        None,
        ge=256,
        le=1_048_576,
        description="Tokens that `vllm` computes in a step, and visual tokens that it puts through the vision tower in one. Default: all "
        "pages of a request, at least 8,192 from 70 GB of GPU memory on and 4,096 below; where that is not known vLLM's own, 2,048. In "
        "`transformers`, tokens of prompts that are read between two tokens of the answers under way, and one page at least; default: "
        "4,096, on a CPU 1,024. More fill the GPU better, cost memory that the cache could have, and delay the answers under way.",
    )
    mm_processor_cache_gb: float | None = Field(
        None,
        ge=0,
        description="GiB of host memory in which vLLM keeps preprocessed pages. Default: 0, because pages come to it preprocessed, and a "
        "re-ask costs 2 ms of CPU a page again; vLLM's own is 4.",
    )
    limit_mm_per_prompt: dict[str, int] | None = Field(
        None,
        description="Most images in a prompt, for which `vllm` reserves memory; default: `{image: pages.per_request, video: 0}`, one "
        "more where a rule asks again, with `evidence.model` at least 8. More reserves memory that is never used; fewer is refused.",
    )
    quantization: str | None = Field(
        None,
        description="How `vllm` runs quantised weights. By default it takes its fastest kernel for the checkpoint (awq_marlin for AWQ on "
        "newer GPUs); naming `awq` forces a slower one.",
    )
    kv_cache_dtype: str = Field(
        "auto",
        description="Type of the attention cache of `vllm`; `auto` is the weights'. `fp8` holds twice as many requests and costs accuracy.",
    )
    enforce_eager: bool = Field(
        False,
        description="Run without CUDA graphs, and `vllm` also without compiled kernels, so that it starts a minute sooner. A GPU answers "
        "more slowly then; the graphs of `transformers` take memory that is to be measured. On a CPU it has none.",
    )
    enable_prefix_caching: bool = Field(
        True,
        description="Compute the prefix that requests share, the instructions and in a re-ask the pages, only once in `vllm`. Costs "
        "next to nothing.",
    )
    engine_args: dict[str, Any] = Field(
        {},
        description="Any other argument of vLLM's engine, by its vLLM name. All count as changing answers, so they cannot be changed once "
        "an output has been started. `distributed_executor_backend: ray` spreads one model over several machines.",
    )
    base_url: str | None = Field(
        None,
        description="Address of the server that the engine `openai` asks, without `/chat/completions`; usually ends in `/v1`.",
    )
    api_key_env: str | None = Field(
        None, description="Name of the environment variable that holds the server's key. The key itself is never written anywhere."
    )
    server: Literal["auto", "vllm", "other"] = Field(
        "auto",
        description="Kind of server. `vllm` is also sent every sampling setting, in place of the checkpoint's defaults, and must not "
        "resize pages, which costs two short requests before the run to check; `other` may resize them. `auto` asks the server.",
    )
    structure: Literal["auto", "json_schema", "tool", "prompt"] = Field(
        "auto",
        description="How the server is made to follow the schema: constrained decoding, a forced tool call, or the schema in the prompt "
        "alone, which costs its tokens in every request and more re-asks. `auto` tries them in this order before the run, in a few short "
        "requests.",
    )
    logprobs: bool | None = Field(
        None,
        description="Keep every token's log-probability, of which the certainty of values is made. Costs ten times the answer's bytes in "
        "the ledger and from a server, and in `vllm` a pass over the vocabulary for each token. Default: yes, from a server if it can.",
    )
    image_format: Literal["png", "jpeg"] = Field(
        "png",
        description="Format of the pages sent to the server. `png` keeps every pixel; `jpeg` is a quarter of its size for scans and "
        "blurs small print.",
    )
    extra_body: dict[str, Any] = Field(
        {},
        description="Keys added to every request to the server, replacing the request's own; null removes one. job.yaml shows them: "
        "no secrets.",
    )
    concurrency: int = Field(
        16, ge=1, le=1024, description="Concurrent requests to the server, per actor. More use it better, until it answers 429."
    )
    idle_timeout_s: float = Field(
        120.0,
        gt=0,
        description="Longest time without data from the server, before an answer or within it; then the request is sent again. Too short "
        "for a server with a queue sends every request twice.",
    )
    timeout_s: float = Field(
        900.0,
        gt=0,
        description="Longest time for one answer of the server; then it is cut off and fails (`timeout`), and its tokens are still "
        "charged.",
    )
    max_retries: int = Field(
        6,
        ge=0,
        le=100,
        description="How often a request is sent again after 429, 5xx, a lost connection or a stalled answer, 1 s later, then 2, 4, … up "
        "to 60 s. More survive longer outages; each may be charged.",
    )

    @property
    def sequences(self) -> int:
        """Requests that vLLM answers together; `UNKNOWN_SEQUENCES` while that is not decided."""
        return self.max_num_seqs or UNKNOWN_SEQUENCES

    @property
    def gpus(self) -> int:
        """Number of GPUs that one engine uses."""
        return self.tensor_parallel_size * self.pipeline_parallel_size if self.engine == "vllm" else 1

    @property
    def reserves_gpus_itself(self) -> bool:
        """Whether vLLM itself reserves the GPUs from Ray; otherwise its actor does."""
        return self.engine == "vllm" and self.engine_args.get("distributed_executor_backend") == "ray"

    @model_validator(mode="before")
    @classmethod
    def add_server_model_name(cls, data: Any) -> Any:
        """Make `auto` the default of `name` with the engine `openai`."""
        return {"name": "auto"} | data if isinstance(data, dict) and data.get("engine") == "openai" else data

    @model_validator(mode="after")
    def check_engine_keys(self) -> ModelSection:
        """Raise ValueError for `engine_args` and server keys that cannot be used. Messages repeat no value: it may be a secret."""
        check_engine_args(self.engine_args)
        if self.weights != "auto" and self.engine in ("vllm", "openai"):
            raise ValueError(f"weights is for the engine transformers, and model.engine is {self.engine}")
        if self.engine != "openai":
            for key in ("base_url", "api_key_env"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is for the engine openai, and model.engine is {self.engine}")
            return self
        check_server_address(self.base_url)
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError("api_key_env is not the name of an environment variable; the key itself must not be in a job")
        if taken := sorted({"messages", "model", "stream"} & self.extra_body.keys()):
            raise ValueError(f"extra_body cannot change {' and '.join(taken)}")
        return self


ARGUMENTS_WITH_OWN_KEY = {
    "model": "model.name",
    "enable_lora": "model.lora",
    "mm_processor_kwargs": "pages.min_pixels and pages.max_pixels",
    **{
        name: f"model.{name}"
        for name in ModelSection.model_fields
        if name not in ("name", "engine", "rope_scaling", "engine_args", "max_num_batched_tokens", "mm_processor_cache_gb")
    },
}
"""Arguments of vLLM's engine that are set by other keys of a job, and those keys; the two that became keys later may be in either place."""
FIXED_ARGUMENTS = {
    "trust_remote_code": "no code that comes with a checkpoint is run",
    "load_format": "only safetensors are read",
    "structured_outputs_config": "records depend on it",
    "logprobs_mode": "the ledger depends on it",
    "mm_device_do_normalize": "pages are sent to vLLM as bytes",
    "hf_token": "job.yaml shows it; set the environment variable HF_TOKEN",
}
"""Arguments of vLLM's engine that no job may set, and why."""


def check_engine_args(arguments: dict[str, Any]) -> None:
    """Raise ValueError for arguments of vLLM's engine that other keys set, or that no job may set."""
    for name in arguments:
        if name in ARGUMENTS_WITH_OWN_KEY:
            raise ValueError(f"engine_args: {name} is set by {ARGUMENTS_WITH_OWN_KEY[name]}")
        if name in FIXED_ARGUMENTS:
            raise ValueError(f"engine_args cannot change {name}: {FIXED_ARGUMENTS[name]}")


def check_server_address(base_url: str | None) -> None:
    """Raise ValueError for a text that is not a server's http(s) address, or holds a secret."""
    if base_url is None:
        raise ValueError("the engine openai needs base_url, the server's address (http://127.0.0.1:8000/v1)")
    try:
        url = urlsplit(base_url)
        is_valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError("base_url is not an http(s) address such as http://127.0.0.1:8000/v1")
    if "@" in url.netloc or url.query or url.fragment:
        raise ValueError("base_url holds a user, a password or a query: name the variable that holds the key in api_key_env instead")
    if url.path.rstrip("/").endswith("/chat/completions"):
        raise ValueError("base_url ends in /chat/completions: remove that part")
