"""Pydantic models of a job file: every key with its type, bounds, default and what choosing it costs.

In: the mapping that `yaml_file.py` reads. Out: a frozen `JobSections`, or pydantic's ValidationError. The documentation's table
of keys is generated from the descriptions.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.budget import PixelBudget, check_budget
from pipeline.job.model_section import ModelSection, Section
from pipeline.schema import rules
from pipeline.storage import location


class SourceSection(Section):
    paths: tuple[str, ...] = Field(
        min_length=1,
        description="Files, folders (read recursively), globs and manifests (.txt, .csv, .jsonl, .parquet with a `path` column), "
        "relative to the job file; http(s) URLs of single files; objects, prefixes and globs in object stores (s3://, gs://, az://). A "
        "manifest's other columns are copied into the records.",
    )
    password_env: str | None = Field(
        None,
        description="Name of the environment variable that holds the password of encrypted PDFs. It is read on each machine that renders "
        "and must be set there.",
    )
    keep_query: bool = Field(
        False,
        description="Keep the query of http(s) URLs in `_source`, events and messages. Costs secrecy: a query may be a signature that lets "
        "anyone fetch the document. By default a digest stands for it, and the whole URL is in `sources/` alone.",
    )
    allow_outside: bool = Field(
        False,
        description="Let a manifest name files outside its own folder. Costs safety: the author of a manifest can then have any file "
        "on your disk read.",
    )
    allow_private: bool = Field(
        False,
        description="Let http(s) URLs lead to private, loopback and link-local addresses. Costs safety: the author of a manifest, "
        "or a server that it names, can then reach your network and your cloud's metadata.",
    )
    relist: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether a run on an output that has a listing lists again. `always` looks at every path, file and object. `auto` does "
        "so too, but not for objects that a manifest names and an interrupted run has read: each is a request. `never` takes the documents "
        "in `sources/` of the output and looks at nothing. Costs: new, changed and removed files are not seen.",
    )


class PagesSection(Section):
    dpi: int = Field(200, ge=36, le=1200, description="Resolution at which a PDF page is measured before the pixel budget applies.")
    min_pixels: int = Field(
        200_704, description="Fewest pixels per page; smaller pages are enlarged. A visual token is 784 of them, with Qwen3-VL 1,024."
    )
    max_pixels: int = Field(
        1_003_520,
        description="Most pixels per page. 1,003,520 is 1,280 visual tokens (980 with Qwen3-VL), an A4 page at about 100 dpi. More costs "
        "compute in proportion; small print may need it.",
    )
    resized_height: int | None = Field(
        None, description="Fixed height in pixels for every page instead of the two bounds; needs `resized_width`."
    )
    resized_width: int | None = Field(
        None, description="Fixed width in pixels for every page; one of another shape keeps its proportions, the rest stays white."
    )
    per_request: int = Field(
        4,
        ge=1,
        le=64,
        description="Most pages in one request; longer documents are split. More show the model more of a document at once and cost a "
        "longer context.",
    )

    @model_validator(mode="after")
    def check_pixel_budget(self) -> PagesSection:
        check_budget(self.budget)
        return self

    @property
    def budget(self) -> PixelBudget:
        return PixelBudget(self.min_pixels, self.max_pixels, self.resized_height, self.resized_width)


class RuleSection(Section):
    name: str = Field(pattern=f"^{rules.NAME.pattern}$", description="Its name in `_rules`.")
    expression: str = Field(min_length=1, description="In CEL, true where the rule holds.")
    message: str = Field(min_length=1, description="What a broken rule means.")
    fields: tuple[str, ...] = Field((), description="Columns that it concerns, with dots inside arrays and objects.")
    if_null: Literal["skip", "judge"] = Field("skip", description="What becomes of it where a field is null.")
    re_ask: bool = Field(
        False,
        description="Ask once more for its fields alone where an answer breaks it ([asking again](#asking-again-where-a-rule-is-broken)). "
        "Costs a request of its own for each such document; one that takes several requests (`pages.per_request`) is not asked again.",
    )


class ExtractSection(Section):
    schema_file: str = Field(
        alias="schema",
        min_length=1,
        description="The JSON Schema (Draft 2020-12 or draft-07) of one record, relative to the job file; or a pydantic model, "
        "`mypackage.models:Invoice`, imported with the job file's folder on the module search path.",
    )
    per: Literal["document", "page"] = Field(
        "document", description="One record per document, or one per page (then every page is a request)."
    )
    absent: Literal["allow", "forbid"] = Field(
        "allow",
        description="`allow` lets the model write null for every value; a record that lacks a required one is `invalid` and says which. "
        "`forbid` keeps a document of one request to the schema: where a page shows no value, the model must make one up.",
    )
    instructions: str = Field("", description="Added to the prompt; the schema's titles and descriptions are in it already.")
    rules: tuple[RuleSection, ...] = Field(
        (),
        description="What must hold in a record, as [expressions](#rules), beside the schema's `x-rules`; one of the same name replaces "
        "it. Results are in `_rules` and change nothing else, unless a rule has `re_ask: true`. Can be changed without asking again: "
        "`pipeline settle` judges anew.",
    )
    calibration: str | None = Field(
        None,
        description="A file that `pipeline eval --calibrate` wrote, relative to the job file: `_confidence` is then a "
        "[measured probability](evaluation.md#calibration). It must be of the same schema, model and engine. Can be changed without asking "
        "again: `pipeline settle` rates anew. Costs 0.02 ms per value in settling.",
    )
    re_asks: int = Field(
        1,
        ge=0,
        le=5,
        description="How often a request is repeated, with the validation errors added, after an answer that does not validate. Each costs "
        "a whole request.",
    )


class EvidenceSection(Section):
    text: Literal["on", "off"] = Field(
        "on",
        description="Look for every value in the text layer of its pages, so that the records say where on the page it stands, and which "
        "values no reader but the model sees. Words that a reader cannot see are found and witness nothing. Costs about 5 ms of a render "
        "task's CPU per PDF page, 1 ms per page and 0.1 ms per value in settling, and about 2 kB per page in `requests/`. Only pages that "
        "are rendered while it is on have words: an output that was asked with `off` gets none by settling it again.",
    )

    ocr: Literal["off", "doubtful", "scans", "all"] = Field(
        "off",
        description="Read pages by OCR, which knows nothing of the model's answer, and look for the values in its words, too. `scans`: "
        "pages without a usable text layer (scans, images, layers of OCR software, fonts without a table of letters), and of documents "
        "whose layer lacks a value the first pages; `all`: every page; `doubtful`: the pages of documents with a value that nothing "
        "witnesses, an invalid record, a confidence below 0.8, a broken rule, a disagreement or an alert. Costs 3 s of one CPU for a "
        "receipt, 3 to 10 s for a page of text (16 ms a word), after the asking and without the GPU, one more reading of the files, and "
        "about 2 kB per page in `words/`. It can be switched on for an output that was asked without it. Needs "
        "`pip install 'pipeline-documents[ocr]'`.",
    )

    model: Literal["on", "off"] = Field(
        "off",
        description="Ask the model where on the pages the values stand that their text layer does not show, and have it read these parts "
        "again, alone and enlarged, without the values ([rereading](records.md#reading-again)). What it reads again is `reread`; it is "
        "its own reader, so that this verifies less than a witness. Costs 2 to 7 requests more for each request whose pages lack a value: "
        "one with its pages, and one for each 8 parts; about 40 tokens to write for a value, and 256 visual tokens or more for its part. "
        "Only documents that are asked while it is on are read again.",
    )

    @field_validator("text", "ocr", "model", mode="before")
    @classmethod
    def convert_switch(cls, value: Any) -> Any:
        """Accept on and off, which YAML reads as true and false."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class SamplingSection(Section):
    temperature: float = Field(0.0, ge=0, le=2, description="0 always takes the likeliest token: the same pages give the same record.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that make up this share.")
    top_k: int = Field(0, ge=0, description="Sample from this many of the likeliest tokens; 0 means all.")
    repetition_penalty: float = Field(1.0, gt=0, le=2, description="Above 1 discourages repeated tokens. Harms tables of equal values.")
    max_tokens: int = Field(2048, ge=1, description="Longest answer in tokens. One that reaches it is a failure, never a result.")
    seed: int = Field(0, ge=0, description="Seed of the sampling; has no effect at temperature 0.")


