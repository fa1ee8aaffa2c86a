"""What is sent to a cluster: the job that it was, its schema and this package, and nothing that is this machine's alone."""

from __future__ import annotations

import re
import subprocess
import sys
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
    with pytest.raises(JobError, match=rf"job\.yaml: {key}, a place on this machine that the cluster does not see"):
        bundle.make_portable(workspace.job(*BUCKET, *settings, setting))


def test_a_password_in_a_url_is_not_sent(workspace: Workspace) -> None:
    with pytest.raises(JobError, match=r"source\.paths is 's3://\*\*\*@bucket/in', which holds a password"):
        bundle.make_portable(workspace.job(*BUCKET, "source.paths=['s3://key:hunter2@bucket/in']"))


def test_variables_that_a_job_names_are_told(workspace: Workspace) -> None:
    settings = ("source.password_env=PDF_PASSWORD", "model.engine=openai", "model.base_url=http://a/v1", "model.api_key_env=KEY")
    assert bundle.list_secret_variables(workspace.job(*settings)) == ["PDF_PASSWORD", "KEY"]
    assert bundle.list_secret_variables(workspace.job()) == []


def test_the_package_that_is_sent_is_the_one_that_runs(workspace: Workspace, sent_to: Path) -> None:
    job = bundle.write_bundle(workspace.job(*BUCKET), sent_to)
    code = "import pipeline, sys; from pipeline.cli import main; print(pipeline.__file__); main(['check', sys.argv[1]])"
    ended = subprocess.run([sys.executable, "-c", code, job], cwd=sent_to, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.split("\n")[0]) == (0, f"{sent_to}/pipeline/__init__.py")


def test_nothing_but_the_package_its_job_and_its_schema_is_sent(workspace: Workspace, sent_to: Path) -> None:
    bundle.write_bundle(workspace.job(*BUCKET), sent_to)
    assert {file.name for file in sent_to.iterdir()} == {"job.yaml", "schema.json", "pipeline"}
    sizes = [file.stat().st_size for file in sent_to.rglob("*") if file.is_file()]
    assert sum(sizes) < 10 * 2**20
    assert not [file for file in sent_to.rglob("*") if file.suffix == ".pyc"]


def test_a_package_with_more_in_it_than_belongs_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MOST_BYTES", 100)
    package = tmp_path / "package"
    package.mkdir()
    (package / "weights.bin").write_bytes(bytes(101))
    (package / ".hidden").write_bytes(bytes(101))
    (package / "link").symlink_to("/dev/null")
    with pytest.raises(
        JobError, match=re.escape(f"has 101 bytes, and 100 are sent to a cluster at most; the largest file is {package}/weights.bin")
    ):
        bundle.copy_package(tmp_path / "copy", package)
