"""The model families in vLLM on tiny random checkpoints: the answers are those of the engine `transformers`, with adapter and YaRN too."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipeline.engines import Engine
from pipeline.engines.transformers import TransformersEngine
from pipeline.records import Request, Sampling
from pipeline.schema import prompt
from tests.engines.test_families import add_adapter
from tests.support import tiny_checkpoint
from tests.support.requests import answer_and_close, make_noise
from tests.support.tiny_checkpoint import FAMILIES

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # vLLM's imports cause many, none of them by this package
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM"),
]
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def load(folder: Path, family: str, **given: Any) -> Engine:
    """Load vLLM's engine with little memory, for pages of any size up to 64 visual tokens."""
    from pipeline.engines.vllm import VLLMEngine

    cell = FAMILIES[family] ** 2
    arguments = {
        "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**28, "max_num_seqs": 8, "max_num_batched_tokens": 2048,
        "limit_mm_per_prompt": {"image": 2, "video": 0},
        "mm_processor_kwargs": {"size": {"shortest_edge": cell, "longest_edge": 64 * cell}},
    }  # fmt: skip
    return VLLMEngine(str(folder), arguments, threads=1, max_request_tokens=4096, **given)


def make_requests(family: str) -> list[Request]:
    """Return three requests of two pages, whose pages have names."""
    cell = FAMILIES[family]
    requests = []
    for key in range(3):
        pages = [make_noise(10 * key + at, cell * (2 + key), cell * 3) for at in range(2)]
        requests.append(
            Request(str(key), prompt.build_messages("Read.", pages), "", Sampling(max_tokens=16), tuple(f"{key}/{at}" for at in range(2)))
        )
    return requests


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.build_checkpoint(tmp_path_factory.mktemp(family), family=family)


@pytest.fixture(scope="module")
def plain(folder: Path, family: str) -> list[str]:
    """The answers of the engine `transformers`, without adapter and YaRN."""
    return answer_and_close(TransformersEngine(str(folder), threads=1), *make_requests(family))


def test_answers_agree_and_pages_are_known_by_their_names(folder: Path, family: str, plain: list[str]) -> None:
    """The last request has the names of the first one's pages and other pixels: vLLM answers about what it keeps under these names."""
    requests = make_requests(family)
    other = [255 - part if not isinstance(part, str) else part for part in requests[0].messages[-1].parts]
    lie = replace(requests[0], key="lie", messages=(*requests[0].messages[:-1], replace(requests[0].messages[-1], parts=tuple(other))))
    engine = load(folder, family)

    async def gather() -> list[str]:
        first = [completion.text for completion in await asyncio.gather(*map(engine.complete, requests))]
        return [*first, (await engine.complete(lie)).text, (await engine.complete(replace(lie, page_ids=()))).text]

    try:
        *answers, kept, hashed = asyncio.run(gather())
    finally:
        engine.close()
    assert answers == plain
    assert kept == answers[0] != hashed


@pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
def test_an_adapter_and_yarn_change_the_answers_in_both_engines_alike(folder: Path, family: str, plain: list[str], tmp_path: Path) -> None:
    adapter, requests = add_adapter(folder, tmp_path / "adapter"), make_requests(family)
    adapted = answer_and_close(TransformersEngine(str(folder), threads=1, lora=adapter), *requests)
    assert adapted != plain
    assert answer_and_close(load(folder, family, lora=adapter), *requests) == adapted
    stretched = answer_and_close(TransformersEngine(str(folder), threads=1, rope_scaling=YARN), *requests)
    assert stretched != plain
    assert answer_and_close(load(folder, family, rope_scaling=YARN), *requests) == stretched
