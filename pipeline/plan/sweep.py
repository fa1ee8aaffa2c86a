"""Sweep: an output and values of keys of its job in; a run for each of them, scored against a truth, out.

    pages.max_pixels=501760,1003520   ->   out/invoices-sweep/pages.max_pixels=501760   out/invoices-sweep/pages.max_pixels=1003520

Several keys give a run for each combination of their values. What was asked by an earlier sweep is not asked again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict

from pipeline.errors import JobError
from pipeline.job import Job
from pipeline.job.yaml_file import parse_values
from pipeline.output import Output
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.shards import read_shards
from pipeline.score.cells import Tolerance
from pipeline.score.evaluation import evaluate_output
from pipeline.score.statistics import Interval
from pipeline.storage.location import is_url, parse_location

OPTION = "--sweep"
FIXED = ("extract.schema", "extract.per", "output.path", "source.paths")
"""Keys that decide what is scored, and not how well."""
COST_COLUMNS = ["pages", "prompt_tokens", "completion_tokens", "started_at", "elapsed_s"]


@dataclass(frozen=True)
class SweepStep:
    """One combination of values: what is set, and the job that it gives."""

    settings: dict[str, Any]
    job: Job


class RunCosts(TypedDict):
    """What the answers in an output have cost."""

    pages: int
    visual_tokens: int
    prompt_tokens: int
    completion_tokens: int
    asking_s: float | None
    """From the start of the first request to the end of the last; None where none was asked."""


class SweepRow(RunCosts):
    """What `pipeline eval --sweep` prints of one run."""

    settings: dict[str, Any]
    output: str
    documents: int
    failed: int
    exact: Interval
    f1: Interval
    perfect: Interval
    auroc: float | None


def plan_sweep(place: str, sweeps: Sequence[str]) -> list[SweepStep]:
    """Return the jobs of a sweep over an output's job, each with an output of its own beside that. Raises JobError."""
    content = Output(parse_location(place)).read_job()
    if content is None:
        raise JobError(f"{place} is not an output folder: it has no job.yaml", place)
    file = Path(str(content.get("file") or ""))
    if not file.is_file():
        named = f"names the job file {file}, which is not there" if content.get("file") else "does not say which job file it was made of"
        raise JobError(f"{place}/job.yaml {named}: run the job again, here, and then sweep", place, OPTION)
    steps = []
    for settings in combine_values([parse_sweep(text) for text in sweeps]):
        given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        name = ",".join(f"{key}={name_value(value)}" for key, value in settings.items())
        beside = f"{place.rstrip('/')}-sweep/{name}"
        target = beside if is_url(place) else Path(beside).absolute()
        steps.append(SweepStep(settings, Job.build(file, json.loads(json.dumps(content["job"])), {}, given, target)))
    return steps


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """Return the key and the values of `key=value,value`, each value as YAML. Raises JobError."""
    key, equals, values = text.partition("=")
    key = key.strip()
    found = parse_values(values) if equals and key else None
    if not found:
        raise JobError(f"{OPTION} {text!r}: expected key=value,value, for example {OPTION} pages.max_pixels=501760,1003520", key=OPTION)
    if key in FIXED:
        raise JobError(
            f"{OPTION} {text!r}: {key} decides what is scored; the runs of a sweep have the same documents and schema", key=OPTION
        )
    return key, found


def combine_values(sweeps: Sequence[tuple[str, list[Any]]]) -> Iterator[dict[str, Any]]:
    """Yield each combination of values. Raises JobError for a key given twice."""
    keys = [key for key, _ in sweeps]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise JobError(f"{OPTION} has {twice[0]} twice: name all of its values at once", key=OPTION)
    for values in itertools.product(*(values for _, values in sweeps)):
        yield dict(zip(keys, values, strict=True))


def name_value(value: Any) -> str:
    """Return a value as a part of a folder's name."""
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(letter if letter.isalnum() or letter in ".-_" else "_" for letter in text)[:60]


def score_step(step: SweepStep, truth: Path, tolerance: Tolerance) -> SweepRow:
    """Return the scores and costs of a run that has ended. Raises JobError and RunError."""
    found = evaluate_output(str(step.job.output), truth, tolerance)["scores"]
    certainty = found["certainty"]
    return {
        "settings": step.settings,
        "output": str(step.job.output),
        "documents": found["documents"],
        "failed": found["failed"],
        "exact": found["total"]["exact"],
        "f1": found["total"]["f1"],
        "perfect": found["perfect"],
        "auroc": certainty["auroc"] if certainty else None,
        **sum_costs(Output(step.job.output)),
    }


def sum_costs(output: Output) -> RunCosts:
    """Return what the answers in an output have cost."""
    rows = read_shards(output.requests, COST_COLUMNS, LEDGER_SCHEMA).to_pylist()
    pages = [page for row in rows for page in row["pages"] or []]
    asked = [(row["started_at"], row["started_at"] + timedelta(seconds=row["elapsed_s"])) for row in rows if row["started_at"]]
    ends = max(end for _, end in asked) - min(start for start, _ in asked) if asked else None
    return {
        "pages": len(pages),
        "visual_tokens": sum(page["visual_tokens"] for page in pages),
        "prompt_tokens": sum(row["prompt_tokens"] or 0 for row in rows),
        "completion_tokens": sum(row["completion_tokens"] or 0 for row in rows),
        "asking_s": round(ends.total_seconds(), 1) if ends is not None else None,
    }
