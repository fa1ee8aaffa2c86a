"""The ledger of OCR: rows by document and page, of which one that was read counts most."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline.output import SHARD_SUFFIX, Output, compaction
from pipeline.output.compaction import compact_shards
from pipeline.output.words import group_words, read_ocr_words, write_words
from pipeline.records import OcrRow
from tests.support.workspace import Workspace


def make_row(doc_id: str, page: int, status: str = "read") -> OcrRow:
    words = {"text": f"{doc_id}-{page}", "boxes": bytes(8), "unit_pt": 0.5, "marks": None} if status == "read" else None
    return {"doc_id": doc_id, "page": page, "status": status, "layer": "none", "words": words, "failure": None, "reader": "r"}  # type: ignore[typeddict-item]


@pytest.fixture
def output(workspace: Workspace) -> Output:
    made = Output(workspace.job().output)
    made.create()
    made.words.create()
    return made


def test_rows_of_some_documents_come_back(output: Output) -> None:
    rows = [make_row("a1", 1), make_row("a1", 2), make_row("b2", 1), make_row("c3", 1)]
    write_words(output, rows[:3])
    write_words(output, rows[3:])
    found = group_words(read_ocr_words(output, pa.chunked_array([["a1", "b2"]])).to_pylist())
    assert found == {"a1": {1: rows[0], 2: rows[1]}, "b2": {1: rows[2]}}


def test_of_two_rows_of_a_page_that_which_was_read_counts() -> None:
    read, other = make_row("a1", 1), make_row("a1", 1, "not_needed")
    assert group_words([read, other]) == group_words([other, read]) == {"a1": {1: read}}


def test_many_shards_become_few_with_the_same_rows(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "TARGET_BYTES", 40_000)
    for number in range(40):
        write_words(output, [make_row(f"{number * 37 % 256:02x}", 1), make_row("00", 1)])
    everything = pa.chunked_array([["00", "ff"]])
    before = group_words(read_ocr_words(output, everything).to_pylist())
    compact_shards(output)
    assert len(output.words.list_names(SHARD_SUFFIX)) <= 10
    assert group_words(read_ocr_words(output, everything).to_pylist()) == before
