"""Jobs submitted to a cluster's job server: followed to their exit code, stopped and resumed; and a cluster that a run joins.

The cluster is a real one of this machine. Its start and each run on it take seconds, so that the tests share one cluster and one story;
a stub of a Chat Completions server answers, because each run would import torch for the demonstration model.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from tests.support.chat_server import ChatServer, reply_text
from tests.support.engines import VALID
from tests.support.held_server import HeldAnswer, serve_held
from tests.support.ray_head import RayHead, start_head
from tests.support.workspace import JOB, Workspace, draw_slip

PAGES = 6
PATIENCE_S = 300
SHARED = "--shared-filesystem"


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHead]:
    with start_head() as started:
        yield started


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    made = Workspace(tmp_path_factory.mktemp("workspace"))
    for page in range(PAGES):
        made.put(f"{page}.pdf", draw_slip(page))
    with ChatServer(reply_text(VALID)) as server:
        model = f"{{engine: openai, base_url: '{server.base_url}', name: stub-1, server: other, structure: json_schema, logprobs: false}}"
        made.file.write_text(JOB.replace("{name: demo}", model))
        yield made


def answered(workspace: Workspace) -> list[str]:
    """Return the keys in the ledger."""
    shards = (workspace.folder / "out" / "requests").glob("*.parquet")
    return [key for shard in shards for key in pq.read_table(shard, columns=["key"])["key"].to_pylist()]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


class Last(HeldAnswer):
    """Serves the last page, so that a run does not end before it is released."""

    asked, due = threading.Event(), threading.Event()
    content = draw_slip(PAGES)


@pytest.fixture(scope="module")
def story(cluster: RayHead, workspace: Workspace) -> Iterator[SimpleNamespace]:
    """Submit; let go of it; stop it when it has answered something; follow what is left; submit again, to the end; and once more."""
    told = SimpleNamespace()
    with serve_held(Last) as address:
        paths = f"source.paths=[in, '{address}/last.pdf']"
        settings = (paths, "source.allow_private=true", "limits.download_s=1000")
        submission = ["submit", workspace.file, "--address", cluster.jobs, SHARED, *(word for one in settings for word in ("--set", one))]
        submitted = cluster.start(*submission, "--follow")
        assert submitted.stdout is not None
        told.run = submitted.stdout.readline().strip()
        wait_for(lambda: answered(workspace) and Last.asked.is_set())
        submitted.send_signal(signal.SIGINT)
        told.left = submitted.communicate()[1], submitted.returncode
        told.stopped = cluster.run("submit", "--stop", told.run, "--address", cluster.jobs)
        told.answered = answered(workspace)
        told.attached = cluster.run("submit", "--attach", told.run, "--address", cluster.jobs, "--json")
        Last.due.set()
        told.resumed = cluster.run(*submission, "--follow", "--json", "--log", workspace.folder / "events.jsonl")
        told.all = answered(workspace)
        workspace.put("empty.pdf", b"")
        told.worse = cluster.run(*submission, "--follow")
        yield told


def test_a_submission_has_an_id(story: SimpleNamespace) -> None:
    assert re.fullmatch(r"raysubmit_\w+", story.run)


def test_who_follows_may_let_go(story: SimpleNamespace, cluster: RayHead) -> None:
    said, code = story.left
    assert code == 130
    assert f"the run goes on: `pipeline submit --address {cluster.jobs} --attach {story.run}` follows it again" in said


def test_a_run_that_is_stopped_keeps_what_it_has(story: SimpleNamespace) -> None:
    assert (story.stopped.returncode, story.stopped.stdout) == (0, "")
    assert story.stopped.stderr.startswith(f"{story.run} has ended: STOPPED; the answers so far are kept")
    assert 0 < len(story.answered) <= PAGES


def test_a_run_that_is_stopped_ends_by_itself_and_says_so(story: SimpleNamespace) -> None:
    assert "\nstopped; the answers so far are kept: run the same command again to go on\n" in story.attached.stderr
    found = json.loads(story.attached.stdout)
    assert (found["submission_id"], found["exit_code"], found["error"]["kind"]) == (story.run, 143, "terminated")
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


@pytest.fixture(scope="module")
def refused(cluster: RayHead, workspace: Workspace) -> subprocess.CompletedProcess[str]:
    """Submit a job whose password only this machine has."""
    wrong = ("--set", "source.password_env=PDF_PASSWORD")
    return cluster.run("submit", workspace.file, "--address", cluster.jobs, SHARED, "--follow", *wrong, PDF_PASSWORD="hunter2")


def test_a_wrong_job_is_exit_code_2(refused: subprocess.CompletedProcess[str]) -> None:
    assert refused.returncode == 2
    assert re.search(r"error: .*source\.password_env names the environment variable PDF_PASSWORD, which is not set", refused.stderr)


def test_secrets_are_not_sent_and_that_is_said(refused: subprocess.CompletedProcess[str]) -> None:
    assert "not sent: PDF_PASSWORD; the cluster's own environment" in refused.stderr
    assert "hunter2" not in refused.stderr + refused.stdout


def test_what_cannot_be_sent_or_was_never_submitted_is_refused(cluster: RayHead, workspace: Workspace) -> None:
    local, *unknown = cluster.run_in_turn(
        ["submit", workspace.file, "--address", cluster.jobs],
        *(["submit", option, "raysubmit_nobody", "--address", cluster.jobs] for option in ("--attach", "--stop")),
    )
    assert {(ended.returncode, ended.stdout) for ended in (local, *unknown)} == {(2, "")}
    assert "source.paths is 'in', a path on this machine that the cluster does not see" in local.stderr
    assert all("raysubmit_nobody does not exist" in ended.stderr for ended in unknown)


def test_without_the_token_nothing_is_done(cluster: RayHead) -> None:
    ended = cluster.run("submit", "--stop", "any", "--address", cluster.jobs, RAY_AUTH_MODE="disabled")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {cluster.jobs} wants the cluster's token: set RAY_AUTH_MODE=token")


@pytest.mark.usefixtures("story")
def test_a_cluster_is_joined_from_its_own_machines(cluster: RayHead, workspace: Workspace) -> None:
    ended = cluster.run("settle", workspace.file, "--json", RAY_ADDRESS=cluster.address)
    assert (ended.returncode, json.loads(ended.stdout)["records"]) == (1, PAGES + 2)
