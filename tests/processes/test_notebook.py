"""The notebooks run from top to bottom over records as `settle` writes them; progress is shown in a notebook."""

from __future__ import annotations

import json
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
from pipeline.flow.passes import settle
from pipeline.flow.preparation import describe_run
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.shards import write_shard
from pipeline.output.sources import SOURCE_SCHEMA, write_sources
from pipeline.render.document import render_pages
from pipeline.stages.render import describe_page
from pipeline.stages.requests import compute_document_keys
from pipeline.storage import store
from tests.support.ledger import LedgerWriter
from tests.support.scored import make_tokens
from tests.support.stages import make_settle_stage

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
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


def settle_samples(folder: Path, wrong: dict[str, Any] | None = None) -> Path:
    """Settle an output whose samples were read perfectly, apart from what is wrong in the first and from one failed document; return it."""
    job = Job.load(ROOT / "jobs/invoices.yaml", [f"output.path={folder}"]).with_demo()
    output = Output(job.output)
    output.create()
    output.write_job(describe_run(job))
    answers = {name: format_answer(record) for name, record in TRUTH.items()}
    first = min(answers)
    answers[first] = json.dumps(json.loads(answers[first]) | (wrong or {}))
    listed = [{"source": name, "size_bytes": 1, "version": "1", "doc_id": name, "page_count": 1} for name in (*answers, "lost.pdf")]
    write_sources(output, pa.Table.from_pylist(listed, SOURCE_SCHEMA))
    with LedgerWriter(output) as ledger:
        for number, document in enumerate(listed):
            if answer := answers.get(document["source"]):
                tokens = make_tokens(answer, dict.fromkeys(("$.total", "$.seller_name"), -1.5 + 0.1 * number))
                given = {"status": "extracted", "answer": answer, "tokens": tokens}
            else:
                given = {"status": "failed", "failure": {"stage": "render", "kind": "broken", "message": "the PDF cannot be opened"}}
            ledger.add({**document, "first_page": 1, "last_page": 1, **request(job, document, given)})
    settle(job)
    return folder


def run_notebook(name: str, folder: Path) -> str:
    """Run a notebook in a folder and return all that its cells show, as text."""
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output.text for output in shown if output.get("name") == "stderr"] == []
    assert len([output for output in shown if "image/png" in output.get("data", {})]) == 1
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in shown)


def outputs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the notebook that queries records, and return all that its cells show."""
    monkeypatch.setenv("PIPELINE_RECORDS", str(folder))
    return run_notebook("query_records", folder.parent)


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


def test_doubtful_values_come_with_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_OUTPUT", str(settle_samples(tmp_path / "out", {"total": 4711.0})))
    text = run_notebook("review_confidence", tmp_path)
    assert f"{len(TRUTH) + 1} records in" in text
    assert re.search(r"invoice-01.pdf +\$\.total +4711", text)
    assert re.search(rf"^total +{len(TRUTH)} ", text, re.MULTILINE)
    assert re.search(r"invoice-01.pdf +total_without_tax", text)


def test_two_runs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_OUTPUT_A", str(settle_samples(tmp_path / "a")))
    monkeypatch.setenv("PIPELINE_OUTPUT_B", str(settle_samples(tmp_path / "b", {"total": 4711.0, "seller_name": None})))
    monkeypatch.setenv("PIPELINE_TRUTH", str(ROOT / "jobs/samples/truth/invoices.jsonl"))
    text = run_notebook("compare_runs", tmp_path)
    assert re.search(rf"^total +{len(TRUTH)} +1 +0 +0", text, re.MULTILINE)
    assert re.search(rf"^seller_name +{len(TRUTH)} +0 +1 +0", text, re.MULTILINE)
    assert "'difference_points': -" in text
    assert re.search(r"records that break rules +0\.0+ +1\.0+", text)


def test_progress_is_one_output_that_is_replaced(tmp_path: Path) -> None:
    code = """
from pipeline import show_progress
from pipeline.report import Phase, Progress
with show_progress() as shown:
    shown.update(Progress(Phase.LISTING, 40, 40, 0, 0, 0, 1.0))
    shown.print("a message")
    for done in range(41):
        shown.update(Progress(Phase.ASKING, 40, done, done, done, int(done > 30), 2.0, {"render/broken": 1}, 0.5))
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    (output,) = notebook.cells[0].outputs
    lines = output["data"]["text/plain"].splitlines()
    assert [re.sub(r" +\d\.\d s", "", line).rstrip() for line in lines if line.strip()] == [
        "a message",
        "listing  40 documents",
        "asking  40/40 documents, 40 pages, 20.0 pages/s, 1 failed (render/broken), engine busy 50 %",
    ]
    assert "40/40 documents" in output["data"]["text/html"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_is_stored_without_outputs(file: Path) -> None:
    code = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
