"""Screens of `pipeline run` in a terminal of 80 and 140 columns, in a dumb one and in a file. The run is scripted, its noise is Ray's.

What Ray itself does to a terminal is in `test_ray_screens.py`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from pipeline.report import Phase
from tests.support.terminal import CTRL_C, Terminal, TerminalScreen
from tests.support.workspace import Workspace

ROOT = Path(__file__).parents[2]
DOCUMENTS = 5
FOREIGN = re.compile("traceback|ray(let|::)|colorama|retries", re.IGNORECASE)
"""Words of other programs; a phase is called `starting Ray`."""
STYLE, HIDE_CURSOR = re.compile(r"\x1b\[[0-9;]*m"), "\x1b[?25l"
STOPPING = "stopping: the answers so far are being written"
STOPPED = "stopped; the answers so far are kept: run the same command again to go on"
PHASES = [phase.value for phase in Phase if phase is not Phase.READING]
"""The scripted run has no OCR."""
ANSWER_S, END_S = 5.0, 30.0
"""Bounds for a busy machine. On two idle cores a run answers Ctrl-C within 0.1 s and ends within 5 s."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = Workspace(tmp_path_factory.mktemp("job"))
    for number in range(DOCUMENTS):
        workspace.put(f"{number}.pdf", b"")
    return workspace.folder


COMMAND = [sys.executable, "-m", "tests.support.scripted_run", "run", "job.yaml"]


def start(folder: Path, columns: int = 80, command: list[str] = COMMAND, **variables: str) -> Terminal:
    return Terminal(command, columns, folder=folder, variables={"PYTHONPATH": str(ROOT), **variables})


def run_in_terminal(folder: Path, columns: int = 80, command: list[str] = COMMAND, **variables: str) -> Terminal:
    """Return the terminal of a run that has succeeded."""
    with start(folder, columns, command, **variables) as terminal:
        assert terminal.wait_for_end() == 0
    return terminal


