"""Properties that hold for any page, schema, order of arrival and text, tested on generated examples.

The examples are the same in each run (`derandomize`), so that a failure can be repeated. The properties of one module alone are in its
own tests: `test_budget.py`, `test_merge.py`, `test_arrow.py`, `test_schema.py`.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.budget import MAX_RATIO, PixelBudget, count_visual_tokens, fit_page
from pipeline.errors import JobError
from pipeline.output import Output
from pipeline.output.ledger import read_requests
from pipeline.schema import dump_json, prompt
from pipeline.schema.arrow import ArrowPlan
from pipeline.schema.merge import merge_parts
from pipeline.stages.requests import compute_document_keys
from pipeline.stages.settle import SettleStage
from tests.support.engines import VALID
from tests.support.ledger import LedgerWriter
from tests.support.stages import Row, make_settle_stage
from tests.support.tiny_tokenizer import CONTROL
from tests.support.workspace import Workspace
from tests.unit.schema import test_arrow, test_merge
from tests.unit.test_budget import PT, budgets


def with_examples(examples: int) -> settings:
    return settings(derandomize=True, max_examples=examples, deadline=None)


# --- pages on the model's grid


@with_examples(200)
@given(PT, PT, st.integers(36, 1200), budgets())
def test_a_page_is_whole_visual_tokens_within_the_budget(width_pt: float, height_pt: float, dpi: int, budget: PixelBudget) -> None:
    size = fit_page(width_pt, height_pt, dpi, budget)
    assert size.width_px % 28 == size.height_px % 28 == 0
    assert budget.min_pixels <= size.width_px * size.height_px <= budget.max_pixels
    assert max(size.width_px, size.height_px) <= MAX_RATIO * min(size.width_px, size.height_px)
    assert count_visual_tokens(size) * 784 == size.width_px * size.height_px


@with_examples(200)
@given(st.floats(50, 2000), st.floats(0.25, 4), st.integers(72, 300))
def test_a_page_of_usual_shape_keeps_it_within_a_cell(width_pt: float, ratio: float, dpi: int) -> None:
    size = fit_page(width_pt, width_pt * ratio, dpi, PixelBudget())
    sides = ((size.width_px, width_pt), (size.height_px, width_pt * ratio))
    smallest, largest = ([(px + cell) / pt for px, pt in sides] for cell in (-28, 28))
    assert max(smallest) < min(largest), "no one scale brings both sides within a cell of the canvas"


# --- parts of a document


def list_scalars(value: Any, path: str = "$") -> Iterator[tuple[str, str]]:
    """Yield the path and JSON text of every scalar except null; all positions in a list have the same path."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from list_scalars(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from list_scalars(inner, f"{path}[]")
    elif value is not None:
        yield path, dump_json(value)


@with_examples(200)
@given(st.lists(test_merge.VALUES, min_size=1, max_size=4))
def test_merging_loses_no_value_and_invents_none(values: list[Any]) -> None:
    merged = merge_parts(test_merge.SCHEMA, test_merge.make_parts(*values))
    found = [*list_scalars(merged.value), *((d.path, dump_json(d.other)) for d in merged.disagreements)]
    given = {scalar for value in values for scalar in list_scalars(value)}
    assert {scalar for scalar in given if scalar[1] != '""'} <= set(found) <= given  # an empty string says nothing
    listed = [Counter(scalar for scalar in group if "[]" in scalar[0]) for group in (found, (s for v in values for s in list_scalars(v)))]
    assert listed[0] == listed[1]


# --- columns


@with_examples(60)
@given(st.data())
def test_shards_full_half_empty_and_of_nothing_have_one_schema(data: st.DataObject) -> None:
    part, values = data.draw(test_arrow.PARTS)
    columns = ArrowPlan({"type": "object", "additionalProperties": False, "properties": {"x": part, "y": {"type": "string"}}})
    full = [test_arrow.build_whole_row(columns, {"x": value}) for value in data.draw(st.lists(values, min_size=1, max_size=3))]
    shards = [test_arrow.write_and_read(columns, rows) for rows in ([], [{}], full, [*full, {}])]
    assert all(shard.schema == columns.schema for shard in shards)
    assert len({str(shard.schema) for shard in shards}) == 1
    assert pa.concat_tables(shards).num_rows == 2 + 2 * len(full)


# --- the ledger, and records settled from it

DOCUMENTS: list[Row] = [
    {"source": f"{name}.pdf", "size_bytes": 9, "version": "1", "doc_id": f"id of {name}", "page_count": pages}
    for name, pages in (("a", 1), ("b", 3), ("c", 2))
]
FAILURE = {"stage": "generate", "kind": "length", "message": "the answer was cut"}
OUTCOMES = st.sampled_from(["extracted", "invalid", "failed"])


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> SettleStage:
    return make_settle_stage(Workspace(tmp_path_factory.mktemp("workspace")).job("pages.per_request=2"), pa.schema([]))


