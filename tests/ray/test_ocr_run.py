"""Runs with OCR on Ray: pages are read after the asking, once, and their words witness the values; what fails costs no answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import flow
from pipeline.engines import Engine
from pipeline.flow import ask_pass
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.words import read_word_keys
from pipeline.report import Report
from tests.support.engines import VALID, ScriptedEngine, make_completion
from tests.support.ray_actors import InkActor
from tests.support.scans import forge_slip, print_slip, scan_slip
from tests.support.workspace import Workspace

pytestmark = pytest.mark.usefixtures("ray_session")
pytest.importorskip("rapidocr")


class SlipActor(InkActor):
    def load(self, job: Job, threads: int) -> Engine:
        return ScriptedEngine(make_completion(VALID))


@pytest.fixture
def slips(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A job of a printed and a scanned slip, whose engine reads 19.99 EUR."""
    monkeypatch.setattr(ask_pass, "EngineActor", SlipActor)
    workspace.put("printed.pdf", print_slip())
    workspace.put("scan.png", scan_slip())
    return workspace


def run(workspace: Workspace, mode: str, **options: Any) -> tuple[Report, dict[str, set[str | None]]]:
    """Run a job with a mode of OCR; return its report, and who witnesses the values of each document."""
    report = flow.run(workspace.job(f"evidence.ocr={mode}"), **options)
    rows = pq.read_table(workspace.folder / "out/records").to_pylist()
    return report, {Path(row["_source"]).name: {found["witness"] for found in row["_evidence"] or []} for row in rows}


def test_ocr_can_be_switched_on_later_and_reads_each_page_once(slips: Workspace) -> None:
    report, witnesses = run(slips, "off")
    assert (report.requests_asked, witnesses) == (2, {"printed.pdf": {"text"}, "scan.png": set()})
    report, witnesses = run(slips, "scans")
    assert (report.requests_asked, report.ocr_pages, report.ocr_failed) == (0, 1, 0)
    assert witnesses == {"printed.pdf": {"text"}, "scan.png": {"ocr"}}
    report, _ = run(slips, "scans")
    assert (report.requests_asked, report.ocr_pages) == (0, 0)
    report, witnesses = run(slips, "all")
    assert (report.requests_asked, report.ocr_pages) == (0, 1)
    assert witnesses == {"printed.pdf": {"text"}, "scan.png": {"ocr"}}


def test_only_doubtful_documents_are_read_under_doubtful(slips: Workspace) -> None:
    slips.put("wrong.pdf", print_slip("BT /F 24 Tf 60 400 Td (Slip of the tea house, nothing due) Tj ET"))
    report, witnesses = run(slips, "doubtful")
    keys = read_word_keys(Output(slips.job().output))
    assert (report.ocr_pages, keys.num_rows, keys["status"].to_pylist()) == (1, 1, ["read"])
    assert witnesses["scan.png"] == set()  # nothing doubts it: it has no witness and no log-probabilities


def test_a_text_layer_that_shows_another_value_than_the_pixels_is_an_alert(slips: Workspace) -> None:
    slips.put("forged.pdf", forge_slip())
    run(slips, "scans")
    rows = pq.read_table(slips.folder / "out/records").to_pylist()
    alerts = {Path(row["_source"]).name: [(a["kind"], a["path"], a["text"]) for a in row["_alerts"] or []] for row in rows}
    assert alerts == {"printed.pdf": [], "scan.png": [], "forged.pdf": [("different_text", "$.total", "11.11")]}


def test_a_file_that_is_gone_costs_its_words_alone(slips: Workspace) -> None:
    run(slips, "off")
    (slips.inputs / "scan.png").write_bytes(b"not a picture any more")
    report = flow.run(slips.job("evidence.ocr=scans", "source.relist=never"))
    assert (report.ocr_pages, report.ocr_failed) == (0, 1)
    assert report.ocr_problem.startswith("source/")
    assert report.statuses == {"extracted": 2}
