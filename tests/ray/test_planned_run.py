"""The plan of the shipped jobs beside their finished runs, which the demonstration model answers."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from pipeline import flow
from pipeline.cli import main
from pipeline.job import Job

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.mark.parametrize("name", ["invoices", "receipts"])
def test_a_run_takes_what_was_planned(name: str, tmp_path: Path, ray_session: object) -> None:
    """Pages, visual tokens and requests exactly, output tokens within 20 %."""
    job = Job.load(JOBS / f"{name}.yaml", output=tmp_path)
    planned = CliRunner().invoke(main, ["plan", str(job.file), "--set", f"output.path={tmp_path}", "--json"], catch_exceptions=False)
    plan = json.loads(planned.stdout)
    report = flow.run(job)
    visual = sum(page["visual_tokens"] for row in pq.read_table(tmp_path / "requests")["pages"].to_pylist() for page in row)
    assert (plan["documents"], plan["pages"], plan["requests"]) == (report.documents, report.pages_asked, report.requests_asked)
    assert plan["visual_tokens"] == visual
    output = plan["output_tokens"]
    assert output["likely"] == pytest.approx(report.completion_tokens, rel=0.2)
    assert output["low"] < report.completion_tokens < output["high"]
