"""Runs and the lease of their output folder: a second run is refused while the first one works, and takes over when it is silent."""

from __future__ import annotations

import os
import socket
import time

import pytest
from click.testing import CliRunner, Result

from pipeline import cli, flow
from pipeline.flow import ask_pass
from pipeline.job import Job
from pipeline.output.lease import NAME
from pipeline.report import Progress
from pipeline.storage import location, store
from tests.support import s3
from tests.support.leases import leave_lease
from tests.support.ray_actors import InkActor
from tests.support.workspace import Workspace, draw_slip


@pytest.fixture(params=["here", "in a store"])
def output(request: pytest.FixtureRequest, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return where a run writes: into a folder or to S3."""
    request.getfixturevalue("ray_session")
    monkeypatch.setattr(ask_pass, "EngineActor", InkActor)
    workspace.put("a.pdf", draw_slip(1))
    bucket: s3.Bucket | None = request.getfixturevalue("bucket") if request.param == "in a store" else None
    return bucket.url(workspace.folder.name) if bucket else str(workspace.folder / "out")


def run(workspace: Workspace, output: str) -> Result:
    return CliRunner().invoke(cli.main, ["run", str(workspace.file), "--output", output], catch_exceptions=False)


def test_a_run_is_refused_while_another_goes_on(workspace: Workspace, output: str) -> None:
    refused: list[Result] = []

    def start_another(now: Progress) -> None:
        if now.requests_done and not refused:
            refused.append(run(workspace, output))

    report = flow.run(Job.load(workspace.file, output=output), on_progress=start_another)
    assert (report.statuses, report.exit_code) == ({"extracted": 1}, 0)
    assert refused[0].exit_code == 2
    first = f"process {os.getpid()} on {socket.gethostname()}"
    assert refused[0].stderr.splitlines()[-1].startswith(f"error: another run works on {output}: {first}, which said so")


def test_a_run_takes_over_from_one_that_is_silent(workspace: Workspace, output: str) -> None:
    there = store.open_store(location.parse_location(output))
    there.create()
    leave_lease(there, pid=4711)
    refused = run(workspace, output)
    assert (refused.exit_code, there.list_names("job.yaml")) == (2, {})
    assert "process 4711 on worker-3" in refused.stderr
    leave_lease(there, pid=4711, renewed_at=time.time() - 61)
    assert run(workspace, output).exit_code == 0
    assert NAME not in there.list_names(".json")
