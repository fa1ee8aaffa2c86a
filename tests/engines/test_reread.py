"""The engine `transformers` answers both questions of rereading: on checkpoints of random weights it just holds, and nobody agrees."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline import engines, schema
from pipeline.engines.model_files import find_box_units
from pipeline.evidence.readings import list_unwitnessed_values
from pipeline.stages.ask import AskStage
from pipeline.stages.reread import PagePart
from tests.engines.test_load_engine import PAGE
from tests.support import tiny_checkpoint
from tests.support.requests import make_noise
from tests.support.stages import Row
from tests.support.workspace import Workspace

UNITS = {"qwen2_vl": "thousandths", "qwen2_5_vl": "pixels", "qwen3_vl": "thousandths"}
VALUE = {"currency": "EUR", "total": 19.99, "lines": [{"amount": 4.5}]}


@pytest.mark.parametrize("family", UNITS)
def test_a_random_model_of_each_family_names_places_and_reads_parts(family: str, tmp_path: Path, workspace: Workspace) -> None:
    folder = tiny_checkpoint.build_checkpoint(tmp_path / "model", family=family)
    settings = ("model.without_gpu=cpu", "evidence.model=on", "evidence.text=off", "sampling.max_tokens=400", "pages.max_pixels=300000")
    job = engines.resolve_engine(workspace.job(f"model.name={folder}", *settings), 0.0)
    assert find_box_units(job) == (UNITS[family], "checkpoint")
    page: Row = {**PAGE, "text_layer": None}
    row: Row = {
        "key": "k", "doc_id": "d", "first_page": 1, "last_page": 1, "page_count": 1, "attempt": 1, "pages": [page],
        "pixels": [make_noise(1, 448, 448)],
    }  # fmt: skip
    engine = engines.load_engine(job, threads=1)
    try:
        stage = AskStage(job, engine)
        assert stage.rereader
        located, *_ = asyncio.run(stage.rereader.reread_values(row, VALUE))  # type: ignore[arg-type]
        (total, amount) = list_unwitnessed_values(job.schema, VALUE, [])
        parts = [PagePart(one, 1, (0.0, 0.0, 20.0, 10.0), np.zeros((448, 448, 3), np.uint8)) for one in (total, amount)]
        read = asyncio.run(stage.rereader.ask_readings(row, 1, parts))  # type: ignore[arg-type]
    finally:
        engine.close()
    places = schema.parse_json(located["answer"] or "")
    assert (located["status"], list(places), located["asks"]) == ("extracted", ["1", "2"], 1)
    largest = 448 if family == "qwen2_5_vl" else 1000
    assert all(0 <= number <= largest for place in places.values() if place for number in place["bbox_2d"])
    if read["status"] == "extracted":
        assert list(json.loads(read["answer"] or "")) == ["1", "2"]
    else:  # a random text may not end in time
        assert read["failure"]
        assert read["failure"]["kind"] == "length"
    assert read["asks"] == 1
