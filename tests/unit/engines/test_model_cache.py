"""Checkpoints in an object store: copied once, as a whole, and refused before a run starts if they are missing."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from pipeline import engines
from pipeline.engines import model_cache
from pipeline.errors import JobError, RunError
from pipeline.job import Job
from pipeline.storage import listing, object_store
from tests.support import s3
from tests.support.workspace import Workspace

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"pickled", "sub/config.json": b"another's"}


@pytest.fixture
def uri(bucket: s3.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The S3 address of a checkpoint, with a cache folder of this test's own."""
    monkeypatch.setenv(model_cache.CACHE_ENV, str(tmp_path / "cache"))
    monkeypatch.delenv(model_cache.OFFLINE_ENV, raising=False)
    for name, data in FILES.items():
        bucket.put(f"{tmp_path.name}/model/{name}", data)
    return bucket.url(f"{tmp_path.name}/model")


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are downloaded, in order."""
    fetched: list[str] = []
    download = object_store.download_object

    def counted(url: str, file: Path) -> None:
        fetched.append(file.name)
        download(url, file)

    monkeypatch.setattr(object_store, "download_object", counted)
    return fetched


def list_cache(tmp_path: Path) -> list[str]:
    """Return the names in the cache folder, without the locks."""
    return sorted(name for name in os.listdir(tmp_path / "cache" / "models") if not name.endswith(".lock"))


def test_only_what_is_used_is_copied(uri: str) -> None:
    copy = model_cache.copy_checkpoint(uri, model_cache.resolve_store_revision(uri))
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == {n: FILES[n] for n in ("config.json", "model.safetensors")}


def test_actors_that_start_together_copy_once(uri: str, downloads: list[str], tmp_path: Path) -> None:
    revision, found = model_cache.resolve_store_revision(uri), list[Path]()
    threads = [threading.Thread(target=lambda: found.append(model_cache.copy_checkpoint(uri, revision))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [model_cache.find_copy_folder(uri, revision)] * 4
    assert (sorted(downloads), list_cache(tmp_path)) == (["config.json", "model.safetensors"], [found[0].name])


def test_an_interrupted_copy_is_not_used(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next attempt removes what it left."""
    download, revision = object_store.download_object, model_cache.resolve_store_revision(uri)

    def cut(url: str, file: Path) -> None:
        file.write_bytes(b"wei")
        raise object_store.StoreUnreachable("the connection is gone")

    monkeypatch.setattr(object_store, "download_object", cut)
    with pytest.raises(RunError, match=r"cannot copy the model s3://.* to .*: the connection is gone; fix the cause"):
        model_cache.copy_checkpoint(uri, revision)
    assert not model_cache.find_copy_folder(uri, revision).exists()
    monkeypatch.setattr(object_store, "download_object", download)
    assert list_cache(tmp_path) != [model_cache.copy_checkpoint(uri, revision).name] == list_cache(tmp_path)


def test_a_truncated_download_is_an_error(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "download_object", lambda url, file: file.write_bytes(b""))
    with pytest.raises(RunError, match=r"config\.json has 2 bytes, but 0 were received"):
        model_cache.copy_checkpoint(uri, model_cache.resolve_store_revision(uri))


def test_a_changed_checkpoint_has_another_revision_and_folder(uri: str, bucket: s3.Bucket, tmp_path: Path) -> None:
    before = model_cache.resolve_store_revision(uri)
    first = model_cache.copy_checkpoint(uri, before)
    bucket.put(f"{tmp_path.name}/model/model.safetensors", b"WEIGHTS")
    after = model_cache.resolve_store_revision(uri)
    assert model_cache.copy_checkpoint(uri, after).joinpath("model.safetensors").read_bytes() == b"WEIGHTS"
    assert (after != before, first.joinpath("model.safetensors").read_bytes()) == (True, b"weights")
    assert model_cache.resolve_store_revision(uri, before) == before  # its copy is here
    shutil.rmtree(first)
    with pytest.raises(JobError, match=rf"model\.revision is '{before}', s3://.* has the revision {after} now"):
        model_cache.resolve_store_revision(uri, before)
    with pytest.raises(RunError, match="has changed since the run began"):
        model_cache.copy_checkpoint(uri, before)


def test_offline_the_copy_is_used_and_nothing_else(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(model_cache.OFFLINE_ENV, "1")
    with pytest.raises(JobError, match=r"is not in .*/models, and HF_HUB_OFFLINE forbids fetching it"):
        model_cache.resolve_store_revision(uri)
    monkeypatch.delenv(model_cache.OFFLINE_ENV)
    copy = model_cache.copy_checkpoint(uri, model_cache.resolve_store_revision(uri))
    monkeypatch.setenv(model_cache.OFFLINE_ENV, "1")
    monkeypatch.setattr(listing, "list_objects", None)  # a call would fail
    assert model_cache.copy_checkpoint(uri, model_cache.resolve_store_revision(uri)) == copy


# --- In a job


def make_job(workspace: Workspace, uri: str, *settings: str) -> Job:
    return workspace.job(f"model.name={uri}", "model.without_gpu=cpu", *settings)


def test_an_address_without_a_checkpoint_is_refused(workspace: Workspace, uri: str) -> None:
    with pytest.raises(JobError, match=r"model\.name is 's3://.*/nowhere', which holds no checkpoint \(no config\.json\)"):
        engines.check_engine(make_job(workspace, f"{uri}/nowhere"))
    with pytest.raises(JobError, match=r"the model s3://another/model cannot be listed: The specified bucket does not exist"):
        engines.check_engine(make_job(workspace, "s3://another/model"))


def test_a_models_revision_is_part_of_the_fingerprint(workspace: Workspace, uri: str) -> None:
    asked = make_job(workspace, uri)
    found = engines.resolve_engine(asked, 0.0)
    assert found.sections.model.revision == model_cache.resolve_store_revision(uri)
    assert found.fingerprint != asked.fingerprint
    assert asked.with_resolved_model(found.dump_keys()["model"]).fingerprint == found.fingerprint
    assert engines.resolve_engine(found, 0.0) == found


def test_a_hub_id_without_a_copy_is_refused_offline(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(JobError, match=r"model\.name is 'nobody/nothing', neither a folder nor a repository of the hub with config\.json"):
        engines.resolve_engine(make_job(workspace, "nobody/nothing"), 0.0)