def make_request(stage: SettleStage, document: Row, at: int, attempt: int, status: str) -> Row:
    """Return a document's request as this attempt answered it; the answers of any two attempts differ."""
    key, (first_page, last_page) = list(compute_document_keys(document, stage.per_request, stage.fingerprint).items())[at]
    row: Row = {**document, "key": key, "attempt": attempt, "first_page": first_page, "last_page": last_page, "status": status}
    row |= {"pages": [], "errors": [], "asks": 1, "prompt_tokens": attempt, "completion_tokens": at, "model": "m", "engine": "e"}
    if status == "failed":
        return row | {"failure": FAILURE | {"message": f"attempt {attempt}"}}
    return row | {"answer": VALID.replace("19.99", f"{'-' if status == 'invalid' else ''}{attempt}.{at}")}


@st.composite
def histories(draw: st.DrawFn) -> list[list[tuple[int, int, int, str]]]:
    """Return runs: in each, some requests are answered (document, index of the request, attempt, status), none of them twice."""
    places = [(0, 0), (1, 0), (1, 1), (2, 0)]
    runs = []
    for attempt in range(1, draw(st.integers(1, 3)) + 1):
        asked = draw(st.lists(st.sampled_from(places), unique=True))
        runs.append([(*place, attempt, draw(OUTCOMES)) for place in asked])
    return runs


def write_run(output: Output, rows: list[Row], data: st.DataObject) -> None:
    """Add the rows of one run to the ledger: some of them twice, with flushes in arbitrary places."""
    with LedgerWriter(output) as ledger:
        for row in rows + data.draw(st.lists(st.sampled_from(rows), max_size=3) if rows else st.just([])):
            ledger.add(row)
            if data.draw(st.booleans()):
                ledger.flush()


def copy_some(output: Output, data: st.DataObject) -> None:
    """Add copies of some shards, as a restored backup might."""
    for file in sorted((output.root.path / "requests").glob("*.parquet")):
        if data.draw(st.booleans()):
            file.with_name(f"copy-{file.name}").write_bytes(file.read_bytes())


def select_expected(rows: list[Row]) -> Row:
    """Return the attempt that counts, computed in another way: the newest that succeeded, else the newest."""
    newest_first = sorted(rows, key=lambda row: -row["attempt"])
    return next((row for row in newest_first if row["status"] != "failed"), newest_first[0])


@with_examples(40)
@given(histories(), st.data())
def test_records_are_those_of_the_newest_successes_however_the_ledger_was_written(
    stage: SettleStage, history: list[list[tuple[int, int, int, str]]], data: st.DataObject
) -> None:
    runs = [[make_request(stage, DOCUMENTS[document], *rest) for document, *rest in run] for run in history]
    by_key: dict[str, list[Row]] = {}
    for row in (row for run in runs for row in run):
        by_key.setdefault(row["key"], []).append(row)
    with tempfile.TemporaryDirectory() as folder:
        (output := Output(Path(folder))).create()
        for run in data.draw(st.permutations(runs)):
            write_run(output, run, data)
        copy_some(output, data)
        read = read_requests(output, pa.chunked_array([[document["doc_id"] for document in DOCUMENTS]])).to_pylist()
    settled = stage.build_table(DOCUMENTS, read)
    assert settled == stage.build_table(DOCUMENTS, [select_expected(rows) for rows in by_key.values()])
    assert settled["_source"].to_pylist() == ["a.pdf", "b.pdf", "c.pdf"]


@with_examples(40)
@given(histories(), st.permutations(DOCUMENTS), st.integers(0, 3))
def test_documents_are_settled_alike_in_one_go_and_in_parts(
    stage: SettleStage, history: list[list[tuple[int, int, int, str]]], documents: list[Row], cut: int
) -> None:
    rows = [make_request(stage, DOCUMENTS[document], *rest) for run in history for document, *rest in run]
    parts = pa.concat_tables([stage.build_table(documents[:cut], rows), stage.build_table(documents[cut:], rows[::-1])])
    assert parts.sort_by("_source") == stage.build_table(DOCUMENTS, rows)


# --- untrusted text

PIECES = st.sampled_from([*CONTROL, "</tool_call>", "<|", "|>", "im_end", "<", "|", ">", "\x00", "\n", " ", "a"])
TEXTS = st.lists(PIECES, max_size=8).map("".join)


@with_examples(150)
@given(TEXTS, TEXTS, TEXTS)
def test_a_schema_or_instructions_that_spell_a_control_token_are_refused(title: str, description: str, instructions: str) -> None:
    schema = {"type": "object", "properties": {"x": {"title": title, "description": description}}}
    try:
        said = prompt.build_system_message(schema, instructions)
    except JobError as error:
        assert "control token" in str(error)  # noqa: PT017  # both outcomes are right
        assert any(mark in "".join((title, description, instructions)) for mark in ("|>", "</tool_call>"))
    else:
        assert not any(token in said for token in (*CONTROL, "</tool_call>"))
