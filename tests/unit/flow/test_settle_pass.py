"""Settling without Ray: only what has changed, the same bytes however the ledger is stored, and no import of Ray for a few documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import engines, flow
from pipeline.flow import pending, preparation, settle_pass
from pipeline.job import Job
from pipeline.output import Output, compaction
from pipeline.output.compaction import compact_shards
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.shards import write_shard
from pipeline.output.sources import replace_sources
from pipeline.output.summary import OutputSummary, summarize_output
from pipeline.report import ExitCode, ProgressTracker, Report
from pipeline.review import report_page
from pipeline.stages.record_plan import RecordPlan
from pipeline.stages.requests import compute_document_keys
from pipeline.stages.settle import SettleStage
from pipeline.storage.store import FolderStore
from tests.support.ledger import LedgerWriter
from tests.support.workspace import SCHEMA, Workspace

ROOT = Path(__file__).parents[3]
DOCUMENTS = 40
ANSWER = '{"currency":"EUR","total":1.25,"lines":[]}'


class AnsweredJob:
    """A job of a workspace, all of whose documents were asked; four documents make a shard of records."""

    def __init__(self, workspace: Workspace) -> None:
        for number in range(DOCUMENTS):
            (workspace.inputs / f"{number:02}.pdf").write_bytes(b"%PDF-")
        self.workspace = workspace
        self.job = engines.resolve_engine(workspace.job(), 0)
        self.output = Output(self.job.output)
        self.output.create()
        self.output.write_job(preparation.describe_run(self.job))
        listing = pending.list_documents(self.job).to_pylist()
        self.documents = [row | {"doc_id": f"{number * 37 % 256:02x}" * 32, "page_count": 1} for number, row in enumerate(listing)]
        replace_sources(self.output, pa.Table.from_pylist(self.documents, pending.SOURCE_SCHEMA))
        self.answer(*range(DOCUMENTS))

    def answer(self, *numbers: int, attempt: int = 1, answer: str = ANSWER) -> None:
        """Write the answers about these documents, each into a shard of its own."""
        for number in numbers:
            (key,) = compute_document_keys(self.documents[number], self.job.pages_per_request, self.job.fingerprint)
            row = {**self.documents[number], "key": key, "attempt": attempt, "first_page": 1, "last_page": 1}
            row |= {"status": "extracted", "answer": answer, "asks": 1}
            write_shard(self.output.requests, pa.Table.from_pylist([row], LEDGER_SCHEMA), [f"{key}/{attempt}"])

    def settle(self, job: Job | None = None) -> Report:
        job = job or self.job
        stage = SettleStage(RecordPlan(job), job.pages_per_request, self.job.fingerprint)
        report = Report("slips", "", "", False)
        documents = pa.Table.from_pylist(self.documents, pending.SOURCE_SCHEMA)
        settle_pass.settle_output(documents, stage, self.output, ProgressTracker(report, lambda _: None), job)
        return report

    def read_records(self) -> dict[str, bytes]:
        return {name: self.output.records.read(name) for name in self.output.records.list_names("")}


@pytest.fixture
def answered(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> AnsweredJob:
    monkeypatch.setattr(settle_pass, "DOCUMENTS_PER_SHARD", 4)
    monkeypatch.setattr(settle_pass, "MAX_RANGES_HERE", DOCUMENTS)
    return AnsweredJob(workspace)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards of records that are written from now on."""
    names: list[str] = []
    put = FolderStore.put

    def put_noted(store: FolderStore, name: str, content: bytes) -> None:
        names.extend([name] * (store.path.name == "records"))
        put(store, name, content)

    monkeypatch.setattr(FolderStore, "put", put_noted)
    return names


@pytest.mark.parametrize(("connected", "documents", "on_ray"), [(False, 20, False), (False, 24, True), (True, 4, False), (True, 8, True)])
def test_ray_settles_what_would_take_longer_here(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, connected: bool, documents: int, on_ray: bool
) -> None:
    monkeypatch.setattr(settle_pass, "DOCUMENTS_PER_SHARD", 4)
    monkeypatch.setattr("pipeline.cluster.is_ray_connected", lambda: connected)
    called: list[int] = []
    monkeypatch.setattr(settle_pass, "settle_on_ray", lambda ranges, *_: called.append(len(ranges)) or iter(()))
    answered = AnsweredJob(workspace)
    answered.documents = answered.documents[:documents]
    answered.settle()
    assert bool(called) == on_ray


