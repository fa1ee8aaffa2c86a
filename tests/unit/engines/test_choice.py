"""What `auto` means on which machine: the engine, how it holds the weights, and what a model that does not fit is told."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline import engines
from pipeline.engines import choice, limits
from pipeline.engines.choice import WeightBytes, choose_engine, choose_weights, count_weight_bytes, explain_engine
from pipeline.errors import JobError
from pipeline.job import Job
from tests.support.workspace import Workspace

GB = 10**9
GIB = 2**30
SHARED = Path(__file__).parents[4] / "shared"
SEVEN = WeightBytes(16_600_000_000, 6_900_000_000)
CPU = ("model.name=./checkpoint", "model.without_gpu=cpu")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that are installed; empty it for a machine without vllm."""
    found, real = {"vllm"}, importlib.util.find_spec
    monkeypatch.setattr(choice, "find_spec", lambda name: name in found or None if name == "vllm" else real(name))
    monkeypatch.setattr(engines, "find_spec", lambda name: name in found or None if name == "vllm" else real(name))
    return found


# --- The engine


@pytest.mark.parametrize(
    ("gpus", "has_vllm", "settings", "engine", "reason"),
    [
        (1.0, True, (), "vllm", "there is a GPU, and vllm is installed"),
        (1.0, False, (), "transformers", r"there is a GPU, and vllm, .*, is not installed: pip install '.*\[vllm\]'"),
        (0.0, True, (), "transformers", "there is no GPU"),
        (1.0, True, ("ray.gpus_per_actor=0.5",), "transformers", "ray.gpus_per_actor is less than one GPU"),
        (1.0, True, ("model.weights=bf16",), "transformers", "model.weights is for transformers"),
        (1.0, True, ("model.engine=transformers",), "transformers", "model.engine says so"),
        (0.0, True, ("model.engine=vllm",), "vllm", "model.engine says so"),
        (1.0, True, ("model.name=demo",), "transformers", "it runs the demonstration model"),
    ],
)
def test_the_best_engine_is_chosen_and_the_reason_given(
    workspace: Workspace, installed: set[str], gpus: float, has_vllm: bool, settings: tuple[str, ...], engine: str, reason: str
) -> None:
    if not has_vllm:
        installed.clear()
    job = workspace.job(*CPU, *settings)
    resolved = engines.resolve_engine(job, gpus)
    assert resolved.sections.model.engine == engine == (engine if job.uses_demo else choose_engine(job, gpus))
    assert re.fullmatch(reason, explain_engine(job, resolved, gpus))


def begin(job: Job, **model: Any) -> dict[str, Any]:
    """Return the section `model` of the job.yaml that a run with these values has written."""
    return {**job.dump_keys()["model"], **model}


@pytest.mark.parametrize(("written", "kept"), [("auto", "transformers"), ("transformers", "transformers"), ("vllm", "vllm")])
def test_an_output_that_was_begun_keeps_its_engine(workspace: Workspace, installed: set[str], written: str, kept: str) -> None:
    """Older versions wrote `auto` for what was always transformers."""
    job = workspace.job(*CPU)
    begun = job.with_begun_engine(begin(job, engine=written))
    assert engines.resolve_engine(begun, 1.0).sections.model.engine == kept
    assert job.with_resolved_model(begin(job, engine=written)).sections.model.engine == kept
    assert explain_engine(job, begun, None) == "as this output was begun"


def test_outputs_of_older_versions_keep_their_fingerprint(workspace: Workspace) -> None:
    job = workspace.job(*CPU)
    older = begin(job, engine="auto")
    for key in ("cell_px", "weights"):
        del older[key]
    assert job.with_resolved_model(older).fingerprint == job.fingerprint == workspace.job(*CPU, "model.engine=transformers").fingerprint


def test_a_job_that_names_its_engine_is_not_given_another(workspace: Workspace) -> None:
    job = workspace.job(*CPU, "model.engine=transformers")
    assert job.with_begun_engine(begin(job, engine="vllm")).sections.model.engine == "transformers"


# --- The weights


@pytest.mark.parametrize(
    ("memory", "wanted", "held"),
    [
        (80 * GB, "auto", "bf16"),
        (24 * GB, "auto", "bf16"),
        (16 * GB, "auto", "int4"),
        (80 * GB, "int4", "int4"),
        (80 * GB, "bf16", "bf16"),
    ],
)
def test_weights_are_packed_where_they_do_not_fit_otherwise(workspace: Workspace, memory: int, wanted: str, held: str) -> None:
    assert choose_weights(workspace.job(*CPU, f"model.weights={wanted}"), memory, SEVEN) == held


