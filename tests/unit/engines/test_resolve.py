"""Which model a job is resolved to, and which jobs are refused before a model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import engines
from pipeline.engines.model_files import DEMO_CHECKPOINT
from pipeline.errors import JobError, RunError
from pipeline.version import __version__
from tests.support.workspace import SCHEMA, Workspace

HUB = "model.name=Qwen/Qwen2.5-VL-7B-Instruct-AWQ"


# --- Which model


@pytest.mark.parametrize("policy", ["stop", "demo", "cpu"])
def test_with_a_gpu_the_jobs_model_answers(workspace: Workspace, policy: str) -> None:
    job = workspace.job("model.name=./checkpoint", f"model.without_gpu={policy}")
    assert engines.resolve_engine(job, 1.0).sections.model.name == "./checkpoint"


def test_without_a_gpu_the_demonstration_model_replaces_it(workspace: Workspace) -> None:
    chosen = engines.resolve_engine(workspace.job(HUB, "model.without_gpu=demo", "model.lora=adapter"), 0.0)
    model = chosen.sections.model
    assert (model.name, model.revision, model.lora) == ("demo", __version__, None)


def test_without_a_gpu_the_jobs_model_may_run_on_the_cpu(workspace: Workspace) -> None:
    job = workspace.job("model.name=./checkpoint", "model.without_gpu=cpu")
    assert engines.resolve_engine(job, 0.0).sections.model.name == "./checkpoint"


def test_without_a_gpu_and_without_gpu_unset_the_job_is_refused(workspace: Workspace) -> None:
    with pytest.raises(JobError, match=r"there is no GPU for Qwen/.*; set model\.without_gpu to demo .* or cpu"):
        engines.resolve_engine(workspace.job(HUB), 0.0)


@pytest.mark.parametrize("gpus", [0.0, 1.0])
def test_a_job_may_name_the_demonstration_itself(workspace: Workspace, gpus: float) -> None:
    assert engines.resolve_engine(workspace.job(), gpus).sections.model.revision == __version__


def test_the_choice_changes_nothing_else(workspace: Workspace) -> None:
    job = workspace.job(HUB, "model.without_gpu=demo")
    chosen = engines.resolve_engine(job, 0.0)
    assert (chosen.output, chosen.schema, chosen.sections.pages) == (job.output, job.schema, job.sections.pages)
    assert chosen.fingerprint != job.fingerprint


def test_the_demonstration_model_has_one_fingerprint(workspace: Workspace) -> None:
    named, fallen_back = workspace.job(), workspace.job(HUB, "model.without_gpu=demo")
    assert engines.resolve_engine(named, 0.0).fingerprint == engines.resolve_engine(fallen_back, 0.0).fingerprint


COMMIT = "5b1f2d8c9e7a64300f1e2d3c4b5a69788796a5b4"


def test_a_revision_of_the_hub_is_resolved_to_its_commit(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--Qwen--Qwen2.5-VL-7B-Instruct-AWQ"
    (cached / "snapshots" / COMMIT).mkdir(parents=True)
    (cached / "snapshots" / COMMIT / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    for branch in ("main", "v2"):
        (cached / "refs" / branch).write_text(COMMIT)
    newest, named = workspace.job(HUB), workspace.job(HUB, "model.revision=v2")
    resolved = [engines.resolve_engine(job, 1.0) for job in (newest, named)]
    assert [job.sections.model.revision for job in resolved] == [COMMIT, COMMIT]
    assert newest.fingerprint != resolved[0].fingerprint == resolved[1].fingerprint
    for job in (newest, named):  # `settle` takes over what the run found
        assert job.with_resolved_model(resolved[0].dump_keys()["model"]).fingerprint == resolved[0].fingerprint


def test_an_adapter_on_the_hub_is_resolved_to_its_commit(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--someone--adapter"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    job = workspace.job("model.name=./checkpoint", "model.lora=someone/adapter")
    with pytest.raises(JobError, match=r"model\.lora is 'someone/adapter', neither a folder nor a repository of the hub with adapter_"):
        engines.resolve_engine(job, 1.0)
    (cached / "snapshots" / COMMIT).mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (cached / "snapshots" / COMMIT / name).write_text("{}")
    resolved = engines.resolve_engine(job, 1.0)
    assert resolved.sections.model.lora_revision == COMMIT
    assert resolved.fingerprint not in (job.fingerprint, workspace.job("model.name=./checkpoint", "model.lora=other").fingerprint)
    assert job.with_resolved_model(resolved.dump_keys()["model"]).fingerprint == resolved.fingerprint
    assert engines.find_adapter(resolved) == cached / "snapshots" / COMMIT


# --- A GPU that cannot be used


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_an_engine_for_a_gpu_is_not_loaded_where_torch_cannot_use_one(workspace: Workspace) -> None:
    with pytest.raises(
        RunError,
        match=r"^Ray reserves a GPU for the model, but torch .*, built (for CUDA|without CUDA).*, cannot use it; the NVIDIA driver is ",
    ):
        engines.load_engine(workspace.job(), on_gpu=True)


def test_the_drivers_version_is_read_from_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:\n"
    )
    (tmp_path / "open").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert [engines.read_driver_version(tmp_path / name) for name in ("version", "open", "gone")] == ["535.104.05", "580.65.06", ""]


# --- What is refused


def test_a_schema_within_the_grammar_leaves_nothing_to_the_validator(workspace: Workspace) -> None:
    assert engines.check_engine(workspace.job()) == ()


def test_keywords_left_to_the_validator_are_reported(workspace: Workspace) -> None:
    lines = SCHEMA["properties"]["lines"] | {"uniqueItems": True}  # type: ignore[index]
    (workspace.folder / "schema.json").write_text(json.dumps(SCHEMA | {"properties": SCHEMA["properties"] | {"lines": lines}}))  # type: ignore[operator]
    assert engines.check_engine(workspace.job()) == ("not enforced while decoding: /properties/lines/uniqueItems",)


def test_a_folder_without_a_checkpoint_is_refused(workspace: Workspace) -> None:
    (workspace.folder / "empty").mkdir()
    with pytest.raises(JobError, match=r"model\.name is 'empty', but .*/empty holds no checkpoint \(no config\.json\)"):
        engines.check_engine(workspace.job("model.name=empty"))


@pytest.mark.parametrize("name", ["./gone", "/gone", "~/gone"])
def test_a_missing_path_is_refused(workspace: Workspace, name: str) -> None:
    with pytest.raises(JobError, match="holds no checkpoint"):
        engines.check_engine(workspace.job(f"model.name={name}"))


def test_a_hub_id_is_not_checked(workspace: Workspace) -> None:
    assert engines.check_engine(workspace.job(HUB)) == ()


# --- Where the model is


def test_a_models_folder_is_relative_to_the_job(workspace: Workspace) -> None:
    assert engines.find_model_folder(workspace.job("model.name=./mine")) == workspace.folder / "mine"


def test_the_demonstration_model_is_in_the_package(workspace: Workspace) -> None:
    assert engines.find_model_folder(workspace.job()) == DEMO_CHECKPOINT


def test_choosing_and_checking_load_no_model_library(workspace: Workspace) -> None:
    code = (
        "import sys; from pipeline import Job, engines\n"
        "engines.check_engine(engines.resolve_engine(Job.load(sys.argv[1]), 0)); print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, str(workspace.file)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]).stdout
    assert not {"torch", "transformers", "ray"} & set(loaded.split())
