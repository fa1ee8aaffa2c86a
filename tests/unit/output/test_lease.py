"""Two runs do not work on one output: the second is refused while the first lives, and takes over when it is dead."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline import cli, flow
from pipeline.errors import JobError, RunError
from pipeline.flow import ask_pass
from pipeline.job import Job
from pipeline.output import lease
from pipeline.output.lease import NAME, Lease, LeaseHolder
from pipeline.storage import location, store
from pipeline.storage.store import Store
from tests.support import s3
from tests.support.ray_actors import InkActor
from tests.support.workspace import Workspace, draw_slip

HELD = """
import sys, time
from pathlib import Path
from pipeline.output import lease
from pipeline.storage import store
with lease.Lease(store.open_store(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return store.open_store(tmp_path)


def left(folder: Store, **given: object) -> None:
    """Leave a lease behind: that of a run elsewhere, unless told otherwise."""
    holder = replace(LeaseHolder.here(60.0), holder="other", host="worker-3", boot="another machine")
    folder.put(NAME, replace(holder, **given).text())  # type: ignore[arg-type]


def test_a_lease_is_there_while_it_is_held(folder: Store, tmp_path: Path) -> None:
    with Lease(folder):
        assert json.loads((tmp_path / NAME).read_text())["life_s"] == lease.LIFE_S
    assert not (tmp_path / NAME).exists()


def test_a_second_run_is_refused_and_told_by_whom(folder: Store) -> None:
    left(folder, pid=4711, renewed_at=time.time() - 10)
    with pytest.raises(JobError, match=r"another run works on .*: process 4711 on worker-3, which said so 10 s ago; wait .* for 60 s$"):
        Lease(folder)


def test_a_lease_that_was_not_renewed_is_taken_over(folder: Store, tmp_path: Path) -> None:
    left(folder, renewed_at=time.time() - 61)
    with Lease(folder) as mine:
        assert json.loads((tmp_path / NAME).read_text())["holder"] == mine.mine.holder


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found by /proc")
def test_a_killed_process_of_this_machine_is_not_waited_for(folder: Store, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HELD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(JobError, match=f"process {first.pid} on"):
            Lease(folder)
        first.kill()
        first.wait()
        with Lease(folder):
            pass


def test_a_process_id_that_is_used_again_is_another_process(folder: Store) -> None:
    left(folder, boot=lease.read_boot_id(), started="1")
    if not lease.read_boot_id():
        pytest.skip("processes are found by /proc")
    with Lease(folder):
        pass


@pytest.mark.parametrize("text", [b"", b"shopping list", b'{"holder": 1}', b"[]"])
def test_a_lease_that_says_nothing_holds_nothing(folder: Store, text: bytes) -> None:
    folder.put(NAME, text)
    with Lease(folder) as mine:
        mine.check()


def test_a_lease_is_renewed(folder: Store, tmp_path: Path) -> None:
    with Lease(folder, life_s=0.6) as mine:
        time.sleep(1.0)
        assert json.loads((tmp_path / NAME).read_text())["renewed_at"] > mine.mine.renewed_at


def test_a_run_that_was_held_up_learns_that_another_took_over(folder: Store, tmp_path: Path) -> None:
    with Lease(folder, life_s=0.3) as mine:
        left(folder)
        mine.thread.join(10)
        with pytest.raises(RunError, match=r"another run \(process \d+ on worker-3\) has taken over .*, because this one was silent"):
            mine.check()
    assert json.loads((tmp_path / NAME).read_text())["holder"] == "other"


# --- whole runs


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
    report = flow.run(Job.load(workspace.file, output=output), on_progress=lambda _: refused.append(run(workspace, output)))
    assert (report.statuses, report.exit_code) == ({"extracted": 1}, 0)
    assert refused[0].exit_code == 2
    first = f"process {os.getpid()} on {socket.gethostname()}"
    assert refused[0].stderr.startswith(f"error: another run works on {output}: {first}, which said so")


def test_a_run_takes_over_from_one_that_is_silent(workspace: Workspace, output: str) -> None:
    there = store.open_store(location.parse_location(output))
    there.create()
    left(there, pid=4711)
    refused = run(workspace, output)
    assert (refused.exit_code, there.list_names("job.yaml")) == (2, {})
    assert "process 4711 on worker-3" in refused.stderr
    left(there, pid=4711, renewed_at=time.time() - 61)
    assert run(workspace, output).exit_code == 0
    assert NAME not in there.list_names(".json")
