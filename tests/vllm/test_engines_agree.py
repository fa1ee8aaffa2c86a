"""One job over the same documents with every installed engine: where their answers are the same, so are their records.

The engine `openai` asks a real server of the same weights: vLLM's where vLLM is installed, else transformers' own. That one reads no AWQ
folder, so all engines then have the weights as autoawq unpacks them; and it takes no schema: the model writes what it likes.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from pipeline import flow
from pipeline.engines import checkpoint
from pipeline.engines.model_files import DEMO_CHECKPOINT
from pipeline.engines.transformers import awq
from pipeline.job import Job
from tests.support.chat_server import serve_chat

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports cause many, none of them by this package
JOB = Path(__file__).parents[2] / "jobs" / "invoices.yaml"
DOCUMENTS = 6
HAS_VLLM = find_spec("vllm") is not None
SERVE = which("transformers", path=str(Path(sys.executable).parent)) if find_spec("uvicorn") else None
SETTINGS = {
    "transformers": ["model.without_gpu=cpu"],
    "vllm": ["model.enforce_eager=true", "model.max_num_seqs=16", "model.engine_args={kv_cache_memory_bytes: 1073741824}"],
    "openai": ["model.structure=json_schema", "model.logprobs=" + str(HAS_VLLM).lower()],
}
OTHERS = [
    pytest.param("vllm", marks=pytest.mark.skipif(not HAS_VLLM, reason="needs vLLM")),
    pytest.param("openai", marks=pytest.mark.skipif(not (find_spec("httpx2") and (HAS_VLLM or SERVE)), reason="needs a server")),
]
Rows = dict[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class RunOutput:
    """The ledger rows and records that a run wrote."""

    engine: str
    ledger: Rows
    records: Rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model.name of all engines: the demonstration model, or a folder with its weights unpacked."""
    return "demo" if HAS_VLLM else str(write_unpacked(tmp_path_factory.mktemp("plain")))


def write_unpacked(folder: Path) -> Path:
    """Write the demonstration model without its quantization."""
    for file in DEMO_CHECKPOINT.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    awq.load_awq_model(DEMO_CHECKPOINT, checkpoint.load_config(DEMO_CHECKPOINT, None), torch.float32, torch.device("cpu")).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def address(request: pytest.FixtureRequest, model: str) -> Iterator[str]:
    """The address of a server of the model."""
    if HAS_VLLM:
        yield request.getfixturevalue("vllm_server")
        return
    with serve_chat(str(SERVE), "serve", model, "--device", "cpu", "--dtype", "float32", OMP_NUM_THREADS="1") as found:
        yield found


def run_job(engine: str, model: str, folder: Path, *settings: str) -> RunOutput:
    flow.run(Job.load(JOB, [f"model.engine={engine}", f"model.name={model}", *SETTINGS[engine], *settings], folder), limit=DOCUMENTS)
    return RunOutput(engine, read_rows(folder / "requests", "source", "first_page"), read_rows(folder / "records", "_source"))


def read_rows(folder: Path, *names: str) -> Rows:
    """Return a table's rows by the values of these columns."""
    return {tuple(row[name] for name in names): row for row in pq.read_table(folder).to_pylist()}


@pytest.fixture(scope="module")
def first(ray_session: object, model: str, tmp_path_factory: pytest.TempPathFactory) -> RunOutput:
    """The run with which the others are compared."""
    return run_job("transformers", model, tmp_path_factory.mktemp("transformers") / "out")


@pytest.fixture(scope="module", params=OTHERS)
def other(request: pytest.FixtureRequest, first: RunOutput, model: str, tmp_path_factory: pytest.TempPathFactory) -> RunOutput:
    settings = [f"model.base_url={request.getfixturevalue('address')}"] if request.param == "openai" else []
    return run_job(request.param, model, tmp_path_factory.mktemp(request.param) / "out", *settings)


def test_all_ask_the_same_and_most_answers_agree(first: RunOutput, other: RunOutput) -> None:
    assert {row["engine"] for row in other.ledger.values()} == {other.engine} != {first.engine}
    assert first.ledger.keys() == other.ledger.keys()
    same = [key for key, row in first.ledger.items() if extract_answer(row) == extract_answer(other.ledger[key])]
    assert len(same) > len(first.ledger) / 2


def test_records_agree_wherever_the_answers_do(first: RunOutput, other: RunOutput) -> None:
    differ = {
        source
        for (source, _), row in first.ledger.items()
        if extract_answer(row) != extract_answer(other.ledger[source, row["first_page"]])
    }
    for (source,), record in first.records.items():
        if source not in differ:
            assert drop_engine(other.records[source,]) == drop_engine(record)


def extract_answer(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the status, the answer and the number of asks of a ledger row."""
    return row["status"], row["answer"], row["asks"]


def drop_engine(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without what names the engine, and what follows from its log-probabilities, which vLLM takes among allowed tokens."""
    return {name: value for name, value in record.items() if name not in ("_engine", "_confidence", "_least_confidence")}
