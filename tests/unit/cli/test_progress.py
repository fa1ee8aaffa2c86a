"""Progress of a run: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from pipeline.cli import progress
from pipeline.report import Phase, Progress

HALFWAY = Progress(phase=Phase.ASKING, documents=4, documents_done=1, pages_done=6, requests_done=2, failed=1, elapsed_s=4)
HALFWAY = replace(HALFWAY, failures={"render/broken": 1}, engine_busy_share=0.93)


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
    monkeypatch.setattr(progress, "LINE_PERIOD_S", 0.01)
    with progress.show_progress(shown := Console(file=StringIO(), width=120)) as display:
        display.update(HALFWAY)
        assert wait_for(shown, "0.1 s  1/4 documents, 6 pages, 1.5 pages/s, 1 failed (render/broken), engine busy 93 %, 12 s left\n")
    assert "\x1b" not in read(shown)


def test_each_phase_ends_with_a_line() -> None:
    with progress.show_progress(shown := Console(file=StringIO(), width=120)) as display:
        for phase, documents in ((Phase.LISTING, None), (Phase.LISTING, 4), (Phase.STARTING_RAY, 4), (Phase.ASKING, 4)):
            display.update(replace(HALFWAY, phase=phase, documents=documents))
    assert read(shown).splitlines() == [
        "listing             0.0 s  4 documents",
        "starting Ray        0.0 s",
        "asking              0.0 s  1/4 documents, 6 pages, 1.5 pages/s, 1 failed (render/broken), engine busy 93 %",
    ]


def test_a_listing_says_how_many_documents_it_has_found() -> None:
    for done, total, line in ((0, None, ""), (1, None, "1 document so far"), (9, None, "9 documents so far"), (0, 0, "0 documents")):
        assert progress.format_counts(replace(HALFWAY, phase=Phase.LISTING, documents=total, documents_done=done)) == line


def test_while_a_listing_goes_on_the_documents_are_those_so_far() -> None:
    now = replace(HALFWAY, documents=40_000, is_listing=True)
    assert progress.format_counts(now).startswith("1/40000 documents so far, ")
    with progress.show_progress(on_terminal()) as display:
        display.update(now)
        assert isinstance(display, progress.PhaseBar)
        assert display.bar.tasks[0].total is None
        display.update(replace(now, is_listing=False))
        assert display.bar.tasks[0].total == 40_000


def test_beside_json_there_is_nothing_but_messages() -> None:
    with progress.show_progress(shown := on_terminal(), quiet=True) as display:
        display.update(HALFWAY)
        display.stop("stopping")
    assert read(shown) == "stopping\n"


def test_the_bar_shows_pages_per_second() -> None:
    with progress.show_progress(shown := on_terminal()) as display:
        display.update(HALFWAY)
    assert "asking 1/4 documents, 12 s left, 1 failed (render/broken), 1.5 pages/s, 6 pages" in read(shown)


@pytest.mark.parametrize(
    ("room", "text"),
    [
        (200, "asking 1/4 documents, 12 s left, 1 failed (render/broken), 1.5 pages/s, 6 pages, engine busy 93 %"),
        (72, "asking 1/4 documents, 12 s left, 1 failed (render/broken), 1.5 pages/s"),
        (40, "asking 1/4 documents, 12 s left"),
        (5, "asking"),
    ],
)
def test_a_narrow_bar_leaves_out_what_matters_least(room: int, text: str) -> None:
    assert progress.format_bar(HALFWAY, 7, room) == text


def test_while_the_end_cannot_be_estimated_the_time_so_far_is_shown() -> None:
    assert progress.format_bar(replace(HALFWAY, documents_done=0), 7, 36) == "asking 0/4 documents, 7 s"
    assert progress.format_bar(None, 0, 36) == "checking the job, 0 s"


def test_failures_are_named_by_kind() -> None:
    kinds = {"render/a": 1, "render/b": 3, "render/c": 2}
    assert progress.format_failures(replace(HALFWAY, failed=6, failures=kinds)) == "6 failed (render/b 3, render/c 2, render/a 1)"
    assert progress.format_failures(replace(HALFWAY, failed=7, failures=kinds | {"d": 1})).endswith("render/a 1, …)")
    assert progress.format_failures(replace(HALFWAY, failed=0, failures={})) == "0 failed"


def test_nothing_is_shown_after_a_stop() -> None:
    with progress.show_progress(shown := on_terminal()) as display:
        display.update(HALFWAY)
        display.stop("stopping")
        display.update(replace(HALFWAY, phase=Phase.SETTLING))
    assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", read(shown)).endswith("\rstopping\n")
