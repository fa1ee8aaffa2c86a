"""Calibration from an output to its records: facts as settling knows them, a file, and confidence that follows it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.errors import JobError
from pipeline.flow.passes import settle
from pipeline.flow.preparation import describe_run
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.ledger import write_rows
from pipeline.output.records import read_record_table
from pipeline.output.shards import read_shards
from pipeline.stages.calibrate import collect_output_facts
from pipeline.stages.requests import compute_document_keys
from tests.support.scored import write_output
from tests.support.workspace import Workspace

DOCUMENTS = 40


@pytest.fixture
def job(workspace: Workspace) -> Job:
    """Return a job whose output has answers: of the totals, a quarter are wrong, and their tokens are mostly less sure."""
    rules = '[{name: line_small, expression: "lines.all(l, l.amount == null || l.amount < 100.0)", message: too large}]'
    job = workspace.job(f"extract.rules={rules}").with_demo()
    output, chance, rows, truths = Output(job.output), random.Random(4), list[Any](), list[str]()
    output.create()
    output.write_job(describe_run(job))
    for number in range(DOCUMENTS):
        is_wrong = number % 4 == 0
        total = f"{number + 1}.5"
        sureness = -chance.uniform(0.4, 3) if is_wrong else -chance.uniform(0.0, 0.7)
        pieces = [('{"currency":"EUR","total":', 0.0), (total, sureness), (',"lines":[{"amount":7}]}', 0.0)]
        listed = {"source": f"in/{number}.pdf", "size_bytes": 9, "version": "1", "doc_id": f"{number:064x}", "page_count": 1}
        (key,) = compute_document_keys(listed, job.pages_per_request, job.fingerprint)  # type: ignore[arg-type]
        about = {"key": key, "attempt": 1, "first_page": 1, "last_page": 1, "status": "extracted", "asks": 1, "model": "demo"}
        tokens = [{"text": text, "logprob": logprob, "margin": 1.0} for text, logprob in pieces]
        rows.append({**listed, **about, "answer": "".join(text for text, _ in pieces), "errors": [], "tokens": tokens, "pages": []})
        truth = {"currency": "USD" if number % 3 == 0 else "EUR", "total": 1 if is_wrong else float(total), "lines": [{"amount": 7}]}
        truths.append(json.dumps({"source": f"{number}.pdf", **truth}))
    write_rows(output, rows)
    (workspace.folder / "truth.jsonl").write_text("\n".join(truths))
    settle(job)
    return job


def run_eval(job: Job, *arguments: str) -> Any:
    folder = job.file.parent
    result = CliRunner().invoke(main, ["eval", str(job.output), "--truth", str(folder / "truth.jsonl"), "--json", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_facts_are_those_of_the_records(job: Job) -> None:
    facts = collect_output_facts(read_record_table(str(job.output)))
    assert len(facts) == DOCUMENTS
    found = {one.path: one for one in facts["in/0.pdf", None]}
    assert {path: (one.type, one.field) for path, one in found.items()} == {
        "$.currency": ("choice", "currency"),
        "$.total": ("number", "total"),
        "$.lines[0].amount": ("number", "lines.amount"),
    }
    assert found["$.lines[0].amount"].rules == {"line_small": True}
    assert found["$.total"].rules == {}


def test_a_calibration_is_written_and_applied(job: Job) -> None:
    found = run_eval(job, "--calibrate")
    assert (found["documents"], found["values"], found["errors"]) == (40, 120, 24)
    assert (found["held_out"]["documents"], found["held_out"]["auroc"] > 0.6) == (20, True)
    raw = run_eval(job)["scores"]["certainty"]
    file = Path(found["file"])
    assert file == Path(str(job.output)) / "calibration.json"
    extract = job.sections.extract.model_copy(update={"calibration": str(file)})
    settle(Job(job.file, job.sections.model_copy(update={"extract": extract}), job.schema, job.output))
    scored = run_eval(job)["scores"]["certainty"]
    assert scored["brier"] < raw["brier"]
    assert scored["ece"] < raw["ece"]


def test_settling_by_a_calibration_is_the_same_twice(job: Job) -> None:
    file = run_eval(job, "--calibrate", str(job.file.parent / "c.json"))["file"]
    extract = job.sections.extract.model_copy(update={"calibration": file})
    calibrated = Job(job.file, job.sections.model_copy(update={"extract": extract}), job.schema, job.output)
    tables = []
    for _ in range(2):
        settle(calibrated)
        tables.append(read_shards(Output(job.output).records, ["_confidence"], read_record_table(str(job.output)).table.schema))
    assert tables[0] == tables[1]


def test_too_few_labels_are_refused(job: Job) -> None:
    truth = job.file.parent / "few.jsonl"
    truth.write_text("\n".join((job.file.parent / "truth.jsonl").read_text().split("\n")[:10]))
    result = CliRunner().invoke(main, ["eval", str(job.output), "--truth", str(truth), "--calibrate"])
    assert result.exit_code == 2
    assert "have 10 documents with log-probabilities in common, and 7 wrong values: a calibration needs at least 20 and 20" in result.output


def test_an_output_of_another_version_is_refused(tmp_path: Path) -> None:
    place = write_output(tmp_path / "out", {"a.pdf": {"total": 1}}, certainty={})
    with pytest.raises(JobError, match=r"out/job.yaml is not one of this version"):
        collect_output_facts(read_record_table(str(place)))


def test_options_that_exclude_each_other_are_refused(job: Job) -> None:
    arguments = ["eval", str(job.output), "--truth", "t.jsonl", "--calibrate", "c.json", "--sweep", "pages.dpi=100"]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, "exclude each other" in result.output) == (2, True)
