"""The notebook runs from top to bottom over records as `settle` writes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pyarrow as pa
import pytest
from nbclient import NotebookClient

from pipeline.budget import RenderSettings
from pipeline.demo import samples
from pipeline.demo.truth import format_answer
from pipeline.evidence.text_layer import pack_words
from pipeline.job import Job
from pipeline.output.shards import write_shard
from pipeline.render.document import render_pages
from pipeline.stages.render import describe_page
from pipeline.stages.requests import compute_document_keys
from pipeline.storage import store
from tests.support.stages import make_settle_stage

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks/query_records.ipynb"
TRUTH = samples.read_truth(ROOT / "jobs/samples/truth/invoices.jsonl")


def write_records(folder: Path, *, good: bool = False) -> None:
    """Settle a ledger made by hand: the samples read perfectly, and unless all is good one invalid and one failed."""
    job = Job.load(ROOT / "jobs/invoices.yaml").with_demo()
    answers = {name: {"status": "extracted", "answer": format_answer(record)} for name, record in TRUTH.items()}
    if not good:
        answers["torn.pdf"] = {"status": "invalid", "answer": '{"total":1.234}', "errors": ["$.total: 1.234 is not a multiple of 0.01"]}
        answers["lost.pdf"] = {"status": "failed", "failure": {"stage": "render", "kind": "broken", "message": "the PDF cannot be opened"}}
    listed = [{"source": name, "size_bytes": 1, "version": "1", "doc_id": f"id of {name}", "page_count": 1} for name in answers]
    ledger = [request(job, document, answers[document["source"]]) for document in listed]
    table = make_settle_stage(job, pa.schema([])).build_table(listed, ledger)
    folder.mkdir()
    write_shard(store.FolderStore(folder), table, answers)


def request(job: Job, document: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    (key,) = compute_document_keys(document, job.pages_per_request, job.fingerprint)
    file, pages = ROOT / "jobs/samples/invoices" / document["source"], []
    if file.exists():
        drawn = render_pages(file.read_bytes(), RenderSettings(text_layer=True))
        pages = [{**describe_page(page), "text_layer": pack_words(page)} for page in drawn]
    return {"key": key, "attempt": 1, "asks": 1, "errors": [], "model": "demo", "engine": "transformers", "pages": pages, **answer}


def outputs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the notebook and return all that its cells show, as text."""
    monkeypatch.setenv("PIPELINE_RECORDS", str(folder))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder.parent)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output.text for output in shown if output.get("name") == "stderr"] == []
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in shown)


def test_it_runs_and_shows_records_totals_and_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path / "records")
    text = outputs(tmp_path / "records", monkeypatch)
    assert f"{len(TRUTH) + 2} documents in" in text
    assert re.search(r"invoice_date: date32", text)
    assert re.search(rf"extracted +{len(TRUTH)}", text)
    assert "the PDF cannot be opened" in text
    assert re.search(r"render +broken +1", text)
    assert re.search(r"^exact +text +\d\d", text, re.MULTILINE)


def test_it_runs_where_nothing_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path / "records", good=True)
    assert f"{len(TRUTH)} documents in" in outputs(tmp_path / "records", monkeypatch)


def test_it_is_stored_without_outputs() -> None:
    code = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
