"""Every key of a job file, with its type, its bounds, its default and what choosing it costs. Knows no file and no schema.

README's table of keys is made from these descriptions.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline import place
from pipeline.budget import PixelBudget, check


class Section(BaseModel):
    """A part of the job file: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceSection(Section):
    paths: tuple[str, ...] = Field(
        min_length=1,
        description="Files, folders (read recursively), globs and manifests (.txt, .csv, .jsonl, .parquet with a `path` column), "
        "relative to the job file; http(s) URLs of single files; objects, prefixes and globs in object stores (s3://, gs://, az://). A "
        "manifest's other columns travel into the records.",
    )
    password_env: str | None = Field(None, description="Name of the environment variable that holds the password of encrypted PDFs.")
    allow_outside: bool = Field(
        False, description="Let a manifest name files outside its own folder. Costs safety: whoever writes the manifest reads your disk."
    )
    allow_private: bool = Field(
        False,
        description="Let http(s) URLs lead to private, loopback and link-local addresses. Costs safety: whoever writes the manifest, or "
        "a server it names, reaches your network and your cloud's metadata.",
    )


class PagesSection(Section):
    dpi: int = Field(200, ge=36, le=1200, description="Resolution at which a PDF page is measured before the pixel budget applies.")
    min_pixels: int = Field(200_704, description="Least pixels per page, 784 to a visual token: smaller pages are enlarged.")
    max_pixels: int = Field(
        1_003_520,
        description="Most pixels per page. 1,003,520 is 1,280 visual tokens, an A4 page at about 100 dpi; compute grows "
        "with it, small print may need more.",
    )
    resized_height: int | None = Field(
        None, description="Fixed height in pixels for every page instead of the two bounds; needs `resized_width`."
    )
    resized_width: int | None = Field(
        None, description="Fixed width in pixels for every page; one of another shape keeps its proportions, the rest stays white."
    )
    per_request: int = Field(
        4, ge=1, le=64, description="Most pages in one request. More see more context and need a longer one; longer documents are split."
    )

    @model_validator(mode="after")
    def possible(self) -> PagesSection:
        check(self.budget)
        return self

    @property
    def budget(self) -> PixelBudget:
        return PixelBudget(self.min_pixels, self.max_pixels, self.resized_height, self.resized_width)


class ExtractSection(Section):
    schema_file: Path = Field(
        alias="schema", description="The JSON Schema (Draft 2020-12 or draft-07) of one record, relative to the job file."
    )
    per: Literal["document", "page"] = Field(
        "document", description="One record per document, or one per page (then every page is a request)."
    )
    instructions: str = Field("", description="Added to the prompt; the schema's titles and descriptions are in it already.")
    re_asks: int = Field(
        1,
        ge=0,
        le=5,
        description="How often an answer that does not validate is asked for again, its errors shown. Each costs a whole request.",
    )


