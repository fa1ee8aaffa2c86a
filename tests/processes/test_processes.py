"""Process primitives: what a process has started ends with it, also when it is killed."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl and F_SETSIG are Linux's own")
PATIENCE_S = 60
PARENT = """\
import os, signal, subprocess, sys, time
from pipeline import processes

{start}
print("ready", flush=True)
time.sleep(600)
"""
STARTS = {
    "die_with_parent": """
here = os.getpid()
if not os.fork():
    processes.die_with_parent(here)
    time.sleep(600)""",
    "die_when_pipe_closes": """
code = "import sys, time; from pipeline import processes; processes.die_when_pipe_closes(0); print(file=sys.stderr); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
child.stderr.readline()""",
    "OrphanKiller": """
child = subprocess.Popen(["setsid", "sleep", "600"])
processes.OrphanKiller().name_processes([child.pid])""",
}
"""Ways to start a child that ends with its parent. Each child holds its parent's stdout, which ends when nothing holds it."""


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_child_ends_when_its_parent_is_killed(start: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(start=start)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    assert parent.communicate(timeout=PATIENCE_S)[0] == ""
    assert parent.returncode == -signal.SIGKILL


def test_a_child_whose_parent_has_ended_already_ends_at_once() -> None:
    code = "from pipeline import processes; processes.die_with_parent(1 << 22); print('alive')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (ended.stdout, ended.returncode) == ("", -signal.SIGKILL)


def test_a_released_killer_kills_nothing() -> None:
    code = """
import subprocess
from pipeline.processes import OrphanKiller

child = subprocess.Popen(["sleep", "600"])
killer = OrphanKiller()
killer.name_processes([child.pid])
killer.release()
print(child.poll())
child.kill()
child.wait()
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S).stdout == "None\n"
