"""Runs whose listing goes on while their first documents are asked: a store's last page comes late, or never, and no model answers."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import flow
from pipeline.engines import Engine
from pipeline.errors import SourceError
from pipeline.flow import ask_pass, pending, preparation
from pipeline.job import Job
from pipeline.report import Phase, Progress
from pipeline.storage import listing
from pipeline.storage.listing import KeyPage, ListedPrefix
from tests.support.ray_actors import InkActor
from tests.support.s3 import Bucket
from tests.support.workspace import Workspace, draw_slip

pytestmark = pytest.mark.usefixtures("ray_session")
PATIENCE_S = 120.0
NAMES = [f"{letter}.pdf" for letter in "abcdef"]
LastPage = Callable[[], None]


class MarkingActor(InkActor):
    """Leaves a file beside the job when it loads its engine."""

    def load(self, job: Job, threads: int) -> Engine:
        (job.file.parent / f"{os.getpid()}.actor").touch()
        return super().load(job, threads)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask two documents as soon as there are two; a page of the store has no more."""
    monkeypatch.setattr(ask_pass, "EngineActor", MarkingActor)
    monkeypatch.setattr(preparation, "MIN_FIRST_DOCUMENTS", 1)
    monkeypatch.setattr(pending, "GRACE_S", 0.0)
    monkeypatch.setattr(listing, "PAGE_KEYS", 2)


@pytest.fixture
def job(bucket: Bucket, workspace: Workspace) -> Job:
    for number, name in enumerate(NAMES):
        bucket.put(f"{workspace.folder.name}/{name}", draw_slip(min(number, 4)))  # the last two are of the same bytes
    return make_job(bucket, workspace, "out")


def make_job(bucket: Bucket, workspace: Workspace, output: str) -> Job:
    return workspace.job(f"source.paths=['{bucket.url(workspace.folder.name)}']", f"output.path={output}", "limits.canary=1")


@pytest.fixture
def on_last_page(monkeypatch: pytest.MonkeyPatch) -> Callable[[LastPage], None]:
    """Have a function called before the store answers with its last page."""
    real = listing.read_s3_page

    def install(act: LastPage) -> None:
        def read_page(files: Any, bucket: str, part: ListedPrefix) -> KeyPage:
            page = real(files, bucket, part)
            if not page.next_page:
                act()
            return page

        monkeypatch.setitem(listing.PAGE_READERS, "s3", read_page)

    return install


def read_sources_asked(job: Job) -> list[str]:
    """Return the names of the documents in the ledger."""
    return sorted(name.rpartition("/")[2] for file in find_shards(job) for name in pq.read_table(file)["source"].to_pylist())


def find_shards(job: Job) -> list[Any]:
    return list((job.file.parent / "out" / "requests").glob("*.parquet"))


def await_answer(job: Job) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not find_shards(job):
        assert time.monotonic() < deadline, "no answer came before the last page of the listing"
        time.sleep(0.1)


def read_records(workspace: Workspace, output: str) -> list[dict[str, Any]]:
    return sorted(pq.read_table(workspace.folder / output / "records").to_pylist(), key=lambda row: row["_source"])


def test_the_first_answer_is_there_before_the_last_page_is_listed(
    bucket: Bucket, workspace: Workspace, job: Job, on_last_page: Callable[[LastPage], None]
) -> None:
    on_last_page(lambda: await_answer(job))
    told: list[Progress] = []
    report = flow.run(job, on_progress=told.append)
    assert (report.documents, report.statuses, report.requests_asked) == (6, {"extracted": 6}, 5)
    assert len(list(workspace.folder.glob("*.actor"))) == 1, "an engine was loaded twice"
    asking = [now for now in told if now.phase is Phase.ASKING]
    assert any(now.is_listing and (now.documents or 0) < 6 for now in asking)
    assert (asking[-1].is_listing, asking[-1].documents, asking[-1].documents_done) == (False, 6, 6)
    flow.run(make_job(bucket, workspace, "whole"), limit=100)
    assert read_records(workspace, "out") == read_records(workspace, "whole")


@pytest.mark.parametrize("end", [OSError("the store is gone"), KeyboardInterrupt()], ids=["failed", "interrupted"])
def test_what_was_answered_while_a_listing_ended_early_is_kept(
    bucket: Bucket, workspace: Workspace, job: Job, on_last_page: Callable[[LastPage], None], end: BaseException
) -> None:
    over = threading.Event()

    def break_off() -> None:
        await_answer(job)
        if isinstance(end, OSError):
            raise end
        over.wait(PATIENCE_S)

    def interrupt(now: Progress) -> None:
        if isinstance(end, KeyboardInterrupt) and now.requests_done:
            raise end

    on_last_page(break_off)
    error = SourceError if isinstance(end, OSError) else KeyboardInterrupt
    with pytest.raises(error, match="cannot be listed: the store is gone" if isinstance(end, OSError) else None):
        flow.run(job, on_progress=interrupt)
    over.set()
    before = read_sources_asked(job)
    facts = json.loads((workspace.folder / "out" / "listing.json").read_text())
    assert (0 < len(before) < 5, facts["names"], facts["has_ended"]) == (True, None, False)

    on_last_page(lambda: None)
    report = flow.run(job)
    assert (report.statuses, report.requests_asked) == ({"extracted": 6}, 5 - len(before))
    assert len(read_sources_asked(job)) == 5
    flow.run(make_job(bucket, workspace, "whole"), limit=100)
    assert read_records(workspace, "out") == read_records(workspace, "whole")
