"""`pipeline run` as a process of its own with the demonstration model, which is killed, terminated or loses parts of it.

`benchmarks/reliability.py` does the same fifty times, at random instants, and more.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline import flow
from pipeline.demo import evaluate
from pipeline.demo.documents import Form
from pipeline.flow import ask_pass
from pipeline.job import Job
from pipeline.report import Phase
from tests.support.pdfs import make_endless_pdf
from tests.support.ray_actors import InkActor
from tests.support.workspace import Workspace, draw_slip

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300
"""For what takes seconds on an idle machine."""
POLL_S = 0.1
PAGES = 24
"""Many more than are answered between a shard and the signal that follows it, also on a fast machine."""
PHASE = re.compile(rf"^({'|'.join(Phase)}) +\d.*\n", re.MULTILINE)
"""The line of a phase, which a run prints when the phase ends, and every 30 s."""
ONE_BY_ONE = ("model.batch_size=1", "limits.canary=0")
"""Requests come back one by one, and no other request of a batch changes the last bit of a number."""


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    session: int
    title: str


@dataclass(frozen=True)
class EndedRun:
    """What a run wrote, the keys in the ledger at its end, and the processes that it left behind."""

    code: int
    out: str
    err: str
    answered: list[str]
    survivors: list[Process]
    was_running: bool
    """It had not ended before the signal."""


def start_run(workspace: Workspace, *arguments: str) -> subprocess.Popen[str]:
    """Start a run in a session of its own, so that all its processes can be found."""
    settings = [word for setting in ONE_BY_ONE for word in ("--set", setting)]
    command = [sys.executable, "-m", "pipeline.cli", "run", str(workspace.file), *settings, *arguments]
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, env=own, stdout=pipe, stderr=pipe)


def interrupt_run(run: subprocess.Popen[str], workspace: Workspace, number: signal.Signals, title: str = "pipeline.cli") -> EndedRun:
    """Send a signal to the processes of a run that have this title, as soon as the run has written a shard, and wait for its end."""
    before = list_shards(workspace)
    wait_for(lambda: run.poll() is not None or list_shards(workspace) != before)
    found = [process for process in list_processes() if process.session == run.pid and title in process.title]
    for process in found:
        with suppress(ProcessLookupError):  # it ended with its parent, which was the one before it
            os.kill(process.pid, number)
    out, err = run.communicate(timeout=PATIENCE_S)
    wait_for(lambda: not list_survivors(run.pid))
    return EndedRun(run.returncode, out, err, read_keys(workspace), list_survivors(run.pid), bool(found))


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until this is so, or for `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_S)


def list_processes() -> list[Process]:
    """Return the processes of this machine."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if state != "Z":
            found.append(Process(int(folder.name), int(parent), int(session), title))
    return found


def list_survivors(session: int) -> list[Process]:
    return [process for process in list_processes() if process.session == session]


def list_shards(workspace: Workspace) -> set[Path]:
    """Return the shards of the ledger."""
    return set((workspace.folder / "out" / "requests").glob("*.parquet"))


def read_keys(workspace: Workspace) -> list[str]:
    """Return the keys in the ledger."""
    return [key for shard in list_shards(workspace) for key in pq.read_table(shard, columns=["key"])["key"].to_pylist()]


def read_records(workspace: Workspace) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (workspace.folder / "out" / "records").iterdir()}


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Workspace]:
    """Two workspaces with the same pages: the runs of the first are disturbed."""
    made = Workspace(tmp_path_factory.mktemp("disturbed")), Workspace(tmp_path_factory.mktemp("undisturbed"))
    for one in made:
        for page in range(PAGES):
            one.put(f"{page}.pdf", draw_slip(page))
    return made


@pytest.fixture(scope="module")
def endings(workspaces: tuple[Workspace, Workspace]) -> list[EndedRun]:
    """Three runs over one folder, once for all tests: killed; terminated; to its end, although its engine is killed.

    The first answer is written as soon as it is there, so each run has few answers when it is interrupted.
    """
    if not Path("/proc/self/stat").exists():
        pytest.skip("processes are found by /proc")
    workspace, _ = workspaces
    killed = interrupt_run(start_run(workspace), workspace, signal.SIGKILL)
    terminated = interrupt_run(start_run(workspace), workspace, signal.SIGTERM)
    return [killed, terminated, interrupt_run(start_run(workspace, "--json"), workspace, signal.SIGKILL, "EngineActor")]


def test_a_killed_run_keeps_what_was_answered(endings: list[EndedRun]) -> None:
    assert endings[0].code == -signal.SIGKILL
    assert 0 < len(endings[0].answered) < PAGES


