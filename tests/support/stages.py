"""Stages as a run makes them, for tests that have no run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.budget import RenderSettings
from pipeline.job import Job
from pipeline.records import SourceRow
from pipeline.sources.http import PUBLIC_ONLY
from pipeline.stages.record_plan import RecordPlan
from pipeline.stages.render import RenderPlan, RenderStage
from pipeline.stages.settle import SettleStage

Row = dict[str, Any]
"""A row that a test writes by hand, with as many fields as it needs."""


def make_settle_stage(job: Job, extras: pa.Schema) -> SettleStage:
    """Return the stage that settles a job's documents, with these columns of a manifest."""
    return SettleStage(RecordPlan(job).with_extras(extras), job.pages_per_request, job.fingerprint)


def make_render_plan(settings: RenderSettings, root: Path, per_request: int) -> RenderPlan:
    return RenderPlan(settings, PUBLIC_ONLY, root, per_request, "f" * 16, "slips")


def grant(wanted: dict[str, int]) -> Future[dict[str, int]]:
    """Return a claim that has been answered."""
    claimed: Future[dict[str, int]] = Future()
    claimed.set_result(wanted)
    return claimed


def claim_all(document: SourceRow, keys: list[str]) -> Future[dict[str, int]]:
    """Claim every request of a document."""
    return grant(dict.fromkeys(keys, 1))


def render_rows(stage: RenderStage, documents: Iterable[SourceRow]) -> Iterator[Row]:
    """Yield the requests of documents as engines get them."""
    for row, claimed in stage.render_documents(documents):
        yield {**row, "attempt": claimed.result()[str(row["key"])]}
