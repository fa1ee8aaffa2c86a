"""A YAML file -> a frozen `Job`: what to read, how to look at it, whom to ask, where to write. Starts nothing.

An unknown key, a wrong value or an unreadable schema is a JobError that names file, line, key, what was found and what
is allowed. The keys are in `keys`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline import schema
from pipeline.errors import JobError
from pipeline.job.sections import JobSections
from pipeline.job.yaml_file import apply_setting, explain_errors, read_yaml
from pipeline.records import Sampling
from pipeline.schema import prompt
from pipeline.storage.location import Location, is_store_url, parse_location
from pipeline.version import __version__

DEMO_MODEL = "demo"
IN_PROCESS = {"name", "revision", "dtype", "rope_scaling", "lora"}
IN_VLLM = IN_PROCESS | {"engine", "quantization", "kv_cache_dtype", "engine_args"}
AT_SERVER = {"engine", "name", "server", "structure", "image_format", "extra_body"}
"""What decides a model's answer in this process, in vLLM's and at a server: not how many GPUs or requests share the work, nor a
server's address, behind which the same model answers the same."""
DECIDES = {"openai": AT_SERVER, "vllm": IN_VLLM}


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

        Raises JobError.
        """
        path = Path(file).absolute()
        written, places = read_yaml(path)
        for setting in settings:
            apply_setting(written, setting, places)
        try:
            sections = JobSections.model_validate(written)
        except ValidationError as error:
            raise JobError(explain_errors(error, JobSections, path, places)) from None
        folder = parse_location(str(output) if output else sections.output.path)
        if isinstance(folder, Path):
            folder = folder.absolute() if output else (path.parent / folder.expanduser()).resolve()
        job = cls(path, sections, schema.load_schema(path.parent / sections.extract.schema_file.expanduser()), folder)
        try:
            _ = job.system_message
        except JobError as error:
            raise JobError(f"{path}: {error}") from None
        return job

    @cached_property
    def system_message(self) -> str:
        """The system message that all requests share."""
        return prompt.build_system_message(self.schema, self.sections.extract.instructions)

    @property
    def sampling(self) -> Sampling:
        return Sampling(**self.sections.sampling.model_dump())

    @property
    def pages_per_request(self) -> int:
        return 1 if self.sections.extract.per == "page" else self.sections.pages.per_request

    @property
    def uses_demo(self) -> bool:
        return self.sections.model.name == DEMO_MODEL and self.sections.model.engine != "openai"

    def with_demo(self) -> Job:
        """Return the job with the demonstration model in place of its own."""
        return self.with_model(name=DEMO_MODEL, revision=__version__, lora=None, rope_scaling=None)

    def with_model(self, **found: Any) -> Job:
        """Return the job with other keys in its section `model`."""
        model = self.sections.model.model_copy(update=found)
        return Job(self.file, self.sections.model_copy(update={"model": model}), self.schema, self.output)

    def with_resolved_model(self, model: Mapping[str, Any]) -> Job:
        """Return the job with what an earlier run chose, as its `job.yaml` keeps it: the demonstration model, or what its server is."""
        mine = self.sections.model
        if mine.engine != "openai":
            if model["name"] == DEMO_MODEL:
                return self.with_demo()
            found = model["revision"] if is_store_url(mine.name) and model["name"] == mine.name and mine.revision is None else mine.revision
            return self.with_model(revision=found)
        return self.with_model(**{key: model.get(key, "auto") for key in ("name", "server", "structure") if getattr(mine, key) == "auto"})

    def resolve_local_path(self, name: str) -> Path:
        """Return the path of a name in the job: relative to the job file, `~` expanded."""
        return self.file.parent / os.path.expanduser(name)  # Path.expanduser raises for the home of an unknown user

    def is_local_path(self, name: str) -> bool:
        """Say whether a model's or adapter's name means a local folder, which need not exist, rather than a hub id."""
        return name.startswith((".", "/", "~")) or self.resolve_local_path(name).is_dir()

    @property
    def decisive_keys(self) -> dict[str, Any]:
        """Everything that decides an answer, and so belongs to a request's key."""
        sections = self.sections
        return {
            "extract": {
                "per": sections.extract.per,
                "re_asks": sections.extract.re_asks,
                "schema": json.loads(schema.dump_compact_schema(self.schema)),
            },
            "model": sections.model.model_dump(include=DECIDES.get(sections.model.engine, IN_PROCESS)),
            "pages": sections.pages.model_dump() | {"per_request": self.pages_per_request},
            "prompt": self.system_message,
            "sampling": asdict(self.sampling),
        }

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change whenever an answer could."""
        text = json.dumps(self.decisive_keys, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def dump_keys(self) -> dict[str, Any]:
        """Return every key with its value, as `check` prints and `job.yaml` keeps it."""
        return self.sections.model_dump(mode="json", by_alias=True)


def find_differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ."""
    found = []
    for key in sorted({*before, *now}):
        old, new, name = before.get(key), now.get(key), f"{prefix}{key}"
        if name != "extract.schema" and isinstance(old, Mapping) and isinstance(new, Mapping):
            found += find_differences(old, new, f"{name}.")
        elif old != new:
            found.append(name)
    return found
