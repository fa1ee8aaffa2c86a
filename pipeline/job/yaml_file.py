"""YAML reader that remembers where each key was written, for error messages.

In: a YAML file, `--set` options, and later pydantic's ValidationError. Out: a plain mapping with the position of every key, and
one sentence that names the position of what is wrong. The keys themselves are declared in `sections.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import JobError
from pipeline.storage.location import hide_query, redact_url
from pipeline.wording import suggest_word

KeyPositions = dict[tuple[str | int, ...], str]
"""Where each key was set: `jobs/invoices.yaml:12`, or the `--set` option that changed it."""


def read_yaml(path: Path) -> tuple[dict[str, Any], KeyPositions]:
    """Return a YAML file's mapping and the position of each key.

    Stricter than YAML: duplicate keys are refused, and so are aliases, which can expand a small file to gigabytes. Raises JobError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"cannot read the job file {path}: {describe_read_error(error)}", path) from None
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise JobError(f"{path}:{line}: YAML aliases (*{event.anchor}) are not allowed; write the value out", path)
        node = yaml.compose(text, yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise JobError(f"{path} is not valid YAML: {' '.join(str(error).split())}", path) from None
    if not isinstance(node, yaml.MappingNode):
        raise JobError(f"{path}: a job file is a mapping of keys (name, source, extract, model, output, …)", path)
    positions: KeyPositions = {}
    record_positions(node, (), positions, path)
    return data, positions


def describe_read_error(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def record_positions(node: yaml.Node, prefix: tuple[str | int, ...], positions: KeyPositions, path: Path) -> None:
    """Add the position of each key below a node to `positions`. Raises JobError for a duplicate key."""
    if isinstance(node, yaml.MappingNode):
        for written, value in node.value:
            name, position = (*prefix, str(written.value)), f"{path}:{written.start_mark.line + 1}"
            if name in positions:
                key = ".".join(map(str, name))
                raise JobError(f"{position}: the key {key} is given twice", path, key)
            positions[name] = position
            record_positions(value, name, positions, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            record_positions(value, (*prefix, index), positions, path)


def apply_setting(data: dict[str, Any], setting: str, positions: KeyPositions) -> None:
    """Apply one `section.key=value` option, its value parsed as YAML, to `data`, and record it as the key's position."""
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise JobError(f"--set {setting!r}: expected key=value, for example --set sampling.max_tokens=512", key="--set")
    *sections, last = path = tuple(key.strip().split("."))
    section = data
    for name in sections:
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise JobError(f"--set {setting!r}: {name} is a value, not a section", key=key.strip())
    try:
        section[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise JobError(f"--set {setting!r}: the value is not valid YAML", key=key.strip()) from None
    for overridden in [name for name in positions if name[: len(path)] == path]:
        del positions[overridden]
    positions[path] = f"--set {hide_query(redact_url(setting))}"


def parse_values(text: str) -> list[Any] | None:
    """Return the values in a text such as `200,300`, each parsed as YAML; None where it is none."""
    try:
        found = yaml.safe_load(f"[{text}]")
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and found else None


def build_job_error(error: ValidationError, model: type[BaseModel], path: Path, positions: KeyPositions) -> JobError:
    """Return a JobError about the first error: one sentence with its position and the number of further errors."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")  # a misspelt key is also a missing one
    first = problems[0]
    name = first["loc"]
    where = next((positions[name[:n]] for n in range(len(name), 0, -1) if name[:n] in positions), path)
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    return JobError(f"{where}: {describe_problem(first, model)}{more}", path, ".".join(map(str, name)) or None)


def describe_problem(problem: Any, model: type[BaseModel]) -> str:
    """Return a sentence for one of pydantic's errors."""
    name = problem["loc"]
    key = ".".join(map(str, name))
    if problem["type"] == "extra_forbidden":
        known = list_allowed_keys(model, name[:-1])
        return f"unknown key {key}" + (suggest_word(str(name[-1]), known) or f"; known here: {', '.join(known)}")
    if problem["type"] == "missing":
        return f"the key {key} is missing"
    if problem["type"] == "model_type":
        allowed = ", ".join(list_allowed_keys(model, name))
        return f"{key} is a section with keys of its own ({allowed}), found {str(problem['input'])[:80]!r}"
    found = "" if isinstance(problem["input"], dict) else f", found {hide_query(redact_url(str(problem['input'])))[:80]!r}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{key or 'the job'}: {message}{found}"


def list_allowed_keys(model: type[BaseModel], name: tuple[str | int, ...]) -> list[str]:
    """Return the keys that the section of this name may have."""
    section: Any = model
    for part in name:
        section = section.model_fields[str(part)].annotation
    return [field.alias or key for key, field in section.model_fields.items()]
