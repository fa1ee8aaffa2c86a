"""Job: one YAML file, checked, as an immutable value.

In: a job file, `--set` options and the JSON Schema that the file names. Out: a frozen `Job` that says which documents are
read, how pages are rendered, which model answers and where the results are written; nothing is started.

An unknown key, a wrong value or an unreadable schema raises a JobError that names file, line, key, what was found and what
is allowed. The keys are declared in `sections.py` and `model_section.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline import schema
from pipeline.budget import CELL_PX, PixelBudget, check_budget
from pipeline.errors import JobError
from pipeline.job.pydantic_model import is_model_name, load_model_schema
from pipeline.job.sections import JobSections
from pipeline.job.yaml_file import KeyPositions, apply_setting, build_job_error, read_yaml
from pipeline.records import Sampling
from pipeline.schema import prompt
from pipeline.schema.request_schema import build_request_schema
from pipeline.schema.rules import RecordRule, combine_rules, list_schema_rules
from pipeline.storage.location import Location, hide_query, is_store_url, parse_location
from pipeline.version import __version__

DEMO_MODEL = "demo"
DEMO_MARK = b"sample of pipeline's demonstration model"
"""What the sample documents carry: in a PDF's metadata, in an image's comment. Where the demonstration model answers in place of the
job's own, it reads no document without it."""
PARTS_PER_REQUEST = 8
"""Parts of pages that a request has which reads values again (`evidence.model`)."""
TRANSFORMERS_KEYS = {"name", "revision", "dtype", "rope_scaling", "lora"}
VLLM_KEYS = TRANSFORMERS_KEYS | {"engine", "quantization", "kv_cache_dtype", "engine_args"}
SERVER_KEYS = {"engine", "name", "server", "structure", "image_format", "extra_body"}
DECISIVE_MODEL_KEYS = {"openai": SERVER_KEYS, "vllm": VLLM_KEYS}
"""The keys of the section `model` that decide an answer, by engine; `TRANSFORMERS_KEYS` for all others. The number of GPUs or of
concurrent requests does not, nor does a server's address: the same model gives the same answer at another one."""


