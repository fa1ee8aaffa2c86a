"""Stages as a run makes them, for tests that have no run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.budget import RenderSettings
from pipeline.job import Job
from pipeline.records import SourceRow
from pipeline.sources.http import PUBLIC_ONLY
from pipeline.stages.render import RenderPlan
from pipeline.stages.settle import RecordPlan, SettleStage

Row = dict[str, Any]
"""A row that a test writes by hand, with as many fields as it needs."""


def make_settle_stage(job: Job, extras: pa.Schema) -> SettleStage:
    """Return the stage that settles a job's documents, with these columns of a manifest."""
    return SettleStage(RecordPlan(job).with_extras(extras), job.pages_per_request, job.fingerprint)


def make_render_plan(settings: RenderSettings, root: Path, per_request: int) -> RenderPlan:
    return RenderPlan(settings, PUBLIC_ONLY, root, per_request, "f" * 16, "slips")


def claim_all(document: SourceRow, keys: list[str]) -> dict[str, int]:
    """Claim every request of a document."""
    return dict.fromkeys(keys, 1)