def test_a_terminated_run_says_how_to_go_on(endings: list[EndedRun]) -> None:
    assert (endings[1].code, endings[1].out) == (143, "")
    assert PHASE.sub("", endings[1].err).splitlines() == [
        "stopping: the answers so far are being written",
        "stopped; the answers so far are kept: run the same command again to go on",
    ]
    assert len(endings[0].answered) < len(endings[1].answered) < PAGES


def test_an_engine_that_is_killed_is_replaced(endings: list[EndedRun]) -> None:
    assert (endings[2].was_running, endings[2].code) == (True, 0)


def test_no_process_is_left_behind(endings: list[EndedRun]) -> None:
    assert [ended.survivors for ended in endings] == [[], [], []]


def test_a_run_that_goes_on_asks_only_what_is_left(endings: list[EndedRun]) -> None:
    report = json.loads(endings[2].out)
    assert report["requests_asked"] == PAGES - len(endings[1].answered)
    assert (report["documents"], report["statuses"]) == (PAGES, {"extracted": PAGES})


def test_nothing_is_asked_twice(endings: list[EndedRun]) -> None:
    assert len(endings[2].answered) == len(set(endings[2].answered)) == PAGES


def test_a_run_says_nothing_but_what_it_was_asked_for(endings: list[EndedRun]) -> None:
    assert endings[2].err == ""


def test_nothing_half_written_stays(endings: list[EndedRun], workspaces: tuple[Workspace, Workspace]) -> None:
    assert not [file for file in (workspaces[0].folder / "out").rglob("*") if file.name.endswith(".tmp")]


@pytest.mark.usefixtures("ray_session", "endings")
def test_the_records_are_those_of_an_undisturbed_run(workspaces: tuple[Workspace, Workspace]) -> None:
    disturbed, undisturbed = workspaces
    flow.run(undisturbed.job(*ONE_BY_ONE))
    assert read_records(disturbed) == read_records(undisturbed)


def kill_renderers(times: int, ended: threading.Event) -> None:
    """Kill this many renderers of this process's runs, one after another, each as soon as it has confined itself to its work."""
    killed: set[int] = set()
    while len(killed) < times and not ended.wait(POLL_S):
        running = list_processes()
        parents = {process.pid: process.parent for process in running}
        renderers = {
            process.pid for process in running if "pipeline.render.worker" in process.title and is_descendant(process.pid, parents)
        }
        for pid in renderers - killed:
            if is_confined(pid):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)


def is_descendant(pid: int, parents: dict[int, int]) -> bool:
    """Say whether a process was started by this one or by one of its descendants."""
    while pid not in (0, os.getpid()):
        pid = parents.get(pid, 0)
    return pid == os.getpid()


def is_confined(pid: int) -> bool:
    """Say whether a process has limited its address space, the last thing that a renderer does before it is given a document."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return re.search(r"^Max address space +\d", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE) is not None
    return False


@pytest.mark.usefixtures("ray_session")
def test_a_page_whose_renderers_are_killed_fails_alone(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask_pass, "EngineActor", InkActor)  # no model: this is about rendering
    workspace.put("0.pdf", make_endless_pdf())  # the first one; its rendering lasts until its renderer is killed
    for page in range(1, 6):
        workspace.put(f"{page}.pdf", draw_slip(page))
    ended = threading.Event()
    killer = threading.Thread(target=kill_renderers, args=(2, ended))  # a document whose renderer dies is tried a second time
    killer.start()
    try:
        report = flow.run(workspace.job())
    finally:
        ended.set()
        killer.join()
    assert (report.statuses, report.failures) == ({"extracted": 5, "failed": 1}, {"render/memory": 1})


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("form", ["invoice", "receipt"])
def test_the_samples_are_read_as_they_are_printed(tmp_path: Path, form: Form) -> None:
    job = Job.load(ROOT / "jobs" / f"{form}s.yaml", ["model.name=demo"], tmp_path / "out")
    flow.run(job)
    found = {Path(row["_source"]).name: row for row in pq.read_table(tmp_path / "out" / "records").to_pylist()}
    truths = [json.loads(line) for line in (ROOT / "jobs" / "samples" / "truth" / f"{form}s.jsonl").read_text().splitlines()]
    assert {truth["source"] for truth in truths} == found.keys()
    leaves = [
        leaf
        for truth in truths
        for leaf in evaluate.compare_values(form, {k: v for k, v in truth.items() if k != "source"}, found[truth["source"]])
    ]
    assert sum(leaf.is_right for leaf in leaves) >= 0.95 * len(leaves)
