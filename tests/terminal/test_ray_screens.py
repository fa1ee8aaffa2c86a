"""Screens of real runs: Ray and the demonstration model in a terminal of 80 columns, to the end and stopped by Ctrl-C."""

from __future__ import annotations

import re
import sys

import pytest

from tests.support.terminal import CTRL_C, Terminal
from tests.support.workspace import Workspace, draw_slip
from tests.terminal.test_screens import ANSWER_S, END_S, FOREIGN, PHASES, ROOT, STOPPED, STOPPING, list_bars

COMMAND = [sys.executable, "-m", "pipeline.cli", "run", "job.yaml", "--set", "model.batch_size=1"]
PATIENCE_S = 300.0
"""For what takes 20 s on an idle machine."""


def start(workspace: Workspace, documents: int) -> Terminal:
    for number in range(documents):
        workspace.put(f"{number}.pdf", draw_slip(number))
    return Terminal(COMMAND, folder=workspace.folder, variables={"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""})


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    with start(Workspace(tmp_path_factory.mktemp("ended")), 3) as terminal:
        assert terminal.wait_for_end(PATIENCE_S) == 0
    return terminal


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    with start(Workspace(tmp_path_factory.mktemp("stopped")), 60) as terminal:
        terminal.wait_for(lambda screen: re.search(r"asking +[1-9]\d*/60 ", screen.last), PATIENCE_S)
        terminal.press(CTRL_C)
        assert terminal.wait_for_end(PATIENCE_S) == 130
    return terminal


def test_every_phase_has_a_line(ended: Terminal) -> None:
    lines = [line for line in ended.screen.lines if re.match(rf"({'|'.join(PHASES)}) +\d", line)]
    assert [line[:17].strip() for line in lines] == PHASES


def test_the_total_is_on_the_bar_from_the_listing_on(ended: Terminal) -> None:
    listed_s = ended.find_first("3 documents").at_s
    assert [screen.last for screen in list_bars(ended) if screen.at_s >= listed_s and "3 documents" not in screen.last] == []


def test_the_last_line_is_that_of_the_run(ended: Terminal) -> None:
    assert ended.screen.last == "records: out/records"


def test_a_run_that_is_stopped_answers_at_once_and_ends_soon(stopped: Terminal) -> None:
    assert stopped.screen.lines[-2:] == (STOPPING, STOPPED)
    assert stopped.find_first(STOPPING).at_s - stopped.pressed_s < ANSWER_S
    assert stopped.ended_s - stopped.pressed_s < END_S


@pytest.mark.parametrize("run", ["ended", "stopped"])
def test_no_other_program_writes_to_the_terminal(run: str, request: pytest.FixtureRequest) -> None:
    terminal: Terminal = request.getfixturevalue(run)
    assert FOREIGN.findall(terminal.text) == []
    assert terminal.list_wide_lines() == []
