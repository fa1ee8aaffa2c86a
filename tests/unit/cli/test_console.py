"""Reports, progress and messages become words that people read, whatever strangers put into them."""

from __future__ import annotations

import os
import re
import sys
import time
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from pipeline.cli import console
from pipeline.errors import RunError
from pipeline.report import Phase, Progress, Report

HALFWAY = Progress(phase=Phase.ASKING, documents=4, documents_done=1, pages_done=6, requests_done=2, failed=1, elapsed_s=4)


def report(**given: Any) -> Report:
    return Report("slips", "/tmp/out", "demo", True, documents=2, records=2, statuses={"extracted": 1, "failed": 1}, **given)


def test_the_summary_is_words(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_report(report(failures={"render/empty": 1}, requests_asked=1))
    said = capsys.readouterr()
    assert said.out == ""
    for line in ("slips: 2 documents, 2 records", r"extracted +│ 1", r"  render/empty +│ 1", r"demo \(demonstration\)"):
        assert re.search(line, said.err)
    assert re.search(r"^records: .*tmp/out/records$", said.err, re.MULTILINE)


def test_a_shard_that_was_set_aside_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_report(report(damaged=["out/requests/ab.parquet"]))
    assert "damaged: out/requests/ab.parquet was set aside, and its requests were asked again" in capsys.readouterr().err


def test_a_strangers_file_name_does_not_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_message("in/\x1b]0;owned\x07\u202efdp.exe\nnext line")
    assert capsys.readouterr().err == "in/\\x1b]0;owned\\x07\\u202efdp.exe\nnext line\n"


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_report(report(missing=["in/b.pdf"]))
    assert "error: 1 sources have no record, the first is in/b.pdf" in capsys.readouterr().err


def spoken(screen: StringIO, text: str) -> bool:
    """Wait until this is on a screen."""
    deadline = time.monotonic() + 60
    while text not in screen.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    return text in screen.getvalue()


def test_without_a_terminal_a_line_now_and_then_says_where_a_run_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PERIOD_S", 0.01)
    with console.show_progress(Console(file=(screen := StringIO()), width=120), quiet=False) as on_progress:
        assert on_progress is not None
        assert spoken(screen, "starting\n")
        on_progress(HALFWAY)
        assert spoken(screen, "1 of 4 documents, 6 pages, 1.5 pages/s, 1 failed\n")


def test_there_is_no_bar_beside_json() -> None:
    with console.show_progress(Console(file=StringIO(), force_terminal=True), quiet=True) as on_progress:
        assert on_progress is None


def test_the_bar_shows_pages_per_second() -> None:
    with console.show_progress(Console(file=(screen := StringIO()), force_terminal=True, width=120), quiet=False) as on_progress:
        assert on_progress is not None
        on_progress(HALFWAY)
    assert "6 pages, 1.5 pages/s, 1 failed" in screen.getvalue()
    assert "1/4" in screen.getvalue()


def test_what_rays_core_writes_is_not_for_the_user(capfd: pytest.CaptureFixture[str]) -> None:
    with console.capture_ray_output():
        os.write(2, b"core_worker.cc:2465: Actor with class name\n")
        print("(raylet) A worker died")
        print("words", file=sys.stderr)
    os.write(2, b"after\n")
    print("data")
    assert capfd.readouterr() == ("data\n", "words\nafter\n")


@pytest.mark.parametrize(("cause", "shown"), [(ValueError("Ray's own"), "core_worker.cc\n"), (None, "")])
def test_what_rays_core_wrote_is_shown_if_it_broke_the_run(capfd: pytest.CaptureFixture[str], cause: Exception | None, shown: str) -> None:
    with pytest.raises(RunError), console.capture_ray_output():  # noqa: PT012  what is written inside is what is tested
        os.write(2, b"core_worker.cc\n")
        raise RunError("it broke") from cause
    assert capfd.readouterr().err == shown
