"""`pipeline run` as a user has it: a process of its own, the demonstration model, and someone who kills it or parts of it.

`benchmarks/reliability.py` does the same fifty times, at random instants, and more.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline import flow
from pipeline.demo import evaluate
from pipeline.demo.documents import Form
from pipeline.job import Job
from pipeline.report import Phase
from tests.support.pdfs import make_endless_pdf
from tests.support.workspace import Workspace, draw_slip

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300
"""For what takes seconds on an idle machine."""
PAGES = 40
"""So many that those answered between a shard and the signal it calls for are few beside them, on a fast machine too."""
PHASE = re.compile(rf"^({'|'.join(Phase)}) +\d.*\n", re.MULTILINE)
"""The line of a phase, which a run prints when the phase ends, and every 30 s."""
ALONE = ("model.batch_size=1",)
"""One request at a time: they come back one by one, and what is beside them in a batch cannot touch the last bit of a number."""


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    session: int
    title: str


@dataclass(frozen=True)
class Ended:
    """What a run said at its end, what was in the ledger then, and which of its processes were left behind."""

    code: int
    out: str
    err: str
    answered: list[str]
    survivors: list[Process]
    struck: bool
    """It was still going when it was struck."""


def start(workspace: Workspace, *arguments: str) -> subprocess.Popen[str]:
    """Start a run in a session of its own, so that all its processes can be found."""
    settings = [word for setting in ALONE for word in ("--set", setting)]
    command = [sys.executable, "-m", "pipeline.cli", "run", str(workspace.file), *settings, *arguments]
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, env=own, stdout=pipe, stderr=pipe)


def strike(run: subprocess.Popen[str], workspace: Workspace, number: signal.Signals, title: str = "pipeline.cli") -> Ended:
    """Send a signal to the one process of a run that has this title, as soon as the run has written a shard; await the end."""
    before, struck = len(answered(workspace)), False
    for _ in patiently():
        if run.poll() is not None or len(answered(workspace)) > before:
            break
    for process in processes():
        if process.session == run.pid and title in process.title:
            os.kill(process.pid, number)  # to it alone: nobody tells the others
            struck = True
    out, err = run.communicate(timeout=PATIENCE_S)
    for _ in patiently():
        if not survivors(run.pid):
            break
    return Ended(run.returncode, out, err, answered(workspace), survivors(run.pid), struck)


def patiently() -> Iterator[None]:
    """Count out the time that one waits for another process."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        yield
        time.sleep(0.05)


def processes() -> list[Process]:
    """Return what runs on this machine."""
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


def survivors(session: int) -> list[Process]:
    return [process for process in processes() if process.session == session]


def answered(workspace: Workspace) -> list[str]:
    """Return the keys in the ledger."""
    shards = (workspace.folder / "out" / "requests").glob("*.parquet")
    return [key for shard in shards for key in pq.read_table(shard, columns=["key"])["key"].to_pylist()]


def records(workspace: Workspace) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (workspace.folder / "out" / "records").iterdir()}


@pytest.fixture(scope="module")
def desks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Workspace]:
    """Two desks with the same pages."""
    made = Workspace(tmp_path_factory.mktemp("disturbed")), Workspace(tmp_path_factory.mktemp("undisturbed"))
    for one in made:
        for page in range(PAGES):
            one.put(f"{page}.pdf", draw_slip(page))
    return made


@pytest.fixture(scope="module")
def endings(desks: tuple[Workspace, Workspace]) -> list[Ended]:
    """Run, killed; again, terminated; again, its engine killed, to the end. Each start takes seconds: once for all.

    The first answer is written as soon as it is there, so each is struck when it has answered few.
    """
    if not Path("/proc/self/stat").exists():
        pytest.skip("processes are found by /proc")
    workspace, _ = desks
    killed = strike(start(workspace), workspace, signal.SIGKILL)
    terminated = strike(start(workspace), workspace, signal.SIGTERM)
    return [killed, terminated, strike(start(workspace, "--json"), workspace, signal.SIGKILL, "EngineActor")]


def test_a_killed_run_keeps_what_was_answered(endings: list[Ended]) -> None:
    assert endings[0].code == -signal.SIGKILL
    assert 0 < len(endings[0].answered) < PAGES


def test_a_terminated_run_says_how_to_go_on(endings: list[Ended]) -> None:
    assert (endings[1].code, endings[1].out) == (143, "")
    assert PHASE.sub("", endings[1].err).splitlines() == [
        "stopping: the answers so far are being written",
        "stopped; the answers so far are kept: run the same command again to go on",
    ]
    assert len(endings[0].answered) < len(endings[1].answered) < PAGES


def test_an_engine_that_is_killed_is_replaced(endings: list[Ended]) -> None:
    assert (endings[2].struck, endings[2].code) == (True, 0)


def test_no_process_is_left_behind(endings: list[Ended]) -> None:
    assert [ended.survivors for ended in endings] == [[], [], []]


def test_a_run_that_goes_on_asks_only_what_is_left(endings: list[Ended]) -> None:
    report = json.loads(endings[2].out)
    assert report["requests_asked"] == PAGES - len(endings[1].answered)
    assert (report["documents"], report["statuses"]) == (PAGES, {"extracted": PAGES})


def test_nothing_is_asked_twice(endings: list[Ended]) -> None:
    assert len(endings[2].answered) == len(set(endings[2].answered)) == PAGES


def test_a_run_says_nothing_but_what_it_was_asked_for(endings: list[Ended]) -> None:
    assert endings[2].err == ""


def test_nothing_half_written_stays(endings: list[Ended], desks: tuple[Workspace, Workspace]) -> None:
    assert not [file for file in (desks[0].folder / "out").rglob("*") if file.name.endswith(".tmp")]


@pytest.mark.usefixtures("ray_session", "endings")
def test_the_records_are_those_of_an_undisturbed_run(desks: tuple[Workspace, Workspace]) -> None:
    disturbed, undisturbed = desks
    flow.run(undisturbed.job(*ALONE))
    assert records(disturbed) == records(undisturbed)


def kill_renderers(times: int, ended: threading.Event) -> None:
    """Kill the renderers of this process's runs, so many, one after another, as soon as each has confined itself to its work."""
    killed: set[int] = set()
    while len(killed) < times and not ended.wait(0.05):
        parents = {process.pid: process.parent for process in processes()}
        renderers = {process.pid for process in processes() if "pipeline.render.worker" in process.title and descends(process.pid, parents)}
        for pid in renderers - killed:
            if confined(pid):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)


def descends(pid: int, parents: dict[int, int]) -> bool:
    while pid not in (0, os.getpid()):
        pid = parents.get(pid, 0)
    return pid == os.getpid()


def confined(pid: int) -> bool:
    """Say whether a process has bounded its address space, the last thing a renderer does before it is given a document."""
    with suppress(ProcessLookupError):
        return resource.prlimit(pid, resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return False


@pytest.mark.usefixtures("ray_session")
def test_a_page_whose_renderers_are_killed_fails_alone(workspace: Workspace) -> None:
    workspace.put("0.pdf", make_endless_pdf())  # the first, and it ends no sooner than its renderers do
    for page in range(1, 6):
        workspace.put(f"{page}.pdf", draw_slip(page))
    ended = threading.Event()
    killer = threading.Thread(target=kill_renderers, args=(2, ended))  # a second try is given to whatever dies so
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