class ModelSection(Section):
    name: str = Field(
        description="Hub id or folder of a Qwen2.5-VL or Qwen2-VL checkpoint, AWQ or not; `demo` is the one in this package. With the "
        "engine `openai` the server's own name of its model; `auto`, the default there, takes the only one that it lists."
    )
    revision: str | None = Field(None, description="Commit of the hub repository; without it the newest one.")
    engine: Literal["auto", "transformers", "vllm", "openai"] = Field(
        "auto",
        description="Who runs the model. `auto` is `transformers`, in this process. `vllm` answers many more requests at once on a GPU; it "
        "must be installed (`pipeline[vllm]`), takes a minute or more to start and nearly all of the GPU's memory. `openai` is any server "
        "of Chat Completions at `model.base_url`: it needs no GPU here, and every page leaves this machine.",
    )
    without_gpu: Literal["stop", "demo", "cpu"] = Field(
        "stop",
        description="What to do where there is no GPU: stop with exit code 2, use the demonstration model of this package (said aloud and "
        "in every record), or run the named model on the CPU (minutes per page for 7B).",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="Weights' type; `auto` is float32 on a CPU; on a GPU bfloat16 for AWQ, else the checkpoint's own; with `vllm` what "
        "vLLM chooses.",
    )
    batch_size: int = Field(
        8,
        ge=1,
        le=512,
        description="Requests that the engine `transformers` answers together. More use the GPU better and need more of its memory.",
    )
    max_model_len: int | None = Field(
        None, ge=256, description="Longest prompt and answer in tokens; a request that exceeds it fails. Default: the model's own."
    )
    rope_scaling: dict[str, Any] | None = Field(
        None, description="YaRN settings for contexts beyond 32,768 tokens. Costs accuracy of positions on short ones."
    )
    lora: str | None = Field(
        None,
        description="Folder or hub id of a LoRA adapter. `transformers` merges it into the weights (needs the package `peft`); `vllm` "
        "applies it beside them, to the language model alone, which costs some speed.",
    )
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
        description="Share of the GPU's memory that `vllm` takes, by default 0.92 (its own choice). More holds more requests at once; too "
        "much leaves none for large pages. On a CPU the default is 4 GiB of attention cache.",
    )
    max_num_seqs: int = Field(
        64,
        ge=1,
        le=4096,
        description="Requests that `vllm` answers together; as many again wait beside them, each with its pages, 3 MB a page, in memory. "
        "More use the GPU better until its cache is full; from then on `vllm` does work twice.",
    )
    limit_mm_per_prompt: dict[str, int] | None = Field(
        None,
        description="Most images of a prompt, for which `vllm` keeps room: by default `{image: pages.per_request, video: 0}`. More keeps "
        "room in vain; fewer is refused.",
    )
    quantization: str | None = Field(
        None,
        description="How `vllm` runs quantised weights. By default it takes its fastest way for the checkpoint (awq_marlin for AWQ on "
        "newer GPUs); naming `awq` forces a slower one.",
    )
    kv_cache_dtype: str = Field(
        "auto",
        description="Type of the attention cache of `vllm`; `auto` is the weights'. `fp8` holds twice the requests, less exactly.",
    )
    enforce_eager: bool = Field(
        False,
        description="Let `vllm` run without compiled kernels and CUDA graphs: starts a minute sooner and answers slower.",
    )
    enable_prefix_caching: bool = Field(
        True,
        description="Let `vllm` compute the beginning that requests share, the instructions and at a re-ask the pages, once. Costs next to "
        "nothing.",
    )
    engine_args: dict[str, Any] = Field(
        {},
        description="Any other argument of vLLM's engine, by its name there. All count as changing answers, so an output under way cannot "
        "change them. `distributed_executor_backend: ray` spreads one model over several machines.",
    )
    base_url: str | None = Field(
        None,
        description="Address of the server that the engine `openai` asks, without `/chat/completions`; mostly ends in `/v1`.",
    )
    api_key_env: str | None = Field(
        None, description="Name of the environment variable that holds the server's key. The key itself is written nowhere."
    )
    server: Literal["auto", "vllm", "other"] = Field(
        "auto",
        description="Which server that is. `vllm` is also sent every sampling setting, in place of the checkpoint's defaults, and must "
        "leave pages their size, which costs two short requests before the run; `other` resizes them as it likes. `auto` asks the server.",
    )
    structure: Literal["auto", "json_schema", "tool", "prompt"] = Field(
        "auto",
        description="How the server is held to the schema: decoding under it, a forced tool call, or the schema in the prompt alone, which "
        "costs its tokens in every request and more re-asks. `auto` tries them in this order before the run, in a few short requests.",
    )
    logprobs: bool | None = Field(
        None, description="Have the server send every token's log-probability. Costs bytes, ten times the answer's; default: if it can."
    )
    image_format: Literal["png", "jpeg"] = Field(
        "png",
        description="How pages travel to the server. `png` keeps every pixel; `jpeg` is a quarter of it for scans and blurs small print.",
    )
    extra_body: dict[str, Any] = Field(
        {},
        description="Keys put into every request to the server, over its own; null takes one away. job.yaml shows it: no secrets.",
    )
    concurrency: int = Field(
        16, ge=1, le=1024, description="Requests under way at the server at once, per actor. More use it better, until it answers 429."
    )
    idle_timeout_s: float = Field(
        120.0,
        gt=0,
        description="Longest silence of the server, before an answer or within it; then it is asked again. Too short for a server with a "
        "queue asks it everything twice.",
    )
    timeout_s: float = Field(
        900.0, gt=0, description="Longest time for one answer of the server; then it is cut and fails (`timeout`), its tokens paid for."
    )
    max_retries: int = Field(
        6,
        ge=0,
        le=100,
        description="How often a request is sent again after 429, 5xx, a lost connection or a stalled answer, 1 s later, then 2, 4, … up "
        "to 60 s. More outlast longer outages; each may be charged.",
    )

    @property
    def gpus(self) -> int:
        """GPUs that one engine is spread over."""
        return self.tensor_parallel_size * self.pipeline_parallel_size if self.engine == "vllm" else 1

    @property
    def reserves_gpus_itself(self) -> bool:
        """Whether vLLM asks Ray for the GPUs, instead of its actor."""
        return self.engine == "vllm" and self.engine_args.get("distributed_executor_backend") == "ray"

    @model_validator(mode="before")
    @classmethod
    def unnamed(cls, data: Any) -> Any:
        """Let a server say its model's name."""
        return {"name": "auto"} | data if isinstance(data, dict) and data.get("engine") == "openai" else data

    @model_validator(mode="after")
    def reachable(self) -> ModelSection:
        """Refuse an address or a name of a key that cannot be one; what was written is not repeated, it may be a secret."""
        check_engine_args(self.engine_args)
        if self.engine != "openai":
            for key in ("base_url", "api_key_env"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is for the engine openai, and model.engine is {self.engine}")
            return self
        check_address(self.base_url)
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError("api_key_env is no name of an environment variable; the key itself does not belong into a job")
        if taken := sorted({"messages", "model", "stream"} & self.extra_body.keys()):
            raise ValueError(f"extra_body cannot change {' and '.join(taken)}")
        return self


ELSEWHERE = {
    "model": "model.name",
    "enable_lora": "model.lora",
    "mm_processor_kwargs": "pages.min_pixels and pages.max_pixels",
    **{name: f"model.{name}" for name in ModelSection.model_fields if name not in ("name", "engine", "rope_scaling", "engine_args")},
}
"""What the arguments of vLLM's engine that a job has a key of its own for are called there."""
FIXED = {
    "trust_remote_code": "no code that comes with a checkpoint is run",
    "load_format": "only safetensors are read",
    "structured_outputs_config": "records depend on it",
    "logprobs_mode": "the ledger depends on it",
    "hf_token": "job.yaml shows it; set the environment variable HF_TOKEN",
}


def check_engine_args(given: dict[str, Any]) -> None:
    """Raise ValueError for arguments that vLLM's engine is given by other keys, or that no job may change."""
    for name in given:
        if name in ELSEWHERE:
            raise ValueError(f"engine_args: {name} is said by {ELSEWHERE[name]}")
        if name in FIXED:
            raise ValueError(f"engine_args cannot change {name}: {FIXED[name]}")


def check_address(base_url: str | None) -> None:
    """Raise ValueError for what is not a server's address, or holds a secret."""
    if base_url is None:
        raise ValueError("the engine openai needs base_url, the server's address (http://127.0.0.1:8000/v1)")
    try:
        url = urlsplit(base_url)
        sound = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise ValueError("base_url is not an http(s) address such as http://127.0.0.1:8000/v1")
    if "@" in url.netloc or url.query or url.fragment:
        raise ValueError("base_url holds a user, a password or a query: name the variable that holds the key in api_key_env instead")
    if url.path.rstrip("/").endswith("/chat/completions"):
        raise ValueError("base_url ends in /chat/completions: leave that out")


def check_cluster(address: str | None) -> None:
    """Raise ValueError for what is not the address of a Ray cluster."""
    if address in (None, "auto", "local"):
        return
    if re.match(r"https?://", str(address)):
        raise ValueError("an http(s) address is a cluster's job server, which `pipeline submit --address` speaks to")
    host = r"([^\s/:@]+|\[[0-9A-Fa-f:]+\])"
    if not re.fullmatch(rf"ray://{host}(:\d+)?|{host}:\d+", str(address)):
        raise ValueError("a cluster's address is auto, local, HOST:6379 or ray://HOST:10001")


class SamplingSection(Section):
    temperature: float = Field(0.0, ge=0, le=2, description="0 always takes the likeliest token, and the same pages give the same record.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that make up this share.")
    top_k: int = Field(0, ge=0, description="Sample from so many likeliest tokens; 0 from all.")
    repetition_penalty: float = Field(1.0, gt=0, le=2, description="Above 1 discourages repeated tokens. Harms tables of equal values.")
    max_tokens: int = Field(2048, ge=1, description="Longest answer. One that reaches it is a failure, never a result.")
    seed: int = Field(0, ge=0, description="Seed of the sampling; has no effect at temperature 0.")


class LimitsSection(Section):
    timeout_s: float = Field(
        60.0,
        gt=0,
        description="Longest time to open a document or render one page; then it is killed and fails. All pages of a document "
        "together may take ten times that, plus a tenth of it per page.",
    )
    memory_mib: int = Field(2048, ge=256, description="Address space of a rendering process. A page that needs more fails.")
    max_pages: int = Field(2000, ge=1, description="Most pages of a document; a longer one fails.")
    max_file_mib: int = Field(256, ge=1, description="Largest file; a larger one fails without being read.")
    download_s: float = Field(
        120.0,
        gt=0,
        le=86_400,
        description="Longest time to fetch an http(s) URL, redirects and all; then it fails. More waits longer for slow servers, with a "
        "renderer idle meanwhile.",
    )
    max_image_megapixels: int = Field(
        300, ge=1, description="Largest image; a larger one (a decompression bomb, mostly) fails before it is decoded."
    )
    max_request_tokens: int = Field(
        32_768,
        ge=256,
        description="Most tokens of one request, `sampling.max_tokens` included; one that needs more fails (`too_long`) before it is "
        "asked. More read more pages at once, in memory that grows with it, and beyond 32,768 these models need `model.rope_scaling`.",
    )
    max_failure_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the last 1,000 requests that may fail before the run stops (exit code 3). 1 never stops it; 0.5 saves a "
        "night when a disk or an engine is lost, and stops for a folder of broken files too.",
    )
    min_requests: int = Field(20, ge=1, description="Requests that must have come back before `max_failure_ratio` counts.")


