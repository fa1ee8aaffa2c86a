"""Listing of a job: how many documents so far, and what a run on an output that has a listing looks at again."""

from __future__ import annotations

import os
import threading
import time
from contextlib import closing, suppress

import pyarrow as pa
import pytest

from pipeline import sources
from pipeline.errors import RunError
from pipeline.flow import pending
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.sources import SOURCE_SCHEMA, read_sources, replace_sources
from pipeline.storage import object_store
from pipeline.storage.object_store import StoredObject
from tests.support import s3
from tests.support.workspace import Workspace


class Killed(BaseException):
    """Stands for a kill of the process."""


def begin_run(job: Job, *read: str, limit: int | None = None) -> list[str]:
    """List as a run does, write `sources/`, in which these documents have been read, and return the names of the listing."""
    output = Output(job.output)
    output.create()
    listing = pending.list_documents(job)
    with pending.record_listing(job, listing if limit is None else listing.slice(0, limit), limit, output):
        listing = pending.identify_documents(output, listing if limit is None else pending.limit_documents(listing, limit, output))
        rows = [row | ({"doc_id": "d", "page_count": 1} if row["source"] in read else {}) for row in listing.to_pylist()]
        replace_sources(output, pa.Table.from_pylist(rows, pa.schema([*SOURCE_SCHEMA, *listing.drop_columns(SOURCE_SCHEMA.names).schema])))
    return [row["source"] for row in rows]


def interrupt_run(job: Job, *read: str, limit: int | None = None) -> None:
    """Begin a run, and kill it once it has read these documents."""
    begin_run(job, *read, limit=limit)
    output = Output(job.output)
    with suppress(Killed), pending.record_listing(job, pending.list_documents(job), limit, output):
        raise Killed


def names(job: Job) -> list[str]:
    return pending.list_documents(job)["source"].to_pylist()


@pytest.fixture
def job(workspace: Workspace) -> Job:
    for name in ("a.pdf", "b.pdf"):
        workspace.put(name, b"%PDF-")
    return workspace.job()


# ---- never


def test_never_takes_what_the_output_has_listed(workspace: Workspace, job: Job) -> None:
    begin_run(job)
    workspace.put("c.pdf", b"%PDF-")
    (workspace.inputs / "a.pdf").unlink()
    never = workspace.job("source.relist=never")
    assert names(never) == ["in/a.pdf", "in/b.pdf"]
    assert names(job) == ["in/b.pdf", "in/c.pdf"]
    assert pending.list_documents(never).schema == pending.list_documents(job).schema


def test_never_has_the_columns_of_a_manifest(workspace: Workspace, job: Job) -> None:
    (workspace.folder / "in/list.csv").write_text("path,customer\na.pdf,ACME\nb.pdf,\n")
    begin_run(workspace.job("source.paths=[in/list.csv]"))
    before = pending.list_documents(workspace.job("source.paths=[in/list.csv]"))
    (workspace.folder / "in/list.csv").write_text("path,customer\nb.pdf,other\n")
    assert pending.list_documents(workspace.job("source.paths=[in/list.csv]", "source.relist=never")).equals(before)


def test_never_lists_a_new_output(workspace: Workspace, job: Job) -> None:
    assert names(workspace.job("source.relist=never")) == ["in/a.pdf", "in/b.pdf"]


def test_never_lists_where_the_paths_have_changed(workspace: Workspace, job: Job) -> None:
    begin_run(workspace.job("source.paths=[in/a.pdf]"))
    assert names(workspace.job("source.relist=never")) == ["in/a.pdf", "in/b.pdf"]


def test_never_lists_after_a_run_with_a_limit(workspace: Workspace, job: Job) -> None:
    assert begin_run(job, limit=1) == ["in/a.pdf"]
    assert names(workspace.job("source.relist=never")) == ["in/a.pdf", "in/b.pdf"]


def test_never_lists_where_sources_are_not_those_of_the_listing(workspace: Workspace, job: Job) -> None:
    """The run was killed between writing `listing.json` and `sources/`."""
    begin_run(job)
    workspace.put("c.pdf", b"%PDF-")
    with suppress(Killed), pending.record_listing(job, pending.list_documents(job), None, Output(job.output)):
        raise Killed
    assert names(workspace.job("source.relist=never")) == ["in/a.pdf", "in/b.pdf", "in/c.pdf"]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"source": 1}'])
def test_never_lists_where_the_note_cannot_be_read(workspace: Workspace, job: Job, content: bytes) -> None:
    begin_run(job)
    workspace.put("c.pdf", b"%PDF-")
    Output(job.output).root.put("listing.json", content)
    assert len(names(workspace.job("source.relist=never"))) == 3


# ---- auto and always


def test_auto_sees_a_file_that_was_rewritten_in_a_folder_that_looks_unchanged(workspace: Workspace, job: Job) -> None:
    interrupt_run(job, "in/a.pdf", "in/b.pdf")
    folder, file = os.stat(workspace.inputs), workspace.inputs / "a.pdf"
    file.write_bytes(b"%PDF-2")
    os.utime(workspace.inputs, ns=(folder.st_atime_ns, folder.st_mtime_ns))
    assert pending.list_documents(job)["size_bytes"].to_pylist() == [6, 5]


