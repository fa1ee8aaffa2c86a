"""Summary of an output: counts, examples, histogram, time line; in one shard or in many."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.output import Output
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.shards import write_shard
from pipeline.output.sources import SOURCE_SCHEMA
from pipeline.output.summary import (
    EXAMPLES,
    MAX_BUCKETS,
    SUMMARY_SCHEMA,
    Example,
    Timeline,
    sum_steps,
    summarize_output,
    summarize_requests,
    summarize_sources,
)
from pipeline.records import REREAD

START = datetime(2026, 11, 29, tzinfo=UTC)


def record(source: str, **columns: Any) -> dict[str, Any]:
    empty = {name: [] for name in ("_disagreements", "_rules", "_corrected", "_evidence", "_confidence", "_alerts")}
    return {"_source": source, "_status": "extracted", **empty, **columns}


def failed(source: str, kind: str = "broken") -> dict[str, Any]:
    failure = {"stage": "render", "kind": kind, "message": f"{source} is {kind}"}
    return record(source, _status="failed", _failure=failure, _evidence=None, _confidence=None, _alerts=None)


def request(at_s: float, elapsed_s: float = 0.0, pages: int = 1, status: str = "extracted") -> dict[str, Any]:
    about = {"started_at": START + timedelta(seconds=at_s), "elapsed_s": elapsed_s, "first_page": 1, "last_page": pages, "status": status}
    return {"prompt_tokens": 100, "completion_tokens": 10, "model": "m", "engine": "e", **about}


@pytest.fixture
def output(tmp_path: Path) -> Output:
    output = Output(tmp_path / "out")
    output.create()
    return output


def write_records(output: Output, *shards: list[dict[str, Any]]) -> None:
    for number, rows in enumerate(shards):
        write_shard(output.records, pa.Table.from_pylist(rows, SUMMARY_SCHEMA), [str(number)])


ROWS = [
    record(
        "a.pdf",
        _confidence=[{"path": "$.lines[0].amount", "confidence": 0.2}, {"path": "$.lines[1].amount", "confidence": 1.0}],
        _evidence=[{"path": "$.lines[0].amount", "value": "12", "match": "absent"}, {"path": "$.day", "value": "1", "match": "exact"}],
        _rules=[{"name": "sum", "result": "broken", "message": "no sum"}, {"name": "day", "result": "passed"}],
        _disagreements=[{"path": "$.lines[7].amount", "kept": "1", "other": "2"}],
        _alerts=[{"kind": "hidden_text", "page": 1, "reason": "tiny", "text": "ignore"}],
    ),
    record("b.pdf", _rules=[{"name": "sum", "result": "error", "message": "null"}], _partial=True, _corrected=["$.day"]),
    *(failed(f"{number}.pdf") for number in range(5)),
    failed("e.pdf", "empty"),
]


@pytest.mark.parametrize("size", [len(ROWS), 3, 1])
def test_records_are_counted_with_examples(output: Output, size: int) -> None:
    write_records(output, *(ROWS[start : start + size] for start in range(0, len(ROWS), size)))
    found = summarize_output(output).records
    assert (found.records, found.statuses, found.partial, found.corrected) == (8, {"extracted": 2, "failed": 6}, 1, 1)
    assert found.failures.counts == {"render/broken": 5, "render/empty": 1}
    assert len(found.failures.examples["render/broken"]) == EXAMPLES
    assert found.failures.examples["render/empty"] == [Example("e.pdf", "e.pdf is empty")]
    assert found.rules == {("sum", "broken"): 1, ("sum", "error"): 1, ("day", "passed"): 1}
    assert found.broken_rules.counts == {"sum": 2}
    assert {one.text for one in found.broken_rules.examples["sum"]} == {"no sum", "null"}
    assert found.disagreements.examples == {"lines[].amount": [Example("a.pdf", "1 or 2")]}
    assert found.alerts.examples == {"hidden_text, tiny": [Example("a.pdf", "ignore")]}
    assert found.unwitnessed.examples == {"lines[].amount": [Example("a.pdf", "12")]}
    assert [int(found.confidence[place]) for place in (4, 19)] == [1, 1]
    lines, day = found.fields["lines[].amount"], found.fields["day"]
    assert (lines.rated, round(lines.confidence, 3), lines.looked_for, lines.unwitnessed) == (2, 1.2, 1, 1)
    assert (day.rated, day.looked_for, day.unwitnessed) == (0, 1, 0)


def test_an_older_output_lacks_columns(output: Output) -> None:
    old = [*SUMMARY_SCHEMA.names[:3], "_disagreements"]
    write_shard(output.records, pa.Table.from_pylist([failed("a.pdf")], SUMMARY_SCHEMA).select(old), ["a"])
    found = summarize_output(output).records
    assert (found.records, found.failures.counts, found.fields) == (1, {"render/broken": 1}, {})


def test_an_empty_output_has_nothing(output: Output) -> None:
    found = summarize_output(output)
    assert (found.sources.documents, found.records.records, found.requests.statuses.total()) == (0, 0, 0)


def test_a_damaged_shard_is_left_out(output: Output) -> None:
    write_records(output, ROWS)
    output.records.put("torn.parquet", b"PAR1")
    assert summarize_output(output).records.records == len(ROWS)


def test_sources_are_counted_by_ending() -> None:
    names = ["a.PDF", "b.pdf", "c.tiff", "https://h/d.jpg?x=1.png", "e"]
    rows = [{"source": name, "doc_id": "1" if name < "c" else name, "page_count": 2, "size_bytes": 10} for name in names]
    rows[-1] |= {"doc_id": None, "page_count": None, "size_bytes": -1}
    found = summarize_sources(pa.Table.from_pylist(rows, SOURCE_SCHEMA))
    assert (found.documents, found.contents, found.unread, found.pages, found.size_bytes) == (5, 3, 1, 8, 40)
    assert dict(found.types) == {"pdf": 2, "tiff": 1, "jpg": 1, "none": 1}


def test_requests_are_counted_when_they_ended() -> None:
    rows = [request(0, 1.5, 4), request(1, 0.9), request(9, status="failed"), request(9) | {"rule": "sum"}]
    found = summarize_requests(pa.Table.from_pylist(rows, LEDGER_SCHEMA))
    assert (found.prompt_tokens, found.completion_tokens, found.request_s, found.rule_requests) == (400, 40, 2.4, 1)
    assert found.models == {("m", "e"): 4}
    steps = found.timeline.steps - int(START.timestamp())
    assert dict(zip(steps.tolist(), found.timeline.counts.tolist(), strict=True)) == {1: [5, 2, 0], 9: [0, 2, 1]}


def test_a_long_time_line_has_longer_steps_and_the_same_sums() -> None:
    whole = Timeline()
    for part in range(10):
        steps = np.arange(part * 5000, part * 5000 + 5000)
        whole.merge(Timeline(1, *sum_steps(steps, np.ones((5000, 3), np.int64))))
    assert len(whole.steps) <= MAX_BUCKETS
    assert (whole.step_s, whole.counts.sum(axis=0).tolist()) == (16, [50_000] * 3)
    assert (np.diff(whole.steps) > 0).all()


def test_requests_that_read_values_again_are_none_about_rules() -> None:
    rows = [request(0), request(1) | {"rule": "sum"}, request(2) | {"rule": REREAD}, request(3) | {"rule": REREAD}]
    found = summarize_requests(pa.Table.from_pylist(rows, LEDGER_SCHEMA))
    found.merge(summarize_requests(pa.Table.from_pylist(rows[:1], LEDGER_SCHEMA)))
    assert (found.rule_requests, found.reread_requests, found.timeline.counts[:, 0].sum()) == (1, 2, 2)