class OutputSection(Section):
    path: str = Field(
        description="Folder of the results, relative to the job file, or a prefix in an object store: s3://bucket/out, gs://, az:// "
        "(`pip install 'pipeline[s3]'`, `[gcs]`, `[azure]`). A store costs two requests every few seconds and one per shard read.",
    )

    @field_validator("path")
    @classmethod
    def writable(cls, value: str) -> str:
        return place.checked(value) if place.is_url(value) else str(Path(value))


class RaySection(Section):
    address: str | None = Field(
        None,
        description="Ray cluster to join: `auto` for the one that was started on this machine, `HOST:6379` from a machine of it, "
        "`ray://HOST:10001` from outside. Default: the environment's RAY_ADDRESS, else a Ray of its own here, which `local` always means. "
        "Costs: documents and output must be reachable from all its machines, and every worker starts with a copy of this package.",
    )
    shared_filesystem: bool = Field(
        False,
        description="The cluster's machines have this job's local paths at the same place. Without that `pipeline submit` and `ray://` "
        "refuse local paths; where it is not true, files are not found, and results lie on a machine of the cluster.",
    )
    actors: int | tuple[int, int] = Field(
        1,
        description="Engine actors; each loads the model once. Two numbers, `[1, 8]`, let Ray start more when all are busy, and new "
        "machines for them where the cluster can; each costs the time that the model takes to load.",
    )
    max_restarts: int = Field(
        3, ge=0, description="How often an engine actor that died is replaced, the model loaded anew, before the run stops (exit code 3)."
    )
    gpus_per_actor: float = Field(1.0, ge=0, description="GPUs an actor reserves, where there are any.")
    cpus_per_actor: float | None = Field(
        None, gt=0, description="CPUs an actor reserves and the threads it uses; default: 1 beside a GPU, else all but one."
    )

    @field_validator("address")
    @classmethod
    def joinable(cls, value: str | None) -> str | None:
        check_cluster(value)
        return value

    @field_validator("actors")
    @classmethod
    def some(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        least, most = value if isinstance(value, tuple) else (value, value)
        if not 1 <= least <= most:
            raise ValueError("actors is a number from 1 on, or the least and the most of them, such as [1, 8]")
        return value

    @property
    def least_actors(self) -> int:
        return self.actors[0] if isinstance(self.actors, tuple) else self.actors

    @property
    def most_actors(self) -> int:
        return self.actors[1] if isinstance(self.actors, tuple) else self.actors


class JobSections(Section):
    """The job file as written."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="Name of the job.")
    source: SourceSection
    pages: PagesSection = PagesSection()
    extract: ExtractSection
    model: ModelSection
    sampling: SamplingSection = SamplingSection()
    limits: LimitsSection = LimitsSection()
    output: OutputSection
    ray: RaySection = RaySection()

    @model_validator(mode="after")
    def enough_images(self) -> JobSections:
        """Refuse room for fewer images than a request has."""
        needed = 1 if self.extract.per == "page" else self.pages.per_request
        kept = (self.model.limit_mm_per_prompt or {}).get("image", needed)
        if kept < needed:
            raise ValueError(f"model.limit_mm_per_prompt allows {kept} images, a request has up to {needed} (pages.per_request)")
        return self

    @model_validator(mode="before")
    @classmethod
    def written(cls, data: Any) -> Any:
        """Take a section whose keys are all commented out for one that is not there."""
        return {name: value for name, value in data.items() if value is not None or name not in cls.model_fields}

    @field_validator("name", mode="before")
    @classmethod
    def text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) else value
