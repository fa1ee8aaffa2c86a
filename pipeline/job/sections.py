"""Every key of a job file, with its type, its bounds, its default and what choosing it costs. Knows no file and no schema.

README's table of keys is made from these descriptions.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.budget import PixelBudget, check_budget
from pipeline.job.model_section import ModelSection, Section
from pipeline.storage import location


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
        check_budget(self.budget)
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
        return location.check_store_url(value) if location.is_url(value) else str(Path(value))


def check_cluster_address(address: str | None) -> None:
    """Raise ValueError for what is not the address of a Ray cluster."""
    if address in (None, "auto", "local"):
        return
    if re.match(r"https?://", str(address)):
        raise ValueError("an http(s) address is a cluster's job server, which `pipeline submit --address` speaks to")
    host = r"([^\s/:@]+|\[[0-9A-Fa-f:]+\])"
    if not re.fullmatch(rf"ray://{host}(:\d+)?|{host}:\d+", str(address)):
        raise ValueError("a cluster's address is auto, local, HOST:6379 or ray://HOST:10001")


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
        None,
        gt=0,
        description="CPUs an actor reserves and the threads it uses; default: 1 beside a GPU, else all but what "
        "rendering needs, and no more than a machine has.",
    )

    @field_validator("address")
    @classmethod
    def joinable(cls, value: str | None) -> str | None:
        check_cluster_address(value)
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