class LimitsSection(Section):
    timeout_s: float = Field(
        60.0,
        gt=0,
        description="Longest time to open a document or render one page; then it is killed and fails. All pages of a document "
        "together may take ten times that, plus a tenth of it per page. OCR of a page may take five times as long.",
    )
    memory_mib: int = Field(2048, ge=256, description="Address space of a rendering process. A page that needs more fails.")
    max_pages: int = Field(2000, ge=1, description="Most pages of a document; a longer one fails.")
    max_file_mib: int = Field(256, ge=1, description="Largest file; a larger one fails without being read.")
    download_s: float = Field(
        120.0,
        gt=0,
        le=86_400,
        description="Longest time to fetch an http(s) URL, redirects included; then it fails. More waits longer for slow servers and keeps "
        "a renderer idle meanwhile.",
    )
    max_image_megapixels: int = Field(
        300, ge=1, description="Largest image; a larger one (usually a decompression bomb) fails before it is decoded."
    )
    max_request_tokens: int = Field(
        32_768,
        ge=256,
        description="Most tokens of one request, `sampling.max_tokens` included; one that needs more fails (`too_long`) before it reaches "
        "the model. More allow more pages per request and cost memory; beyond 32,768 these models need `model.rope_scaling`.",
    )
    max_failure_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the last 1,000 requests that may fail before the run stops (exit code 3). 1 never stops it; 0.5 "
        "saves a night when a disk or an engine fails, but also stops for a folder of broken files.",
    )
    min_requests: int = Field(20, ge=1, description="Requests that must have finished before `max_failure_ratio` applies.")

    disagreements: Literal["keep", "invalid"] = Field(
        "keep",
        description="What becomes of a record whose requests read different values: it keeps one and lists the others in "
        "`_disagreements`, or it is `invalid`, too.",
    )
    partial: Literal["keep", "fail"] = Field(
        "keep",
        description="What becomes of a document with pages that cannot be drawn: its other pages are asked and make a record with "
        "`_partial`, or it fails.",
    )
    canary: int = Field(
        20,
        ge=0,
        description="Documents that a run on a new output asks first, where there are more. 0 asks all at once. The others wait until so "
        "many of these are good that the run goes on whatever comes of the rest, or all are answered.",
    )
    canary_failures: float = Field(
        0.8,
        ge=0,
        le=1,
        description="Share of those documents that may fail or be invalid before the run stops (exit code 3), so that a wrong schema does "
        "not cost a night. Files that cannot be read do not count. 1 never stops it.",
    )