def test_records_have_the_same_bytes_however_the_ledger_is_stored(answered: AnsweredJob, monkeypatch: pytest.MonkeyPatch) -> None:
    answered.settle()
    before = answered.read_records()
    assert len(before) == 10
    for target in (2**30, 2**12):  # one shard, then partitions
        monkeypatch.setattr(compaction, "TARGET_BYTES", target)
        compact_shards(answered.output)
        (answered.output.root.path / "settled.json").unlink()  # type: ignore[attr-defined]
        answered.settle()
        assert answered.read_records() == before
    assert len(answered.output.requests.list_names("")) > 1


def test_what_has_not_changed_is_not_written_and_is_counted(answered: AnsweredJob, written: list[str]) -> None:
    first = answered.settle()
    assert len(written) == 10
    again = answered.settle()
    assert len(written) == 10
    assert (again.as_dict(), again.records) == (first.as_dict(), DOCUMENTS)


def test_a_compaction_changes_nothing(answered: AnsweredJob, written: list[str]) -> None:
    answered.settle()
    written.clear()
    assert compact_shards(answered.output)
    answered.settle()
    assert written == []


def test_a_range_whose_ledger_has_changed_is_settled_again_alone(answered: AnsweredJob, written: list[str]) -> None:
    answered.settle()
    before = answered.read_records()
    written.clear()
    answered.answer(7, attempt=2, answer=ANSWER.replace("1.25", "9.75"))
    answered.settle()
    after = answered.read_records()
    assert len(written) == 1
    assert [name for name in after if after[name] != before[name]] == written


def test_a_range_whose_listing_has_changed_is_settled_again_alone(answered: AnsweredJob, written: list[str]) -> None:
    answered.settle()
    written.clear()
    answered.documents[7] = answered.documents[7] | {"source": "in/renamed.pdf"}
    answered.settle()
    assert len(written) == 1
    assert len(answered.read_records()) == 10


def test_another_schema_settles_everything_again(answered: AnsweredJob, written: list[str]) -> None:
    answered.settle()
    written.clear()
    strict = SCHEMA["properties"] | {"currency": {"enum": ["USD", None]}}  # type: ignore[operator]
    (answered.workspace.folder / "schema.json").write_text(json.dumps(SCHEMA | {"properties": strict}))
    assert answered.settle(answered.workspace.job()).statuses == {"invalid": DOCUMENTS}
    assert len(written) == 10


@pytest.mark.parametrize("damage", ["removed", "changed"])
def test_a_shard_of_records_that_is_not_as_it_was_is_written_again(answered: AnsweredJob, written: list[str], damage: str) -> None:
    answered.settle()
    before = answered.read_records()
    file = answered.output.records.path / min(before)  # type: ignore[attr-defined]
    if damage == "removed":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    written.clear()
    answered.settle()
    assert (written, answered.read_records()) == ([file.name], before)


def test_settling_renews_the_report_for_people(answered: AnsweredJob) -> None:
    flow.settle(answered.job)
    written = answered.output.root.read("report.html").decode()
    assert f"<dd>{DOCUMENTS:,}</dd>" in written
    answered.output.root.put("report.html", b"")
    flow.settle(answered.job)
    assert answered.output.root.read("report.html").decode() == written


