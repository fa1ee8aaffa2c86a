"""The engine `openai` and real servers: `transformers serve` with a tiny random checkpoint, and a simulator of vLLM's server."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from shutil import which

import pytest
from jsonschema import Draft202012Validator

from pipeline import engines
from pipeline.errors import JobError
from tests.support import tiny_checkpoint
from tests.support.chat_server import serve_chat
from tests.support.openai_requests import make_openai_job, make_request
from tests.support.workspace import SCHEMA, Workspace


@pytest.fixture(scope="module")
def transformers_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """transformers' own server with a tiny random checkpoint on the CPU: its address and its model."""
    folder = tiny_checkpoint.build_checkpoint(tmp_path_factory.mktemp("served"))
    with serve_chat(str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--device", "cpu") as address:
        yield address, str(folder)


@pytest.mark.skipif(which("xpyd-sim") is None, reason="needs xpyd-sim 0.5.0 on the PATH, a simulator of vLLM's server")
def test_a_simulator_of_vllms_server_accepts_the_requests(workspace: Workspace) -> None:
    with serve_chat("xpyd-sim", "serve", "--model", "sim") as address:
        chosen = engines.resolve_engine(workspace.job("model.engine=openai", f"model.base_url={address}", "model.name=auto"), 0.0)
        with closing(engines.load_engine(chosen)) as engine:
            answer = asyncio.run(engine.complete(make_request(pages=3)))
    assert (chosen.sections.model.name, chosen.sections.model.structure) == ("sim", "json_schema")
    assert Draft202012Validator(SCHEMA).is_valid(json.loads(answer.text))


def test_transformers_serve_is_a_server_without_structure(workspace: Workspace, transformers_server: tuple[str, str]) -> None:
    address, model = transformers_server
    chosen = engines.resolve_engine(make_openai_job(workspace, address, f"model.name={model}"), 0.0)
    assert (chosen.sections.model.server, chosen.sections.model.structure) == ("other", "prompt")


def test_transformers_serve_reads_pages_and_counts_their_tokens(workspace: Workspace, transformers_server: tuple[str, str]) -> None:
    address, model = transformers_server
    given = make_openai_job(
        workspace, address, f"model.name={model}", "model.structure=prompt", "model.server=other", "model.logprobs=false"
    )
    with closing(engines.load_engine(given)) as engine:
        one, two = (asyncio.run(engine.complete(make_request(0, "", pages=pages, max_tokens=8))) for pages in (1, 2))
    assert two.usage.prompt_tokens - one.usage.prompt_tokens == 2 * 3 + len(("<|vision_start|>", "<|vision_end|>"))
    assert one.usage.completion_tokens <= 8


def test_transformers_serve_refuses_unknown_sampling_keys(workspace: Workspace, transformers_server: tuple[str, str]) -> None:
    address, model = transformers_server
    with pytest.raises(JobError, match=r"answers 422: Unexpected fields in the request: \{'top_k'\}"):
        engines.resolve_engine(make_openai_job(workspace, address, f"model.name={model}", "sampling.top_k=5"), 0.0)
