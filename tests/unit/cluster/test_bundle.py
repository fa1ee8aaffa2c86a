"""What is sent to a cluster: the job that it was, its schema and this package, and nothing that is this machine's alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cluster import bundle
from pipeline.errors import JobError
from pipeline.job import Job
from tests.support.workspace import Workspace

BUCKET = ("source.paths=[s3://bucket/in, https://example.com/a.pdf]", "output.path=s3://bucket/out")
SHARED = ("ray.shared_filesystem=true",)


@pytest.fixture
def sent_to(tmp_path: Path) -> Path:
    folder = tmp_path / "sent"
    folder.mkdir()
    return folder


def sent(job: Job, folder: Path) -> Job:
    """Return the job as the cluster reads it."""
    return Job.load(folder / bundle.write_bundle(job, folder))


def test_a_job_arrives_as_it_was(workspace: Workspace, sent_to: Path) -> None:
    job = workspace.job(*BUCKET, "pages.dpi=150", "ray.address=auto")
    there = sent(job, sent_to)
    assert (there.fingerprint, there.output) == (job.fingerprint, "s3://bucket/out")
    assert there.sections.source.paths == ("s3://bucket/in", "https://example.com/a.pdf")
    assert there.sections.pages.dpi == 150


def test_a_job_names_no_cluster_where_it_arrives(workspace: Workspace, sent_to: Path) -> None:
    assert sent(workspace.job(*BUCKET, "ray.address=auto"), sent_to).sections.ray.address is None


def test_on_a_shared_file_system_paths_are_absolute(workspace: Workspace, sent_to: Path) -> None:
    there = sent(workspace.job(*SHARED, "source.paths=[in, '*.pdf', file:///a/b.pdf]", "model.name=./weights"), sent_to)
    assert there.sections.source.paths == (f"{workspace.folder}/in", f"{workspace.folder}/*.pdf", "/a/b.pdf")
    assert (there.output, there.sections.model.name) == (workspace.folder / "out", f"{workspace.folder}/weights")


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("source.paths=[in]", "source.paths is 'in'"),
        ("source.paths=[file:///a.pdf]", "source.paths is 'file:///a.pdf'"),
        ("output.path=out", "output.path is '.*/out'"),
        ("model.name=./weights", "model.name is './weights'"),
        ("model.lora=./lora", "model.lora is './lora'"),
    ],
)
def test_a_place_on_this_machine_is_refused(workspace: Workspace, setting: str, key: str) -> None:
    settings = ("model.name=Qwen/Qwen2.5-VL-7B-Instruct-AWQ",) if "lora" in setting else ()
    with pytest.raises(JobError, match=rf"job\.yaml: {key}, a path on this machine that the cluster does not see"):
        bundle.make_portable(workspace.job(*BUCKET, *settings, setting))


def test_a_password_in_a_url_is_not_sent(workspace: Workspace) -> None:
    with pytest.raises(JobError, match=r"source\.paths is 's3://\*\*\*@bucket/in', which holds a password"):
        bundle.make_portable(workspace.job(*BUCKET, "source.paths=['s3://key:hunter2@bucket/in']"))


def test_variables_that_a_job_names_are_told(workspace: Workspace) -> None:
    settings = ("source.password_env=PDF_PASSWORD", "model.engine=openai", "model.base_url=http://a/v1", "model.api_key_env=KEY")
    assert bundle.list_secret_variables(workspace.job(*settings)) == ["PDF_PASSWORD", "KEY"]
    assert bundle.list_secret_variables(workspace.job()) == []


def test_nothing_but_the_job_and_its_schema_is_in_a_bundle(workspace: Workspace, sent_to: Path) -> None:
    bundle.write_bundle(workspace.job(*BUCKET), sent_to)
    assert {file.name for file in sent_to.iterdir()} == {"job.yaml", "schema.json"}