@pytest.fixture
def summarized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The outputs that are read for a report for people from now on."""
    read: list[str] = []

    def summarize_noted(output: Output) -> OutputSummary:
        read.append(str(output.root))
        return summarize_output(output)

    monkeypatch.setattr(report_page, "summarize_output", summarize_noted)
    return read


def test_a_report_for_people_that_is_as_it_was_is_not_made_again(answered: AnsweredJob, summarized: list[str]) -> None:
    flow.run(answered.workspace.job())
    before = answered.output.root.read("report.html")
    flow.run(answered.workspace.job())
    flow.settle(answered.job)
    assert (len(summarized), answered.output.root.read("report.html")) == (1, before)


@pytest.mark.parametrize("change", ["corrected", "asked", "settled otherwise", "an older page"])
def test_a_report_for_people_is_made_again_when_the_output_has_changed(answered: AnsweredJob, summarized: list[str], change: str) -> None:
    flow.settle(answered.job)
    root, job = answered.output.root, answered.job
    if change == "corrected":
        right = {"_source": answered.documents[0]["source"], "_corrected": ["$.total"], "total": 7}
        root.put("corrections.jsonl", json.dumps(right).encode())
    elif change == "asked":  # by a run that was killed before it settled
        answered.answer(3, attempt=2)
    elif change == "settled otherwise":
        job = answered.workspace.job('extract.rules=[{name: few, expression: "total < 0", message: Negative.}]').with_demo()
    else:
        root.put("report.html", b"<!doctype html>")
    flow.settle(job)
    assert len(summarized) == 2


def test_settling_keeps_what_the_last_run_asked(answered: AnsweredJob) -> None:
    asked = {"requests_asked": 40, "pages_asked": 40, "elapsed_s": 80.0, "pages_per_s": 0.5, "engine_busy_share": 0.93}
    answered.output.write_report({"model": "demo", **asked, "requests_in_flight": 3.5})  # as 0.1.0 wrote it
    for _ in range(2):
        report = flow.settle(answered.job)
        assert (report.requests_asked, report.last_asked) == (0, {**asked, "requests_in_flight": 3.5})
        assert "<dd>93%</dd>" in answered.output.root.read("report.html").decode()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": 1}', b"\xff"])
def test_a_broken_list_of_what_was_settled_settles_everything(answered: AnsweredJob, written: list[str], content: bytes) -> None:
    answered.settle()
    written.clear()
    answered.output.root.put("settled.json", content)
    answered.settle()
    assert len(written) == 10


# --- no Ray


def run_command(answered: AnsweredJob, *arguments: str) -> tuple[dict[str, Any], set[str]]:
    """Return what a command says as JSON, and the modules that it imported."""
    code = "import sys, pipeline.cli as c\ntry: c.main(sys.argv[1:])\nfinally: print(*sys.modules)"
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", code, *arguments, str(answered.workspace.file), "--json"]
    ended = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    said, _, modules = ended.stdout.strip().rpartition("\n")
    assert said, ended.stderr
    return json.loads(said), {*modules.split()}


HEAVY = {"ray", "torch", "transformers", "pymupdf"}


def test_a_run_with_nothing_to_ask_imports_no_ray(answered: AnsweredJob) -> None:
    report, modules = run_command(answered, "run")
    assert (report["requests_asked"], report["statuses"], report["exit_code"]) == (0, {"extracted": DOCUMENTS}, ExitCode.OK)
    assert json.loads((answered.output.root.path / "report.json").read_text()) == report  # type: ignore[attr-defined]
    assert not HEAVY & modules


def test_settling_a_few_documents_imports_no_ray(answered: AnsweredJob) -> None:
    report, modules = run_command(answered, "settle")
    assert report["statuses"] == {"extracted": DOCUMENTS}
    assert not HEAVY & modules


def test_what_is_to_be_asked_is_found_out_before_ray_starts(answered: AnsweredJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new document starts Ray, for which this test is too early: the call says so."""

    class Connected(Exception):
        """Ray would be started."""

    def connect(job: Job) -> None:
        raise Connected

    monkeypatch.setattr(preparation, "connect_for_job", connect)
    assert flow.run(answered.workspace.job()).requests_asked == 0
    (answered.workspace.inputs / "new.pdf").write_bytes(b"%PDF-new")
    with pytest.raises(Connected):
        flow.run(answered.workspace.job())


def test_demonstration_answers_are_not_taken_for_the_jobs_where_there_may_be_a_gpu(
    answered: AnsweredJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = answered.workspace.job("model.name=Qwen/Qwen2.5-VL-7B-Instruct-AWQ", "model.without_gpu=demo")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pipeline.cluster.DEVICES", tmp_path)
    recalled = preparation.recall_model(job, answered.output)
    assert recalled is not None
    assert recalled.uses_demo
    (tmp_path / "nvidia0").touch()
    assert preparation.recall_model(job, answered.output) is None
    (tmp_path / "nvidia0").unlink()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert preparation.recall_model(job, answered.output) is None


def test_the_ledger_that_a_run_is_writing_is_settled_too(answered: AnsweredJob) -> None:
    answered.settle()
    with LedgerWriter(answered.output) as ledger:
        (key,) = compute_document_keys(answered.documents[3], answered.job.pages_per_request, answered.job.fingerprint)
        row = {**answered.documents[3], "key": key, "attempt": 2, "status": "extracted", "answer": ANSWER.replace("EUR", "USD")}
        ledger.add(row)  # type: ignore[arg-type]
    before = answered.read_records()
    answered.settle()
    assert sum(before[name] != content for name, content in answered.read_records().items()) == 1
