"""A YAML file and `--set` options -> a mapping, with the place of every key; and what is wrong with it, in one sentence.

Knows no key of a job: `keys` does.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import JobError
from pipeline.storage.location import redact_url

KeyPositions = dict[tuple[str | int, ...], str]
"""Where each key was given: `jobs/invoices.yaml:12`, or the --set that changed it."""


def read_yaml(path: Path) -> tuple[dict[str, Any], KeyPositions]:
    """Return a YAML file's mapping and the place of each key.

    Stricter than YAML: a key given twice is refused, and so are aliases, which can blow up a small file into gigabytes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"cannot read the job file {path}: {describe_yaml_error(error)}") from None
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise JobError(f"{path}:{line}: YAML aliases (*{event.anchor}) are not allowed; write the value out")
        node = yaml.compose(text, yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise JobError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.MappingNode):
        raise JobError(f"{path}: a job file is a mapping of keys (name, source, extract, model, output, …)")
    places: KeyPositions = {}
    record_positions(node, (), places, path)
    return data, places


def describe_yaml_error(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def record_positions(node: yaml.Node, at: tuple[str | int, ...], places: KeyPositions, path: Path) -> None:
    """Note the place of each key below a node; refuse one given twice."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name, place = (*at, str(key.value)), f"{path}:{key.start_mark.line + 1}"
            if name in places:
                raise JobError(f"{place}: the key {'.'.join(map(str, name))} is given twice")
            places[name] = place
            record_positions(value, name, places, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            record_positions(value, (*at, index), places, path)


def apply_setting(written: dict[str, Any], setting: str, places: KeyPositions) -> None:
    """Apply one `section.key=value`, the value read as YAML, and note that it came from there."""
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise JobError(f"--set {setting!r}: expected key=value, for example --set sampling.max_tokens=512")
    *sections, last = path = tuple(key.strip().split("."))
    section = written
    for name in sections:
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise JobError(f"--set {setting!r}: {name} is a value, not a section")
    try:
        section[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise JobError(f"--set {setting!r}: the value is not valid YAML") from None
    for place in [place for place in places if place[: len(path)] == path]:
        del places[place]
    places[path] = f"--set {redact_url(setting)}"


def explain_errors(error: ValidationError, model: type[BaseModel], path: Path, places: KeyPositions) -> str:
    """Return one sentence for the first thing that is wrong, and how many more there are."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")  # a misspelt key is missing, too
    first = problems[0]
    place = first["loc"]
    where = next((places[place[:n]] for n in range(len(place), 0, -1) if place[:n] in places), path)
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {describe_problem(first, model)}{more}"


def describe_problem(problem: Any, model: type[BaseModel]) -> str:
    """Say in words what pydantic found."""
    place = problem["loc"]
    key = ".".join(map(str, place))
    if problem["type"] == "extra_forbidden":
        known = list_allowed_keys(model, place[:-1])
        near = get_close_matches(str(place[-1]), known, 1, 0.5)
        return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}")
    if problem["type"] == "missing":
        return f"the key {key} is missing"
    if problem["type"] == "model_type":
        return (
            f"{key} is a section with keys of its own ({', '.join(list_allowed_keys(model, place))}), found {str(problem['input'])[:80]!r}"
        )
    found = "" if isinstance(problem["input"], dict) else f", found {redact_url(str(problem['input']))[:80]!r}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{key or 'the job'}: {message}{found}"


def list_allowed_keys(model: type[BaseModel], place: tuple[str | int, ...]) -> list[str]:
    """Return the keys that a section knows."""
    section: Any = model
    for name in place:
        section = section.model_fields[str(name)].annotation
    return [field.alias or name for name, field in section.model_fields.items()]