class OutputSection(Section):
    path: str = Field(
        description="Folder of the results, relative to the job file, or a prefix in an object store: s3://bucket/out, gs://, az:// "
        "(`pip install 'pipeline-documents[s3]'`, `[gcs]`, `[azure]`). A store costs two requests every few "
        "seconds and one per shard read.",
    )

    @field_validator("path")
    @classmethod
    def check_path(cls, value: str) -> str:
        return location.check_store_url(value) if location.is_url(value) else str(Path(value))


def check_cluster_address(address: str | None) -> None:
    """Raise ValueError for what is not the address of a Ray cluster."""
    if address in (None, "auto", "local"):
        return
    if re.match(r"https?://", str(address)):
        raise ValueError("an http(s) address is a cluster's job server, which is what `pipeline submit --address` expects")
    host = r"([^\s/:@]+|\[[0-9A-Fa-f:]+\])"
    if str(address).startswith("ray://"):
        raise ValueError("a cluster cannot be joined by ray://; `pipeline submit --address http://HEAD:8265` starts a run on it")
    if not re.fullmatch(rf"{host}:\d+", str(address)):
        raise ValueError("a cluster's address must be auto, local or HOST:6379")


class RaySection(Section):
    address: str | None = Field(
        None,
        description="Ray cluster to join: `auto` for the one that was started on this machine, `HOST:6379` from a machine of the "
        "cluster; from outside, `pipeline submit` starts a run on it. Default: the environment's RAY_ADDRESS, else a new Ray on this "
        "machine, which `local` always means. Costs: documents and output must be reachable from all its machines, and "
        "this package is sent to each of them.",
    )
    shared_filesystem: bool = Field(
        False,
        description="States that the cluster's machines have this job's local paths at the same place. Without it `pipeline submit` "
        "refuses local paths; where it is not true, files are not found, and results stay on a machine of the cluster.",
    )
    actors: int | tuple[int, int] = Field(
        1,
        description="Engine actors; each loads the model once for a run. Two numbers, `[1, 8]`: another is started while all have as many "
        "requests as they take, on a new machine where the cluster can start one, and one that had none for a minute is ended; each costs "
        "the time to load the model.",
    )
    renderers: int | None = Field(
        None,
        ge=1,
        description="Most renderers at once for each machine of the cluster; default: as many as it has CPUs for, one beside a model on "
        "the CPU. Each has a process of about 250 MB beside its renderer; fewer leave memory on machines with many cores, and must still "
        "keep the engines busy.",
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="How often a dead engine actor is replaced, which loads the model again, before the run stops (exit code 3). The death "
        "of a request that was asked alone does not count; with less than 2 no request is found that kills its engine.",
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
    def check_address(cls, value: str | None) -> str | None:
        check_cluster_address(value)
        return value

    @field_validator("actors")
    @classmethod
    def check_actors(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        least, most = value if isinstance(value, tuple) else (value, value)
        if not 1 <= least <= most:
            raise ValueError("actors must be a number of at least 1, or the least and the most actors, such as [1, 8]")
        return value

    @property
    def least_actors(self) -> int:
        return self.actors[0] if isinstance(self.actors, tuple) else self.actors

    @property
    def most_actors(self) -> int:
        return self.actors[1] if isinstance(self.actors, tuple) else self.actors


class JobSections(Section):
    """The whole job file, defaults filled in."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="Name of the job.")
    source: SourceSection
    pages: PagesSection = PagesSection()
    extract: ExtractSection
    evidence: EvidenceSection = EvidenceSection()
    model: ModelSection
    sampling: SamplingSection = SamplingSection()
    limits: LimitsSection = LimitsSection()
    output: OutputSection
    ray: RaySection = RaySection()

    @model_validator(mode="before")
    @classmethod
    def drop_empty_sections(cls, data: Any) -> Any:
        """Treat a section whose keys are all commented out as absent."""
        return {name: value for name, value in data.items() if value is not None or name not in cls.model_fields}

    @field_validator("name", mode="before")
    @classmethod
    def convert_name(cls, value: Any) -> Any:
        """Accept a name that YAML reads as a number, such as 2024."""
        return str(value) if isinstance(value, int | float) else value
