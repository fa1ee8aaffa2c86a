"""Terminal output: reports, progress and messages, whatever is in a document's name, and nothing of Ray."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import replace
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


def on_terminal(columns: int = 120) -> Console:
    return Console(file=StringIO(), force_terminal=True, width=columns)


def read(shown: Console) -> str:
    assert isinstance(shown.file, StringIO)
    return shown.file.getvalue()


def wait_for(shown: Console, text: str) -> bool:
    """Wait until a console has printed this."""
    deadline = time.monotonic() + 60
    while text not in read(shown) and time.monotonic() < deadline:
        time.sleep(0.01)
    return text in read(shown)


def test_without_a_terminal_a_line_now_and_then_says_where_a_run_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LINE_PERIOD_S", 0.01)
    with console.show_progress(shown := Console(file=StringIO(), width=120)) as display:
        display.update(HALFWAY)
        assert wait_for(shown, "0.1 s  1/4 documents, 6 pages, 1.5 pages/s, 1 failed\n")
    assert "\x1b" not in read(shown)


def test_each_phase_ends_with_a_line() -> None:
    with console.show_progress(shown := Console(file=StringIO(), width=120)) as display:
        for phase, documents in ((Phase.LISTING, None), (Phase.LISTING, 4), (Phase.STARTING_RAY, 4), (Phase.ASKING, 4)):
            display.update(replace(HALFWAY, phase=phase, documents=documents))
    assert read(shown).splitlines() == [
        "listing             0.0 s  4 documents",
        "starting Ray        0.0 s",
        "asking              0.0 s  1/4 documents, 6 pages, 1.5 pages/s, 1 failed",
    ]


def test_a_listing_says_how_many_documents_it_has_found() -> None:
    for done, total, line in ((0, None, ""), (1, None, "1 document so far"), (9, None, "9 documents so far"), (0, 0, "0 documents")):
        assert console.format_counts(replace(HALFWAY, phase=Phase.LISTING, documents=total, documents_done=done)) == line


def test_beside_json_there_is_nothing_but_messages() -> None:
    with console.show_progress(shown := on_terminal(), quiet=True) as display:
        display.update(HALFWAY)
        display.stop("stopping")
    assert read(shown) == "stopping\n"


def test_the_bar_shows_pages_per_second() -> None:
    with console.show_progress(shown := on_terminal()) as display:
        display.update(HALFWAY)
    assert "1/4 documents, 6 pages, 1.5 pages/s, 1 failed" in read(shown)


@pytest.mark.parametrize(("number", "line"), [(0.04, "0.0 s"), (99.9, "99.9 s"), (100, "0:01:40"), (3725.6, "1:02:06")])
def test_durations(number: float, line: str) -> None:
    assert console.format_duration(number) == line


def test_nothing_is_shown_after_a_stop() -> None:
    with console.show_progress(shown := on_terminal()) as display:
        display.update(HALFWAY)
        display.stop("stopping")
        display.update(replace(HALFWAY, phase=Phase.SETTLING))
    assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", read(shown)).endswith("\rstopping\n")


def test_what_rays_core_writes_is_not_for_the_user(capfd: pytest.CaptureFixture[str]) -> None:
    with console.capture_ray_output() as shown:
        os.write(2, b"core_worker.cc:2465: Actor with class name\n")
        print("(raylet) A worker died")
        os.write(1, b"core_worker.cc\n")
        print("ERROR services.py", file=sys.stderr)
        shown.print("ours")
    os.write(2, b"after\n")
    print("data")
    assert capfd.readouterr() == ("data\n", "ours\nafter\n")


@pytest.mark.parametrize(("cause", "shown"), [(ValueError("Ray's own"), "core_worker.cc\n"), (None, "")])
def test_what_rays_core_wrote_is_shown_if_it_broke_the_run(capfd: pytest.CaptureFixture[str], cause: Exception | None, shown: str) -> None:
    with pytest.raises(RunError), console.capture_ray_output():  # noqa: PT012  what is written inside is what is tested
        os.write(2, b"core_worker.cc\n")
        raise RunError("it broke") from cause
    assert capfd.readouterr().err == shown