@pytest.mark.parametrize(
    ("memory", "settings", "sizes", "said"),
    [
        (
            16 * GB,
            ("model.weights=bf16",),
            SEVEN,
            r"needs 16\.6 GB in bf16, 6\.9 GB packed, and the GPU has room for 13\.0 GB .*: set model\.weights to int4 or auto",
        ),
        (16 * GB, (), WeightBytes(16_600_000_000, None), r"take its AWQ copy.*a smaller model \(.*3B.*tensor_parallel_size: 2"),
        (16 * GB, ("model.lora=adapter",), SEVEN, r"leave out model\.lora"),
        (80 * GB, (), WeightBytes(145 * GB, 41 * GB), None),
        (24 * GB, (), WeightBytes(145 * GB, 41 * GB), r"room for 21\.0 GB.*model\.tensor_parallel_size: 4"),
        (8 * GB, (), SEVEN, r"room for 5\.0 GB .*a smaller model"),
    ],
)
def test_a_model_that_does_not_fit_is_told_what_would(
    workspace: Workspace, memory: int, settings: tuple[str, ...], sizes: WeightBytes, said: str | None
) -> None:
    job = workspace.job(*CPU, *settings)
    if said is None:
        assert choose_weights(job, memory, sizes) == "int4"
        return
    with pytest.raises(JobError, match=said):
        choose_weights(job, memory, sizes)


def test_two_engines_on_a_gpu_have_half_of_it_each(workspace: Workspace) -> None:
    assert choose_weights(workspace.job(*CPU, "ray.gpus_per_actor=0.5"), 24 * GB, SEVEN) == "int4"


def test_vllm_is_refused_what_its_gpus_do_not_hold(workspace: Workspace) -> None:
    large, job = WeightBytes(145 * GB, 41 * GB), workspace.job(*CPU, "model.engine=vllm")
    choice.check_vllm_memory(job, 80 * GIB, large)
    choice.check_vllm_memory(job.with_model(tensor_parallel_size=4), 24 * GB, large)
    with pytest.raises(JobError, match=r"what would fit: .*tensor_parallel_size: 4"):
        choice.check_vllm_memory(job, 24 * GB, large)


def test_the_key_is_for_transformers(workspace: Workspace) -> None:
    with pytest.raises(JobError, match=r"weights is for the engine transformers, and model\.engine is vllm"):
        workspace.job(*CPU, "model.engine=vllm", "model.weights=int4")


# --- How large a model is


@pytest.mark.skipif(not (SHARED / "qwen2.5-vl-7b-awq").is_dir(), reason="needs ../shared/qwen2.5-vl-7b-awq")
def test_the_published_7b_model_has_its_known_size() -> None:
    sizes = count_weight_bytes(json.loads((SHARED / "qwen2.5-vl-7b-awq" / "config.json").read_text()))
    assert sizes.unpacked == pytest.approx(16.6 * GB, rel=0.005)
    assert sizes.packed == pytest.approx(6.9 * GB, rel=0.01)


def test_numbers_that_are_missing_decide_nothing(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "read_gpu_memory", lambda: (16 * GB,))
    (workspace.folder / "checkpoint").mkdir()
    (workspace.folder / "checkpoint" / "config.json").write_text("{}")
    job = workspace.job(*CPU)
    assert choice.resolve_weights(job).sections.model.weights == "auto"


def test_the_memory_of_the_gpus_that_are_visible_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text('#!/bin/sh\ncase "$*" in *--id=1*) echo 81559;; *) echo 24564; echo 81559;; esac\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert choice.read_gpu_memory() == (24564 * 2**20, 81559 * 2**20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert choice.read_gpu_memory() == (81559 * 2**20,)
    command.write_text("#!/bin/sh\nexit 9\n")
    assert choice.read_gpu_memory() == ()


@pytest.mark.parametrize(("quantized", "said"), [(True, None), (False, "what would fit: take its AWQ copy")])
def test_check_says_what_this_machines_gpu_holds(
    workspace: Workspace, installed: set[str], monkeypatch: pytest.MonkeyPatch, quantized: bool, said: str | None
) -> None:
    installed.clear()
    monkeypatch.setattr(limits, "read_gpu_memory", lambda: (16 * GB,))
    language = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
    tower = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14}
    config = {"model_type": "qwen2_5_vl", "intermediate_size": 18944, "vision_config": tower, **language}
    if quantized:
        config["quantization_config"] = {"quant_method": "awq"}
    (workspace.folder / "checkpoint").mkdir()
    (workspace.folder / "checkpoint" / "config.json").write_text(json.dumps(config))
    found = limits.describe_engine(workspace.job(*CPU))
    assert (found["engine"], found.get("weights")) == ("transformers", "int4" if quantized else None)
    assert round(found["weights_bytes"] / GB, 1) == 16.6
    assert found["misfit"] is None if said is None else said in found["misfit"]
