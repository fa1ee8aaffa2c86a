"""`benchmarks/gpu.py --small` on a CPU: a table, every check that needs no GPU, and an exit code that follows from them."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.engines import checkpoint
from pipeline.engines import transformers as engine_module
from pipeline.engines.choice import count_weight_bytes
from pipeline.engines.transformers import load
from pipeline.engines.transformers.replay import PassReplays

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module
    spec.loader.exec_module(module)
    return module


def test_the_small_benchmark_runs_on_a_cpu() -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--small", "--pages", "4", "--engines", "transformers"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stdout.splitlines()[-1:]) == (0, ["passed"]), ended.stdout + ended.stderr
    assert len(re.findall(r"^transformers +fp32 +– +\d", ended.stdout, re.MULTILINE)) == 4
    assert re.search(r"step times .*vision .* prefill .* decode .* mask .* host ", ended.stdout)
    checked = re.findall(r"^pass  (.+?): ", ended.stdout, re.MULTILINE)
    assert {"memory runs out (injected)", "an injected CUDA error", "AWQ against plain weights", "transformers"} <= {*checked}
    assert re.search(r"pass  shapes of graphs: replayed steps as computed: (\d+) of \1 steps bit for bit, 0 of", ended.stdout)
    assert re.search(r"pass  shapes of graphs: answers with them equal those without: 12 of 12 answers", ended.stdout)
    assert "FAIL" not in ended.stdout


def test_with_graphs_it_measures_both_ways(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines that a GPU alone prints, from an engine that replays by computing again."""
    monkeypatch.setattr(engine_module, "make_replays", lambda *_: PassReplays(gpu.make_repeating_recorder))
    monkeypatch.setattr(gpu, "check_memory_recovery", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--pages", "4", "--batches", "2", "--engines", "transformers"])
    assert gpu.main() == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^transformers +fp32", printed, re.MULTILINE)) == 3  # one page a request: without and with
    assert re.search(r"graphs \(fp32\): [1-9]\d* captured in [\d.]+ s, [1-9]\d* steps replayed", printed)
    assert len(re.findall(r"step times \(fp32", printed)) == 2


def test_a_check_that_fails_decides_the_exit_code(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "check_packed_layers", lambda checks, *_: checks.note("AWQ against plain weights", False, "all wrong"))
    monkeypatch.setitem(gpu.MODELS, "small", {**gpu.MODELS["small"], "batches": (2,), "per_request": (1,)})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--pages", "2", "--engines", "transformers"])
    assert gpu.main() == 1


def test_its_7b_model_is_the_published_one(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are not drawn: the shapes in the headers are what a checkpoint is checked by."""
    headers: dict[str, tuple[int, ...]] = {}
    monkeypatch.setattr(gpu, "save_file", lambda tensors, *_: headers.update({name: tuple(t.shape) for name, t in tensors.items()}))
    shape = {**gpu.MODELS["7b"], "text": {**gpu.MODELS["7b"]["text"], "num_hidden_layers": 1}}
    monkeypatch.setattr(gpu, "draw_weights", record_shapes)
    gpu.write_checkpoint(tmp_path, shape)
    monkeypatch.setattr(load.checkpoint_files, "read_tensor_shapes", lambda _: headers)
    load.check_shapes(tmp_path, checkpoint.load_config(tmp_path, None), quantized=True)
    whole = json.loads((tmp_path / "config.json").read_text())
    whole["text_config"]["num_hidden_layers"] = 28
    assert count_weight_bytes(whole).unpacked == pytest.approx(16.6e9, rel=0.005)
    shared = ROOT.parent / "shared" / "qwen2.5-vl-7b-awq" / "config.json"
    if shared.is_file():
        published = json.loads(shared.read_text())
        assert {key: whole["text_config"][key] for key in LANGUAGE} == {key: published[key] for key in LANGUAGE}
        assert whole["quantization_config"] == published["quantization_config"]


LANGUAGE = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def record_shapes(name: str, shape: tuple[int, ...], generator: Any) -> dict[str, Any]:
    """Return tensors of the shapes that the benchmark's own would have, without memory."""
    import torch

    if not name.startswith("model.layers.") or len(shape) == 1:
        return {name: torch.empty(shape, device="meta")}
    outputs, inputs = shape
    sizes = {"qweight": (inputs, outputs // 8), "qzeros": (inputs // 128, outputs // 8), "scales": (inputs // 128, outputs)}
    return {f"{name.removesuffix('.weight')}.{kind}": torch.empty(size, device="meta") for kind, size in sizes.items()}
