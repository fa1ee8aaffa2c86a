"""The same job with its documents and its results in each object store: real servers on loopback, no model, the same records."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import cluster, flow
from pipeline.errors import JobError
from pipeline.flow import ask_pass, pending
from pipeline.job import Job
from pipeline.output import compaction
from pipeline.report import Report
from tests.support import azure, s3
from tests.support.buckets import Bucket
from tests.support.ray_actors import InkActor
from tests.support.workspace import Workspace, draw_slip

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask_pass, "EngineActor", InkActor)


@pytest.fixture(scope="module")
def done(
    ray_session: cluster.Resources, any_bucket: Bucket, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workspace, Job, list[Report]]:
    """Five documents in a store, one of them broken, run in two goes with the output there; the tests leave it as it is."""
    workspace = Workspace(tmp_path_factory.mktemp("remote"))
    for name, data in {
        "a.pdf": draw_slip(1, 2),
        "b.pdf": b"no PDF",
        "c.pdf": draw_slip(3),
        "d.pdf": draw_slip(4),
        "e.pdf": draw_slip(4),
    }.items():
        workspace.put(name, data)
        any_bucket.put(f"{workspace.folder.name}/in/{name}", data)
    job = workspace.job(
        f"source.paths=['{any_bucket.url(f'{workspace.folder.name}/in')}']", f"output.path={any_bucket.url(f'{workspace.folder.name}/out')}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ask_pass, "EngineActor", InkActor)
        return workspace, job, [flow.run(job, limit=2), flow.run(job)]


def within(job: Job, name: str) -> str:
    """Return the key of something in a job's output."""
    return f"{job.output}/{name}".partition("://bucket/")[2]


def read_records(any_bucket: Bucket, job: Job) -> dict[str, bytes]:
    return any_bucket.contents(within(job, "records/"))


def test_a_job_in_a_store_has_the_records_of_the_same_job_here(any_bucket: Bucket, done: tuple[Workspace, Job, list[Report]]) -> None:
    workspace, job, (_, there) = done
    here = flow.run(workspace.job())
    assert (there.output, there.statuses, there.failures) == (job.output, here.statuses, here.failures)
    mine = {row["_source"].rpartition("/")[2]: row for row in pq.read_table(workspace.folder / "out" / "records").to_pylist()}
    theirs = {row["_source"].rpartition("/")[2]: row for row in any_bucket.rows(f"{job.output}/records")}
    assert {name: row | {"_source": ""} for name, row in theirs.items()} == {name: row | {"_source": ""} for name, row in mine.items()}
    assert {row["_source"].rpartition("/")[0] for row in theirs.values()} == {any_bucket.url(f"{workspace.folder.name}/in")}


def test_what_was_answered_is_not_asked_again(any_bucket: Bucket, done: tuple[Workspace, Job, list[Report]]) -> None:
    _, job, reports = done
    assert [(report.documents, report.requests_asked) for report in reports] == [(2, 1), (5, 2)]
    assert len({row["key"] for row in any_bucket.rows(f"{job.output}/requests")}) == len(any_bucket.rows(f"{job.output}/requests")) == 4


def test_no_secret_goes_into_what_is_written(any_bucket: Bucket, done: tuple[Workspace, Job, list[Report]]) -> None:
    everything = b"".join(any_bucket.contents(f"{done[0].folder.name}/").values())
    assert b"fingerprint" in everything
    assert not [secret for secret in (s3.SECRET, s3.SECRET[:12], "AKIDEXAMPLE", azure.KEY, azure.KEY[:12]) if secret.encode() in everything]


def test_settling_gathers_the_ledger_and_changes_no_record(
    any_bucket: Bucket, done: tuple[Workspace, Job, list[Report]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, job, _ = done
    monkeypatch.setattr(compaction, "MAX_SMALL_SHARDS", 1)
    before = read_records(any_bucket, job)
    assert len(any_bucket.keys(within(job, "requests/"))) > 1
    flow.settle(job)
    assert (len(any_bucket.keys(within(job, "requests/"))), len(any_bucket.rows(f"{job.output}/requests"))) == (1, 4)
    assert read_records(any_bucket, job) == before


def test_a_damaged_shard_is_set_aside_and_asked_again(any_bucket: Bucket, done: tuple[Workspace, Job, list[Report]]) -> None:
    _, job, _ = done
    before, shard = read_records(any_bucket, job), any_bucket.keys(within(job, "requests/"))[0]
    lost = [row for row in pq.read_table(pa.BufferReader(any_bucket.get(shard))).to_pylist() if row["asks"]]
    any_bucket.put(shard, any_bucket.get(shard)[:-40])
    report = flow.run(job)
    assert (report.damaged, report.requests_asked) == ([any_bucket.url(shard)], len(lost))
    assert read_records(any_bucket, job) == before
    folder, _, name = shard.rpartition("/")
    assert any_bucket.keys(f"{folder}/.") == [f"{folder}/.{name}.damaged"]


def test_what_a_run_wrote_there_is_no_source_of_the_next(any_bucket: Bucket, done: tuple[Workspace, Job, list[Report]]) -> None:
    workspace, job, _ = done
    any_bucket.put(f"{workspace.folder.name}/out2/a.pdf", draw_slip(1))
    everything = dataclasses.replace(workspace.job(f"source.paths=['{any_bucket.url(workspace.folder.name)}']"), output=job.output)
    found = [name.removeprefix(any_bucket.url(workspace.folder.name)) for name in pending.list_documents(everything)["source"].to_pylist()]
    assert found == ["/in/a.pdf", "/in/b.pdf", "/in/c.pdf", "/in/d.pdf", "/in/e.pdf", "/out2/a.pdf"]


def test_an_output_that_cannot_be_is_named_with_its_line(workspace: Workspace) -> None:
    with pytest.raises(JobError, match=r"--set output\.path=s3://\*\*\*@bucket/out: output\.path: it contains a user or") as caught:
        workspace.job("output.path=s3://KEY:secret@bucket/out")
    assert "secret" not in str(caught.value)
    with pytest.raises(JobError, match=r"output 's3:/bucket/out': a slash is missing"):
        Job.load(workspace.file, output="s3:/bucket/out")
