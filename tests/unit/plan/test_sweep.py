"""Sweep: values become runs beside the output, and what cannot be swept is said before anything runs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import JobError
from pipeline.flow.preparation import describe_run
from pipeline.output import Output
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.shards import write_shard
from pipeline.plan.sweep import parse_sweep, plan_sweep, sum_costs
from tests.support.workspace import Workspace


@pytest.fixture
def place(workspace: Workspace) -> str:
    """Return the output of a run that was started with a changed key."""
    job = workspace.job("sampling.max_tokens=32")
    output = Output(job.output)
    output.create()
    output.write_job(describe_run(job))
    return str(job.output)


def test_each_combination_is_a_run_beside_the_output(place: str) -> None:
    steps = plan_sweep(place, ["pages.max_pixels=501760,1003520", "pages.per_request=2"])
    assert [step.settings for step in steps] == [{"pages.max_pixels": n, "pages.per_request": 2} for n in (501760, 1003520)]
    assert [str(step.job.output) for step in steps] == [
        f"{place}-sweep/pages.max_pixels={n},pages.per_request=2" for n in (501760, 1003520)
    ]
    assert {(step.job.sections.pages.per_request, step.job.sections.sampling.max_tokens) for step in steps} == {(2, 32)}


def test_a_run_of_a_sweep_reads_what_the_output_was_made_of(place: str, workspace: Workspace) -> None:
    (step,) = plan_sweep(place, ["pages.dpi=100"])
    assert (step.job.file, step.job.sections.source.paths) == (workspace.file, ("in",))
    assert step.job.schema == workspace.job().schema


@pytest.mark.parametrize("text", ["pages.dpi", "=1", "pages.dpi=", "pages.dpi=[1"])
def test_what_has_no_values_is_refused(text: str) -> None:
    with pytest.raises(JobError, match="expected key=value,value"):
        parse_sweep(text)


def test_values_are_those_of_yaml() -> None:
    assert parse_sweep("ray.actors=1,[1, 2]") == ("ray.actors", [1, [1, 2]])
    assert parse_sweep("extract.instructions=short,'a, b'") == ("extract.instructions", ["short", "a, b"])


def test_what_decides_what_is_scored_cannot_be_swept() -> None:
    with pytest.raises(JobError, match=r"extract.schema decides what is scored"):
        parse_sweep("extract.schema=a.json")


def test_a_key_is_swept_once(place: str) -> None:
    with pytest.raises(JobError, match=r"--sweep has pages.dpi twice"):
        plan_sweep(place, ["pages.dpi=100", "pages.dpi=200"])


def test_an_unknown_key_is_named(place: str) -> None:
    with pytest.raises(JobError, match=r"pages.dip"):
        plan_sweep(place, ["pages.dip=100"])


def test_an_output_without_its_job_file_is_refused(place: str, workspace: Workspace) -> None:
    workspace.file.unlink()
    with pytest.raises(JobError, match=r"names the job file .*job.yaml, which is not there"):
        plan_sweep(place, ["pages.dpi=100"])
    output = Output(Path(place))
    before: Any = output.read_job()
    output.write_job({key: value for key, value in before.items() if key != "file"})
    with pytest.raises(JobError, match="does not say which job file it was made of"):
        plan_sweep(place, ["pages.dpi=100"])
    with pytest.raises(JobError, match="is not an output folder"):
        plan_sweep(str(workspace.inputs), ["pages.dpi=100"])


def test_costs_are_summed_over_the_ledger(place: str) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    page = {"page_no": 1, "visual_tokens": 256}
    rows = [
        {
            "key": f"{n}",
            "pages": [page],
            "prompt_tokens": 300,
            "completion_tokens": 20,
            "started_at": start.replace(second=n),
            "elapsed_s": 2.0,
        }
        for n in range(3)
    ]
    output = Output(Path(place))
    write_shard(output.requests, pa.Table.from_pylist([*rows, {"key": "failed"}], LEDGER_SCHEMA), ["k"])
    assert json.loads(json.dumps(sum_costs(output))) == {
        "pages": 3, "visual_tokens": 768, "prompt_tokens": 900, "completion_tokens": 60, "asking_s": 4.0
    }  # fmt: skip
