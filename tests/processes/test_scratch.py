"""Scratch folder: private, short, and removed however the process ends that made it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """\
import os, signal
from pipeline import scratch
folder = scratch.open_scratch_folder()
(folder / "a").write_text("")
os.fork() or signal.pause()
print(folder, oct(folder.stat().st_mode & 0o777), flush=True)
signal.pause()
"""
PATIENCE_S = 30


def start_program(**environment: str) -> tuple[subprocess.Popen[str], Path, str]:
    """Start a process that makes a scratch folder and forks; return it, the folder and its mode."""
    command = [sys.executable, "-c", PROGRAM]
    process = subprocess.Popen(command, env=os.environ | environment, text=True, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    folder, mode = process.stdout.readline().split()
    return process, Path(folder), mode


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_is_private_and_goes_with_the_last_process(number: signal.Signals) -> None:
    process, folder, mode = start_program()
    assert (mode, [file.name for file in folder.iterdir()]) == ("0o700", ["a"])
    os.kill(process.pid, number)
    process.wait()
    time.sleep(0.3)
    assert folder.exists()  # the fork lives
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + PATIENCE_S
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not folder.exists()


def test_it_is_where_the_environment_says_unless_that_is_too_long_for_a_socket(tmp_path: Path) -> None:
    for place, expected in (("/dev/shm", "/dev/shm"), (str(tmp_path / ("long" * 10)), "/tmp")):
        process, folder, _ = start_program(RAY_TMPDIR=place)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert str(folder.parent) == expected