@dataclass(frozen=True)
class Job:
    """A checked job. Paths are absolute; the output may be an object store's URL."""

    file: Path
    sections: JobSections
    schema: schema.Schema
    output: Location

    @classmethod
    def load(cls, file: str | Path, settings: Sequence[str] = (), output: str | Path | None = None) -> Job:
        """Return the job in a YAML file, changed by `key=value` settings with dotted keys.

        `output` replaces `output.path` and is relative to the working directory, not to the job file. Raises JobError.
        """
        path = Path(file).absolute()
        return cls.build(path, *read_yaml(path), settings, output)

    @classmethod
    def build(
        cls, path: Path, data: dict[str, Any], positions: KeyPositions, settings: Sequence[str] = (), output: str | Path | None = None
    ) -> Job:
        """Return the job of these keys, as `load` does; relative paths are those of the job file at `path`. Changes `data`."""
        for setting in settings:
            apply_setting(data, setting, positions)
        try:
            sections = JobSections.model_validate(data)
        except ValidationError as error:
            raise build_job_error(error, JobSections, path, positions) from None
        target = parse_location(str(output) if output else sections.output.path)
        if isinstance(target, Path):
            target = target.absolute() if output else (path.parent / target.expanduser()).resolve()
        job = cls(path, sections, find_schema(sections.extract.schema_file, path.parent), target)
        try:
            _ = job.system_message  # raises for instructions or a schema that hold a control token
        except JobError as error:
            raise JobError(f"{path}: {error}", path) from None
        job.check_image_limit()
        return job

    def check_image_limit(self) -> None:
        """Raise JobError for a limit below the number of images that a request has."""
        limit = (self.sections.model.limit_mm_per_prompt or {}).get("image")
        if limit is not None and limit < self.most_images:
            key = "pages.per_request" if self.most_images == self.images_per_request else "evidence.model"
            message = f"model.limit_mm_per_prompt allows {limit} images, but a request has up to {self.most_images} ({key})"
            raise JobError(f"{self.file}: {message}", self.file, "model.limit_mm_per_prompt")

    @cached_property
    def system_message(self) -> str:
        """The system message that all requests share."""
        return prompt.build_system_message(self.schema, self.sections.extract.instructions)

    @cached_property
    def request_schema(self) -> str:
        """The JSON text of the schema by which an engine decodes an answer about a whole document or page."""
        return build_request_schema(self.schema, absent=self.sections.extract.absent == "allow")

    @cached_property
    def part_schema(self) -> str:
        """The same for the pages of one of several requests: the others may have what these lack."""
        return build_request_schema(self.schema, absent=True)

    @cached_property
    def rules(self) -> tuple[RecordRule, ...]:
        """The rules of the schema and of the job. Raises JobError."""
        own = [
            RecordRule(rule.name, rule.expression, rule.message, rule.fields, rule.if_null == "judge", rule.re_ask)
            for rule in self.sections.extract.rules
        ]
        try:
            return combine_rules(list_schema_rules(self.schema), own)
        except ValueError as error:
            raise JobError(f"{self.file}: {error}", self.file, "extract.rules") from None

    @property
    def sampling(self) -> Sampling:
        return Sampling(**self.sections.sampling.model_dump())

    @property
    def pages_per_request(self) -> int:
        return 1 if self.sections.extract.per == "page" else self.sections.pages.per_request

    @cached_property
    def images_per_request(self) -> int:
        """Most images of a request for a record: its pages, and the enlarged part of one where a rule asks again. Raises JobError."""
        return self.pages_per_request + any(rule.asks_again for rule in self.rules)

    @property
    def most_images(self) -> int:
        """Most images of any request: one that reads values again has smaller ones, and may have more. Raises JobError."""
        return max(self.images_per_request, PARTS_PER_REQUEST if self.sections.evidence.model == "on" else 0)

    @cached_property
    def budget(self) -> PixelBudget:
        """The pixel budget of the pages in the cells of the job's model; of 28 px while the model is not known.

        Raises JobError where no page fits the budget in cells of this size.
        """
        budget = replace(self.sections.pages.budget, cell_px=self.sections.model.cell_px or CELL_PX)
        try:
            check_budget(budget)
        except ValueError as error:
            raise JobError(f"{self.file}: pages: {error} (one visual token is {budget.cell_px}x{budget.cell_px} px)", self.file) from None
        return budget

    @property
    def uses_demo(self) -> bool:
        return self.sections.model.name == DEMO_MODEL and self.sections.model.engine != "openai"

    def with_demo(self) -> Job:
        """Return the job with the demonstration model in place of its own; where the engine is `auto`, in this process."""
        engine = self.sections.model.engine
        engine = "transformers" if engine == "auto" else engine
        return self.with_model(
            name=DEMO_MODEL, engine=engine, revision=__version__, lora=None, lora_revision=None, rope_scaling=None, cell_px=None,
            weights="auto",
        )  # fmt: skip

    def with_model(self, **keys: Any) -> Job:
        """Return the job with these keys of the section `model` replaced."""
        model = self.sections.model.model_copy(update=keys)
        return Job(self.file, self.sections.model_copy(update={"model": model}), self.schema, self.output)

    def with_resolved_model(self, model: Mapping[str, Any]) -> Job:
        """Return the job with the model that an earlier run resolved, given the section `model` of that run's `job.yaml`.

        The engine, where it is `auto`, the demonstration model, the revisions of a model in an object store or on the hub and of its
        adapter, and the size of a visual token are taken over, unless the job names them; of a server, each key that is `auto`.
        """
        own = self.sections.model
        if own.engine != "openai":
            begun = self.with_begun_engine(model)
            if model["name"] == DEMO_MODEL:
                return begun.with_demo().with_model(cell_px=model.get("cell_px"))
            if model["name"] != own.name:
                return begun
            pinned = own.revision is not None and (is_store_url(own.name) or is_commit(own.revision))
            found = {"revision": own.revision if pinned else model["revision"]}
            if model.get("lora") == own.lora and not (own.lora_revision and is_commit(own.lora_revision)):
                found["lora_revision"] = model.get("lora_revision")
            return begun.with_model(**found, cell_px=own.cell_px or model.get("cell_px"))
        return self.with_model(**{key: model.get(key, "auto") for key in ("name", "server", "structure") if getattr(own, key) == "auto"})

    def with_begun_engine(self, model: Mapping[str, Any]) -> Job:
        """Return the job with the engine of the run that began its output, where its own is `auto`.

        Older versions wrote `auto` for what was always transformers.
        """
        if self.sections.model.engine != "auto" or model["engine"] == "openai":
            return self
        return self.with_model(engine="transformers" if model["engine"] == "auto" else model["engine"])

    def resolve_local_path(self, name: str) -> Path:
        """Return the path of a name in the job: relative to the job file, `~` expanded."""
        return self.file.parent / os.path.expanduser(name)  # Path.expanduser raises for the home of an unknown user

    def is_local_path(self, name: str) -> bool:
        """Say whether a model's or adapter's name means a local folder, which need not exist, rather than a hub id."""
        return name.startswith((".", "/", "~")) or self.resolve_local_path(name).is_dir()

    @property
    def decisive_keys(self) -> dict[str, Any]:
        """Everything that can change an answer and therefore is part of a request's key."""
        sections = self.sections
        return {
            "extract": {
                "absent": sections.extract.absent,
                "per": sections.extract.per,
                "re_asks": sections.extract.re_asks,
                "schema": json.loads(schema.dump_compact_schema(self.schema)),
            },
            "model": sections.model.model_dump(include=DECISIVE_MODEL_KEYS.get(sections.model.engine, TRANSFORMERS_KEYS))
            | ({"cell_px": self.budget.cell_px} if self.budget.cell_px != CELL_PX else {})
            | ({"weights": sections.model.weights} if sections.model.weights != "auto" else {})
            | ({"lora_revision": sections.model.lora_revision} if sections.model.lora_revision else {}),
            "pages": sections.pages.model_dump() | {"per_request": self.pages_per_request},
            "prompt": self.system_message,
            "sampling": asdict(self.sampling),
        }

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change whenever a decisive key does: the start of the SHA-256 of their canonical JSON."""
        text = json.dumps(self.decisive_keys, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def dump_keys(self) -> dict[str, Any]:
        """Return every key with its value, as `pipeline check` prints it and `job.yaml` records it: URLs without their queries,
        unless the job keeps these."""
        keys = self.sections.model_dump(mode="json", by_alias=True)
        if not self.sections.source.keep_query:
            keys["source"]["paths"] = [hide_query(path) for path in keys["source"]["paths"]]
        return keys


def is_commit(revision: str) -> bool:
    """Say whether a revision of a hub's repository is a commit, which never changes, rather than a branch or a tag."""
    return bool(re.fullmatch(r"[0-9a-f]{40}", revision))


def find_schema(name: str, folder: Path) -> schema.Schema:
    """Return the schema in a file, or of a pydantic model. Raises JobError."""
    file = folder / os.path.expanduser(name)
    return load_model_schema(name, folder) if is_model_name(name) and not file.exists() else schema.load_schema(file)


def find_differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ; a schema counts as one value."""
    changed = []
    for key in sorted({*before, *now}):
        old, new, name = before.get(key), now.get(key), f"{prefix}{key}"
        if name != "extract.schema" and isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += find_differences(old, new, f"{name}.")
        elif old != new:
            changed.append(name)
    return changed
