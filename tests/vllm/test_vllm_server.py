"""vLLM's own server with the demonstration model, on the CPU: the same job through it and through the engine `transformers`."""

from __future__ import annotations

import asyncio
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import flow
from pipeline.engines.openai import OpenAIEngine
from pipeline.engines.openai.chat import ServerProfile
from pipeline.engines.openai.client import RetryPolicy
from pipeline.errors import DocumentError
from pipeline.job import Job
from pipeline.records import Request, Sampling
from pipeline.schema import prompt

pytestmark = [pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM"), pytest.mark.filterwarnings("ignore")]
JOB = Path(__file__).parents[2] / "jobs" / "invoices.yaml"
Rows = dict[tuple[Any, ...], dict[str, Any]]
Pairs = list[tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def outputs(vllm_server: str, ray_session: object, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of two runs over the sample invoices, by engine: `openai` with the server, and `transformers`."""
    settings = {"openai": [f"model.base_url={vllm_server}", "model.name=auto"], "transformers": ["model.name=demo"]}
    folder = tmp_path_factory.mktemp("out")
    for engine, given in settings.items():
        flow.run(Job.load(JOB, [f"model.engine={engine}", *given], folder / engine))
    return {engine: folder / engine for engine in settings}


def read_rows(folder: Path, *names: str) -> Rows:
    """Return a table's rows by the values of these columns."""
    return {tuple(row[name] for name in names): row for row in pq.read_table(folder).to_pylist()}


@pytest.fixture(scope="module")
def asked(outputs: dict[str, Path]) -> Pairs:
    """Each request's ledger row, of the server and of the engine `transformers`."""
    by_server, here = (read_rows(outputs[engine] / "requests", "source", "first_page") for engine in ("openai", "transformers"))
    assert len(by_server) >= 12
    assert by_server.keys() == here.keys()
    return [(by_server[key], here[key]) for key in by_server]


def test_vllm_is_recognized_by_its_list_of_models(outputs: dict[str, Path]) -> None:
    found = yaml.safe_load((outputs["openai"] / "job.yaml").read_text())
    model = found["job"]["model"]
    assert [model[key] for key in ("name", "server", "structure", "logprobs")] == ["demo", "vllm", "json_schema", True]
    assert "httpx2" in found["versions"]


def test_no_page_is_resampled(asked: Pairs) -> None:
    """A resampled page would have another number of visual tokens, and the prompt another number of tokens."""
    once = [(served, here) for served, here in asked if served["asks"] == here["asks"] == 1]
    assert len(once) >= 8
    assert [served["prompt_tokens"] for served, _ in once] == [here["prompt_tokens"] for _, here in once]


def test_a_schema_that_cannot_constrain_fails_at_once(vllm_server: str) -> None:
    """The server reports it in the stream, after the status 200."""
    asked = Request(
        "k", prompt.build_messages("Read.", [np.zeros((448, 448, 3), np.uint8)]), '{"$ref": "elsewhere.json"}', Sampling(max_tokens=8)
    )
    engine = OpenAIEngine(vllm_server, ServerProfile("demo", "json_schema", vllm=True), RetryPolicy())
    with closing(engine), pytest.raises(DocumentError, match="the server answers 400") as refused:
        asyncio.run(engine.complete(asked))
    assert refused.value.kind == "refused"


def test_log_probabilities_spell_the_answers(asked: Pairs) -> None:
    for served, _ in asked:
        assert "".join(token["text"] for token in served["tokens"]) == served["answer"]
        assert all(token["logprob"] <= 0 for token in served["tokens"])
