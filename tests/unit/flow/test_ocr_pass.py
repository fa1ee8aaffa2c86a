"""Which pages are read by OCR: those that the mode wants and nobody has read yet."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline.flow.ocr_pass import SAMPLED_PAGES, OcrPass, cut_tasks
from pipeline.output import Output
from pipeline.output.ledger import RetryFilter
from pipeline.output.shards import write_shard
from pipeline.output.words import FAILED, NOT_NEEDED, READ, write_words
from pipeline.report import ProgressTracker, Report
from pipeline.stages.record_plan import RecordPlan
from tests.support.workspace import Workspace

PAGES = {"a": 6, "b": 2, "c": 1}
LISTED = {"size_bytes": 9, "version": "1", "full_url": None}
DOCUMENTS = pa.Table.from_pylist(
    [{**LISTED, "source": f"{name}.pdf", "doc_id": name, "page_count": count} for name, count in PAGES.items()]
    + [{**LISTED, "source": "unopened", "doc_id": None, "page_count": 0}, {**LISTED, "source": "copy", "doc_id": "a", "page_count": 6}]
)
SOUND: dict[str, Any] = {
    "_status": "extracted",
    "_unwitnessed": 0,
    "_least_confidence": 0.99,
    "_rules": [],
    "_disagreements": [],
    "_alerts": [],
}


def select(workspace: Workspace, mode: str, records: dict[str, Any] | None = None, retry: str = "") -> dict[str, tuple[bool, list[int]]]:
    """Return the pages that a mode wants, given what differs in the records of some documents."""
    job = workspace.job(f"evidence.ocr={mode}")
    output, plan = Output(job.output), RecordPlan(job)
    output.create()
    rows = [{"_doc_id": name, **SOUND, **(records or {}).get(name, {})} for name in PAGES]
    write_shard(output.records, pa.Table.from_pylist(rows, plan.schema))
    tracker = ProgressTracker(Report("slips", "out", "m", False), lambda _: None)
    reading = OcrPass(job, output, tracker, plan.schema, RetryFilter.parse(retry) if retry else None)
    return {row["doc_id"]: (row["must_read"], row["pages"]) for row in reading.select_pages(DOCUMENTS).to_pylist()}


def note(workspace: Workspace, **pages: str) -> None:
    """Write what OCR has looked at, `a2=READ`."""
    rest: dict[str, Any] = {"layer": None, "words": None, "failure": None, "reader": None}
    output = Output(workspace.job().output)
    output.words.create()
    write_words(output, [{"doc_id": name[0], "page": int(name[1]), "status": status, **rest} for name, status in pages.items()])  # type: ignore[typeddict-item]


def test_all_wants_every_page_of_every_document_once(workspace: Workspace) -> None:
    assert select(workspace, "all") == {"a": (True, [1, 2, 3, 4, 5, 6]), "b": (True, [1, 2]), "c": (True, [1])}


def test_what_was_read_is_not_read_again(workspace: Workspace) -> None:
    note(workspace, a1=READ, a3=NOT_NEEDED, b1=FAILED, c1=READ)
    assert select(workspace, "scans") == {"a": (False, [2, 4, 5, 6]), "b": (False, [2])}
    assert select(workspace, "all") == {"a": (True, [2, 3, 4, 5, 6]), "b": (True, [2])}
    assert select(workspace, "all", retry="failed")["b"] == (True, [1, 2])


def test_scans_reads_the_first_pages_of_a_document_whose_layer_lacks_a_value(workspace: Workspace) -> None:
    note(workspace, a1=NOT_NEEDED, a2=READ)
    wanted = select(workspace, "scans", {"a": {"_unwitnessed": 1}})
    assert wanted == {"a": (True, [1, 3, 4][:SAMPLED_PAGES]), "b": (False, [1, 2]), "c": (False, [1])}


@pytest.mark.parametrize(
    "doubt",
    [
        {"_unwitnessed": 2},
        {"_status": "invalid"},
        {"_least_confidence": 0.5},
        {"_rules": [{"name": "sums", "result": "broken", "message": "", "fields": []}]},
        {"_disagreements": [{"path": "$", "kept": "1", "kept_page": 1, "other": "2", "other_page": 2}]},
        {"_alerts": [{"kind": "hidden_text", "page": 1, "reason": "tiny", "text": "x", "path": None}]},
    ],
    ids=lambda doubt: next(iter(doubt)),
)
def test_doubtful_wants_the_pages_of_doubtful_documents(workspace: Workspace, doubt: dict[str, Any]) -> None:
    assert select(workspace, "doubtful", {"b": doubt, "c": {"_status": "failed", "_least_confidence": None}}) == {"b": (True, [1, 2])}


def test_tasks_have_about_as_many_pages_and_each_document_once() -> None:
    wanted = pa.table({"doc_id": [str(n) for n in range(50)], "pages": [[1] * (1 + n % 7) for n in range(50)]})
    blocks = cut_tasks(wanted, cpus=2)
    assert pa.concat_tables(blocks).equals(wanted.combine_chunks())
    assert {sum(map(len, block["pages"].to_pylist())) for block in blocks} <= set(range(1, 32))
    assert len(blocks) in (8, 9)
