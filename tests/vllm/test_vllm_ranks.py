"""Models that vLLM splits over two ranks: the job's keys start two worker processes, and their answers are those of one process.

vLLM's build for CPUs has no GPUs to split a model over, and takes processes. It makes the buffer between two groups of layers where it
compiles the model, and only there (`warming_up_model` in its cpu_model_runner.py), so that pipeline-parallel ranks need a compiled start.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from pipeline import engines
from pipeline.engines.transformers import TransformersEngine
from pipeline.records import Request, Sampling
from pipeline.schema import prompt
from tests.support import tiny_checkpoint
from tests.support.requests import FLAT, answer_and_close, make_noise
from tests.support.workspace import Workspace

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # vLLM's imports cause many, none of them by this package
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM"),
]
REQUESTS = [
    Request(
        str(key), prompt.build_messages("Read.", [make_noise(key, 56 + 28 * key, 84)]), FLAT if key % 2 else "", Sampling(max_tokens=40)
    )
    for key in range(4)
]


def list_workers() -> set[psutil.Process]:
    """Return vLLM's workers among the descendants of this process."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended, as a zombie has
            if "VLLM::Worker" in " ".join(child.cmdline()):
                found.add(child)
    return found


@pytest.mark.parametrize(("split", "is_eager"), [("tensor", True), ("pipeline", False)])
def test_two_ranks_answer_as_one(split: str, is_eager: bool, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint.build_checkpoint(tmp_path)
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    if is_eager:
        monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    keys = (f"model.name={folder}", "model.without_gpu=cpu", "model.engine=vllm", f"model.{split}_parallel_size=2", "model.dtype=float32")
    small = (f"model.enforce_eager={str(is_eager).lower()}", "model.max_num_seqs=8", "model.max_model_len=1024")
    job = workspace.job(*keys, *small, "pages.min_pixels=784", "model.engine_args={kv_cache_memory_bytes: 268435456}")
    before = list_workers()  # of engines that other tests share
    engine = engines.load_engine(engines.resolve_engine(job, 0), threads=1)
    workers = list_workers() - before
    answers = answer_and_close(engine, *REQUESTS)
    assert len(workers) == 2
    assert answers == answer_and_close(TransformersEngine(str(folder), threads=1), *REQUESTS)
