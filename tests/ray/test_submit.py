"""A job goes to a cluster through its job server, is followed to its exit code, stopped and resumed; and a cluster is joined.

The cluster is a real one, of this machine alone; its start takes most of the time, so that all tests share it and one story.
"""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.support.held_server import HeldAnswer, serve_held
from tests.support.ray_head import RayHead, start_head
from tests.support.workspace import Workspace, draw_slip

PAGES = 6
PATIENCE_S = 300
SHARED = "--shared-filesystem"

# --- a real cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHead]:
    with start_head() as started:
        yield started


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = Workspace(tmp_path_factory.mktemp("workspace"))
    for page in range(PAGES):
        made.put(f"{page}.pdf", draw_slip(page))
    return made


def answered(workspace: Workspace) -> list[str]:
    """Return the keys in the ledger."""
    shards = (workspace.folder / "out" / "requests").glob("*.parquet")
    return [key for shard in shards for key in pq.read_table(shard, columns=["key"])["key"].to_pylist()]


def patiently(done: Any) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not done() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert done()


class Last(HeldAnswer):
    """Has the last page, so that a run cannot be over before it shall be."""

    asked, due = threading.Event(), threading.Event()
    content = draw_slip(PAGES)


@pytest.fixture(scope="module")
def story(cluster: RayHead, workspace: Workspace) -> Iterator[SimpleNamespace]:
    """Submit; let go of it; stop it when it has answered something; follow what is left; submit again, to the end; and once more."""
    told = SimpleNamespace()
    with serve_held(Last) as address:
        paths = f"source.paths=[in, '{address}/last.pdf']"
        settings = (paths, "source.allow_private=true", "limits.download_s=1000", "model.batch_size=1")
        submission = ["submit", workspace.file, "--address", cluster.jobs, SHARED, *(word for one in settings for word in ("--set", one))]
        submitted = cluster.start(*submission, "--follow")
        assert submitted.stdout is not None
        told.run = submitted.stdout.readline().strip()
        patiently(lambda: answered(workspace) and Last.asked.is_set())
        submitted.send_signal(signal.SIGINT)
        told.left = submitted.communicate()[1], submitted.returncode
        told.stopped = cluster.pipeline("submit", "--stop", told.run, "--address", cluster.jobs)
        told.answered = answered(workspace)
        told.attached = cluster.pipeline("submit", "--attach", told.run, "--address", cluster.jobs, "--json")
        Last.due.set()
        told.resumed = cluster.pipeline(*submission, "--follow", "--json", "--log", workspace.folder / "events.jsonl")
        told.all = answered(workspace)
        workspace.put("empty.pdf", b"")
        told.worse = cluster.pipeline(*submission, "--follow")
        yield told


def test_a_submission_has_an_id(story: SimpleNamespace) -> None:
    assert re.fullmatch(r"raysubmit_\w+", story.run)


def test_who_follows_may_let_go(story: SimpleNamespace, cluster: RayHead) -> None:
    said, code = story.left
    assert code == 130
    assert f"the run goes on: `pipeline submit --address {cluster.jobs} --attach {story.run}` follows it again" in said


def test_a_run_that_is_stopped_keeps_what_it_has(story: SimpleNamespace) -> None:
    assert (story.stopped.returncode, story.stopped.stdout) == (0, "")
    assert story.stopped.stderr.startswith(f"{story.run} has ended: STOPPED; the answers received so far are kept")
    assert 0 < len(story.answered) <= PAGES


def test_a_run_that_is_stopped_ends_by_itself_and_says_so(story: SimpleNamespace) -> None:
    assert "\nstopped; the answers received so far are kept: run the same command again to go on\n" in story.attached.stderr
    assert json.loads(story.attached.stdout) == {"submission_id": story.run, "exit_code": 143}
    assert story.attached.returncode == 143


def test_a_run_that_is_submitted_again_goes_on_to_its_end(story: SimpleNamespace) -> None:
    assert (story.resumed.returncode, json.loads(story.resumed.stdout)["exit_code"]) == (0, 0)
    assert re.search(rf"requests asked +│ {PAGES + 1 - len(story.answered)} ", story.resumed.stderr)
    assert len(story.all) == len(set(story.all)) == PAGES + 1


def test_the_words_of_a_run_arrive(story: SimpleNamespace) -> None:
    assert re.search(rf"slips: {PAGES + 1} documents, {PAGES + 1} records", story.resumed.stderr)
    assert "packaging.py" not in story.resumed.stderr


def test_the_events_of_a_run_arrive(story: SimpleNamespace, workspace: Workspace) -> None:
    found = [json.loads(line) for line in (workspace.folder / "events.jsonl").read_text().splitlines()]
    assert {line["key"] for line in found if line["event"] == "request"} == set(story.all) - set(story.answered)
    assert (found[0]["event"], found[-1]["event"]) == ("run_started", "run_ended")
    assert '"event"' not in story.resumed.stderr


def test_failed_documents_are_exit_code_1(story: SimpleNamespace) -> None:
    assert story.worse.returncode == 1
    assert re.search(r"render/empty +│ 1 ", story.worse.stderr)


def test_a_wrong_job_is_exit_code_2(cluster: RayHead, workspace: Workspace) -> None:
    wrong = ("--set", "source.paths=[gone]")
    ended = cluster.pipeline("submit", workspace.file, "--address", cluster.jobs, SHARED, "--follow", *wrong)
    assert ended.returncode == 2
    assert f"error: source '{workspace.folder}/gone' does not exist" in ended.stderr


def test_a_local_path_is_not_sent(cluster: RayHead, workspace: Workspace) -> None:
    ended = cluster.pipeline("submit", workspace.file, "--address", cluster.jobs)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "source.paths is 'in', a path on this machine that the cluster does not see" in ended.stderr


def test_secrets_are_not_sent_and_that_is_said(cluster: RayHead, workspace: Workspace) -> None:
    secret = ("--set", "source.password_env=PDF_PASSWORD", "--set", "source.paths=[gone]")
    ended = cluster.pipeline("submit", workspace.file, "--address", cluster.jobs, SHARED, "--follow", *secret, PDF_PASSWORD="hunter2")
    assert "not sent: PDF_PASSWORD; the cluster's own environment" in ended.stderr
    assert "hunter2" not in ended.stderr + ended.stdout


def test_a_run_that_was_never_submitted_is_not_found(cluster: RayHead) -> None:
    for option in ("--attach", "--stop"):
        ended = cluster.pipeline("submit", option, "raysubmit_nobody", "--address", cluster.jobs)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert "raysubmit_nobody does not exist" in ended.stderr


def test_without_the_token_nothing_is_done(cluster: RayHead) -> None:
    ended = cluster.pipeline("submit", "--stop", "any", "--address", cluster.jobs, RAY_AUTH_MODE="disabled")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {cluster.jobs} wants the cluster's token: set RAY_AUTH_MODE=token")


@pytest.mark.usefixtures("story")
def test_a_cluster_is_joined_from_its_own_machines(cluster: RayHead, workspace: Workspace) -> None:
    ended = cluster.pipeline("settle", workspace.file, "--json", RAY_ADDRESS=cluster.address)
    assert (ended.returncode, json.loads(ended.stdout)["records"]) == (1, PAGES + 2)


def test_a_cluster_is_not_joined_by_ray_client(cluster: RayHead, workspace: Workspace) -> None:
    ended = cluster.pipeline("settle", workspace.file, "--address", "ray://127.0.0.1:10001", SHARED, "--json")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert (
        "ray.address: a cluster cannot be joined by ray://; `pipeline submit --address http://HEAD:8265` starts a run on it" in ended.stderr
    )
