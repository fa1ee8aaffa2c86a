"""vLLM's limits for a GPU, a model and a job's pages; what a job sets itself stays."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline import engines
from pipeline.engines import limits
from pipeline.engines.limits import VLLMLimits, compute_limits, count_token_bytes
from pipeline.engines.vllm import launch
from pipeline.job import Job
from tests.support.workspace import Workspace

H100, L4, T4 = 81_559 * 2**20, 23_034 * 2**20, 15_360 * 2**20
LANGUAGE = {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
    "intermediate_size": 18_944,
}  # fmt: skip
TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14}
SEVEN = {"model_type": "qwen2_5_vl", **LANGUAGE, "vision_config": TOWER, "quantization_config": {"quant_method": "awq"}}


def make_job(workspace: Workspace, *settings: str) -> Job:
    return workspace.job("model.name=./checkpoint", "model.engine=vllm", "sampling.max_tokens=2048", *settings)


@pytest.mark.parametrize(
    ("memory", "settings", "step", "sequences"),
    [
        (H100, (), 8192, 184),  # (85.5 GB x 0.92 - 5 GB - 6.9 GB) / 57,344 B / (4 x 1,280 + 512 + 512)
        (H100, ("pages.per_request=1",), 8192, 256),
        (H100, ("pages.per_request=12",), 15_360, 64),
        (L4, (), 5120, 24),
        (L4, ("pages.per_request=1",), 4096, 72),
        (L4, ("model.kv_cache_dtype=fp8",), 5120, 56),
        (T4, (), 5120, 8),
        (L4, ("model.tensor_parallel_size=2",), 5120, 72),
        (None, (), None, 64),
    ],
)
def test_limits_follow_from_gpu_and_pages(
    workspace: Workspace, memory: int | None, settings: tuple[str, ...], step: int | None, sequences: int
) -> None:
    assert compute_limits(make_job(workspace, *settings), memory, SEVEN) == VLLMLimits(step, sequences, 0.0)


def test_what_the_job_says_stays(workspace: Workspace) -> None:
    said = ("model.max_num_seqs=7", "model.max_num_batched_tokens=999", "model.mm_processor_cache_gb=0.5")
    assert compute_limits(make_job(workspace, *said), H100, SEVEN) == VLLMLimits(999, 7, 0.5)


def test_a_model_whose_numbers_are_not_known_has_the_default(workspace: Workspace) -> None:
    assert compute_limits(make_job(workspace), H100, {}).max_num_seqs == compute_limits(make_job(workspace), H100, None).max_num_seqs == 64


def test_a_token_of_7b_takes_56_kib() -> None:
    assert (count_token_bytes(SEVEN, False), count_token_bytes(SEVEN, True)) == (57_344, 28_672)


def test_a_resolved_job_carries_its_limits_to_vllm(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(workspace, "model.engine_args={max_num_batched_tokens: 3000}")
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    monkeypatch.setattr(engines, "read_gpu_memory", lambda: (H100, L4))
    monkeypatch.setattr(engines, "read_model_file", lambda *_, **__: SEVEN)
    resolved = engines.resolve_engine(job, 2.0)
    wanted: dict[str, Any] = {
        "max_num_seqs": 24,
        "mm_processor_cache_gb": 0.0,
        "max_num_batched_tokens": 3000,
    }
    assert wanted.items() <= launch.collect_arguments(resolved).items()
    assert resolved.fingerprint == job.fingerprint


def test_check_describes_them(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "read_gpu_memory", lambda: (H100,))
    monkeypatch.setattr(limits, "read_model_file", lambda *_, **__: SEVEN)
    found = limits.describe_engine(make_job(workspace))
    assert found["vllm"] == {"max_num_batched_tokens": 8192, "max_num_seqs": 184, "mm_processor_cache_gb": 0.0}
    assert found["misfit"] is None
