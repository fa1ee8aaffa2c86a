"""Errors travel between processes: what they were built from arrives."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from pipeline.errors import DamagedShard, DocumentError, EngineDead, JobError, PipelineError, RunError, SourceError

ERRORS = [
    JobError("model.engine is 'x'", Path("/data/job.yaml"), "model.engine"),
    SourceError("no files", key="source.paths"),
    JobError("wrong"),
    DocumentError("empty", "no bytes"),
    RunError("full disk"),
    EngineDead("no GPU"),
    DamagedShard("/out/a.parquet", "it is cut"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling(error: PipelineError) -> None:
    read = pickle.loads(pickle.dumps(error))
    assert (type(read), str(read), read.file, read.key) == (type(error), str(error), error.file, error.key)


def test_a_path_becomes_text() -> None:
    assert (ERRORS[0].file, ERRORS[0].key, str(ERRORS[0])) == ("/data/job.yaml", "model.engine", "model.engine is 'x'")


def test_what_is_not_known_is_none() -> None:
    assert (ERRORS[2].file, ERRORS[2].key, ERRORS[4].file) == (None, None, None)
