"""Models that `load_engine` loads: the demonstration model, with the job's limit of tokens, and a checkpoint in an object store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from pipeline import engines
from pipeline.engines import model_cache
from pipeline.job import Job
from pipeline.stages.ask import AskStage
from tests.support import s3, tiny_checkpoint
from tests.support.stages import Row
from tests.support.workspace import Workspace

PAGE = {"page_no": 1, "width_px": 448, "height_px": 448, "dpi": 200.0, "visual_tokens": 256, "warnings": []}


def ask_black_page(job: Job) -> Row:
    """Load the job's engine and return the row of one request about a black page."""
    engine = engines.load_engine(job, threads=1)
    row: Row = {
        "key": "k",
        "first_page": 1,
        "last_page": 1,
        "page_count": 1,
        "pages": [PAGE],
        "pixels": [np.zeros((448, 448, 3), np.uint8)],
        "attempt": 1,
    }
    try:
        return asyncio.run(AskStage(job, engine).answer_row(row | {"pixels": [np.zeros((448, 448, 3), np.uint8)]}))
    finally:
        engine.close()


def test_the_jobs_limit_of_tokens_reaches_the_engine_and_no_key(workspace: Workspace) -> None:
    job = workspace.job("limits.max_request_tokens=300")
    row = ask_black_page(job)
    assert (row["failure"]["kind"], row["asks"]) == ("too_long", 0)
    assert "limits.max_request_tokens allows 300: lower pages.per_request" in row["failure"]["message"]
    assert job.fingerprint == workspace.job().fingerprint


def test_a_checkpoint_in_s3_answers(workspace: Workspace, bucket: s3.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(model_cache.CACHE_ENV, str(tmp_path / "cache"))
    monkeypatch.delenv(model_cache.OFFLINE_ENV, raising=False)
    for file in tiny_checkpoint.build_checkpoint(tmp_path / "built").iterdir():
        bucket.put(f"{tmp_path.name}/tiny/{file.name}", file.read_bytes())
    url = bucket.url(f"{tmp_path.name}/tiny")
    chosen = engines.resolve_engine(workspace.job(f"model.name={url}", "model.without_gpu=cpu"), 0.0)
    row = ask_black_page(chosen)
    assert (row["model"], row["status"]) == (chosen.sections.model.name, "extracted")


def test_a_job_without_log_probabilities_keeps_none(workspace: Workspace) -> None:
    kept, spared = (ask_black_page(workspace.job(*settings)) for settings in ((), ("model.logprobs=false",)))
    assert spared["answer"] == kept["answer"]
    assert (spared["tokens"], len(kept["tokens"]) > 0) == ([], True)