@pytest.fixture
def looked_for(bucket: s3.Bucket, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The objects that were looked for one by one; a manifest names two."""
    found: list[str] = []
    real = object_store.find_object

    def find_object(url: str) -> StoredObject | None:
        found.append(url.rpartition("/")[2])
        return real(url)

    monkeypatch.setattr(object_store, "find_object", find_object)
    for name in ("a.pdf", "b.pdf"):
        bucket.put(f"{workspace.folder.name}/{name}", b"%PDF-")
    (workspace.folder / "list.txt").write_text("".join(f"{bucket.url(workspace.folder.name)}/{name}\n" for name in ("a.pdf", "b.pdf")))
    return found


def make_remote_job(workspace: Workspace, relist: str) -> Job:
    return workspace.job("source.paths=[list.txt]", "source.allow_outside=true", f"source.relist={relist}")


@pytest.mark.parametrize(("relist", "again"), [("auto", ["b.pdf"]), ("always", ["a.pdf", "b.pdf"])])
def test_auto_takes_what_an_interrupted_run_has_read(
    bucket: s3.Bucket, workspace: Workspace, looked_for: list[str], relist: str, again: list[str]
) -> None:
    job = make_remote_job(workspace, relist)
    interrupt_run(job, f"{bucket.url(workspace.folder.name)}/a.pdf")
    before = pending.list_documents(job)
    looked_for.clear()
    assert pending.list_documents(job).equals(before)
    assert sorted(looked_for) == again


def test_auto_looks_at_everything_after_a_run_that_ended(bucket: s3.Bucket, workspace: Workspace, looked_for: list[str]) -> None:
    job = make_remote_job(workspace, "auto")
    url = f"{bucket.url(workspace.folder.name)}/a.pdf"
    begin_run(job, url)
    looked_for.clear()
    names(job)
    assert sorted(looked_for) == ["a.pdf", "b.pdf"]


def test_auto_looks_at_everything_after_a_run_that_stopped_itself(bucket: s3.Bucket, workspace: Workspace, looked_for: list[str]) -> None:
    """Somebody may replace the documents for which it stopped."""
    job = make_remote_job(workspace, "auto")
    begin_run(job, f"{bucket.url(workspace.folder.name)}/a.pdf")
    with pytest.raises(RunError), pending.record_listing(job, pending.list_documents(job), None, Output(job.output)):
        raise RunError("the run stopped after its first documents")
    looked_for.clear()
    names(job)
    assert sorted(looked_for) == ["a.pdf", "b.pdf"]


# ---- A listing that goes on


def test_a_document_that_changed_waits_for_the_whole_listing(workspace: Workspace, job: Job) -> None:
    """The list of sources has a row of its old version, which only the whole listing replaces."""
    begin_run(job, "in/a.pdf", "in/b.pdf")
    workspace.put("a.pdf", b"%PDF-2")
    workspace.put("c.pdf", b"%PDF-")
    output = Output(job.output)
    found = pending.identify_first_documents(output, pending.list_documents(job))
    assert found.select(["source", "doc_id"]).to_pylist() == [{"source": "in/b.pdf", "doc_id": "d"}, {"source": "in/c.pdf", "doc_id": None}]
    assert read_sources(output)["source"].to_pylist() == ["in/a.pdf", "in/b.pdf", "in/c.pdf"]
    assert pending.identify_documents(output, pending.list_documents(job))["doc_id"].to_pylist() == [None, "d", None]


def test_enough_documents_end_the_wait_for_a_slow_listing(workspace: Workspace, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before the time in which most listings are complete."""
    monkeypatch.setattr(sources, "PROGRESS_S", 0.01)
    monkeypatch.setattr(pending, "GRACE_S", 0.3)
    more = threading.Event()
    real = os.stat

    def stat(path: str, **given: object) -> os.stat_result:
        if str(path).endswith("b.pdf"):
            more.wait(60)
        return real(path, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr("pipeline.storage.store.ITEMS_PER_TASK", 1)
    started_s = time.monotonic()
    with closing(pending.DocumentListing.begin(job)) as listing:
        pending.await_documents(listing, 0, lambda _: None)
        assert (listing.is_complete, listing.make_table()["source"].to_pylist()) == (False, ["in/a.pdf"])
        assert time.monotonic() - started_s >= 0.3
        more.set()
        pending.await_documents(listing, None, lambda _: None)
        assert (listing.is_complete, listing.make_table()["source"].to_pylist()) == (True, ["in/a.pdf", "in/b.pdf"])


# ---- Progress


def test_the_number_of_documents_is_told_while_a_listing_goes_on(job: Job, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        workspace.put(f"{number}.pdf", b"%PDF-")
    monkeypatch.setattr(sources, "PROGRESS_S", 0.01)
    monkeypatch.setattr(sources, "BATCH_ROWS", 1)
    real = os.stat

    def stat(path: str, **given: object) -> os.stat_result:
        time.sleep(0.01)
        return real(path, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr("pipeline.storage.store.ITEMS_PER_TASK", 1)
    told: list[int] = []
    pending.list_documents(job, told.append)
    assert told == sorted(told)
    assert (told[-1], len(set(told)) > 2) == (32, True)