def run_in_pipe(folder: Path, *arguments: str, **given: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **given}
    return subprocess.run([*COMMAND, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=120, env=variables)


def list_phases(lines: Iterable[str]) -> list[str]:
    """Return the phases that have a line with their time."""
    found = [re.match(rf"({'|'.join(PHASES)}) +\d+\.\d s( |$)", line) for line in lines]
    return [match[1] for match in found if match]


def list_bars(terminal: Terminal) -> list[TerminalScreen]:
    """Return the screens whose last line is the bar."""
    return [screen for screen in terminal.screens if "━" in screen.last]


@pytest.fixture(scope="module")
def narrow(folder: Path) -> Terminal:
    return run_in_terminal(folder)


def test_a_run_at_80_columns(narrow: Terminal) -> None:
    assert list_phases(narrow.screen.lines) == PHASES
    assert narrow.screen.last == "records: out/records"
    assert [line for line in narrow.screen.lines if "━" in line] == []
    assert not FOREIGN.search(narrow.text)
    assert narrow.list_wide_lines() == []


def test_the_total_is_shown_as_soon_as_it_is_known(narrow: Terminal) -> None:
    listed_s = narrow.find_first(f"{DOCUMENTS} documents").at_s
    bars = [screen.last for screen in list_bars(narrow) if screen.at_s >= listed_s]
    assert [phase for phase in PHASES if any(f" {phase} " in bar for bar in bars)] == PHASES
    assert [bar for bar in bars if f"{DOCUMENTS} documents" not in bar] == []


def test_messages_stand_above_the_bar(narrow: Terminal) -> None:
    notice = "No GPU here: the DEMONSTRATION MODEL of this package answers instead of"
    assert [screen for screen in list_bars(narrow) if notice in screen.lines]
    assert [line for line in narrow.list_lines() if notice in line] == [notice]


def test_a_run_at_140_columns_without_color(folder: Path) -> None:
    terminal = run_in_terminal(folder, 140, NO_COLOR="1")
    assert list_phases(terminal.screen.lines) == PHASES
    assert terminal.screen.last == "records: out/records"
    assert not FOREIGN.search(terminal.text)
    assert terminal.list_wide_lines() == []
    assert [code for code in STYLE.findall(terminal.text) if re.search(r"[349]\d", code)] == []


def test_ctrl_c_has_an_answer_and_an_end(folder: Path) -> None:
    with start(folder, PAUSE_S="1") as terminal:
        terminal.wait_for("asking")
        terminal.press(CTRL_C)
        assert terminal.wait_for_end() == 130
    assert terminal.find_first(STOPPING).at_s - terminal.pressed_s < ANSWER_S
    assert terminal.ended_s - terminal.pressed_s < END_S
    assert terminal.screen.lines[-2:] == (STOPPING, STOPPED)
    assert not FOREIGN.search(terminal.text)


def test_a_run_that_is_killed_leaves_no_bar(folder: Path) -> None:
    with start(folder, DIE_IN=Phase.ASKING.value) as terminal:
        assert terminal.wait_for_end() == 3
    assert "error: the run's process is gone: it was killed, as the kernel does" in terminal.screen.text
    assert [line for line in terminal.screen.lines if "━" in line] == []
    assert HIDE_CURSOR not in terminal.text


def test_a_terminal_that_becomes_narrow(folder: Path) -> None:
    with start(folder, 140) as terminal:
        terminal.wait_for(Phase.LOADING_MODEL.value)
        terminal.resize(60)
        terminal.wait_for(Phase.ASKING.value)
        assert terminal.wait_for_end() == 0
    bars = [screen.last for screen in list_bars(terminal) if re.search(" (asking|settling) ", screen.last)]
    assert bars
    assert [bar for bar in bars if len(bar) > 60] == []
    assert [line for line in terminal.screen.lines[-8:] if len(line) > 60] == []


def test_a_dumb_terminal_gets_lines(folder: Path) -> None:
    terminal = run_in_terminal(folder, TERM="dumb")
    assert list_phases(terminal.screen.lines) == PHASES
    assert terminal.screen.last == "records: out/records"
    assert "\x1b" not in terminal.text
    assert list_bars(terminal) == []


def test_a_file_gets_lines(folder: Path) -> None:
    ended = run_in_pipe(folder)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert list_phases(ended.stderr.splitlines()) == PHASES
    assert ended.stderr.endswith("\nrecords: out/records\n")
    assert [char for char in ended.stderr if not char.isprintable() and char != "\n"] == []
    assert not FOREIGN.search(ended.stderr)


def test_json_is_alone_on_stdout(folder: Path) -> None:
    ended = run_in_pipe(folder, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["documents"] == DOCUMENTS


def test_a_run_that_is_killed_is_json(folder: Path) -> None:
    ended = run_in_pipe(folder, "--json", DIE_IN=Phase.ASKING.value)
    found = json.loads(ended.stdout)
    assert (ended.returncode, found["exit_code"], found["error"]["kind"]) == (3, 3, "run")
    assert found["error"]["message"].startswith("the run's process is gone: it was killed, as the kernel does")
    assert ended.stderr == f"error: {found['error']['message']}\n"


def test_a_run_that_is_terminated_is_json(folder: Path, tmp_path: Path) -> None:
    variables, log = {**os.environ, "PYTHONPATH": str(ROOT), "PAUSE_S": "1"}, tmp_path / "events.jsonl"
    command = [*COMMAND, "--json", "--log", str(log)]
    with subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables) as run:
        while not (log.exists() and log.stat().st_size) and run.poll() is None:
            time.sleep(0.05)
        run.terminate()
        found = json.loads(run.communicate(timeout=120)[0])
    error = {"kind": "terminated", "message": STOPPED, "file": None, "key": None}
    assert (run.returncode, found) == (143, {"error": error, "exit_code": 143})


def test_events_on_stderr_are_not_mixed_with_a_bar(folder: Path) -> None:
    terminal = run_in_terminal(folder, command=[*COMMAND, "--log", "-"])
    assert list_phases(terminal.screen.lines) == PHASES
    assert '"event": "scripted"' in terminal.screen.text
    assert list_bars(terminal) == []
