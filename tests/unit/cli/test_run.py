"""The report of a run on the terminal."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipeline.cli.run import show_report
from pipeline.report import Report


def report(**given: Any) -> Report:
    return Report("slips", "/tmp/out", "demo", True, documents=2, records=2, statuses={"extracted": 1, "failed": 1}, **given)


def test_the_summary_is_words(capsys: pytest.CaptureFixture[str]) -> None:
    show_report(report(failures={"render/empty": 1}, requests_asked=1))
    said = capsys.readouterr()
    assert said.out == ""
    for line in ("slips: 2 documents, 2 records", r"extracted +│ 1", r"  render/empty +│ 1", r"demo \(demonstration\)"):
        assert re.search(line, said.err)
    assert re.search(r"^records: .*tmp/out/records$", said.err, re.MULTILINE)


def test_a_shard_that_was_set_aside_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    show_report(report(damaged=["out/requests/ab.parquet"]))
    assert "damaged: out/requests/ab.parquet was set aside, and its requests were asked again" in capsys.readouterr().err


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    show_report(report(missing=["in/b.pdf"]))
    assert "error: documents without a record: 1, the first is in/b.pdf" in capsys.readouterr().err
