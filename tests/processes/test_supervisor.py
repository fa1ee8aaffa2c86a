"""Supervisor: a command whose process dies still has an exit status, and nothing that it has started outlives it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is supervised")
PROGRAM = """\
import os, signal, sys, time
from pipeline.cli.supervisor import run_supervised

def work():
    {work}

sys.exit(run_supervised(work, lambda how: print(how, flush=True) or 3))
"""
PATIENCE_S = 60


def start_program(work: str) -> subprocess.Popen[str]:
    """Start a process that runs this code, supervised."""
    code = PROGRAM.format(work=work.replace("\n", "\n    "))
    return subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, start_new_session=True)


@pytest.mark.parametrize("code", [0, 1, 143])
def test_a_command_that_ends_has_its_own_code(code: int) -> None:
    run = start_program(f"return {code}")
    assert (run.communicate(timeout=PATIENCE_S)[0], run.returncode) == ("", code)


@pytest.mark.parametrize(
    ("death", "phrase"),
    [
        ("os._exit(1)", "it ended with status 1 and without a message, as Ray does when its node dies"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "it was killed, as the kernel does when memory runs out"),
        ("os.abort()", "it ended by SIGABRT"),
    ],
)
def test_a_process_that_dies_is_distinguished_from_a_command_that_ends(death: str, phrase: str) -> None:
    run = start_program(death)
    assert (run.communicate(timeout=PATIENCE_S)[0], run.returncode) == (phrase + "\n", 3)


def test_a_process_that_dies_after_its_command_has_succeeded() -> None:
    run = start_program("import atexit\natexit.register(os._exit, 1)\nreturn 0")
    assert (run.communicate(timeout=PATIENCE_S)[0], run.returncode) == ("", 0)


def test_exit_handlers_have_a_limited_time() -> None:
    run = start_program(f"import atexit\natexit.register(time.sleep, {2 * PATIENCE_S})\nreturn 0")
    assert (run.communicate(timeout=PATIENCE_S)[0], run.returncode) == ("", 0)


def test_exit_handlers_are_left_out_where_the_command_has_started_ray() -> None:
    handler = "import atexit\natexit.register(print, 'handler')"
    run = start_program(f"{handler}\nfrom pipeline import cluster\ncluster.STARTED.add('here')\nprint('done')\nreturn 1")
    assert (run.communicate(timeout=PATIENCE_S)[0], run.returncode) == ("done\n", 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_forwarded(number: signal.Signals) -> None:
    run = start_program(f"signal.signal({int(number)}, lambda *_: sys.exit(9))\nprint('ready', flush=True)\ntime.sleep({PATIENCE_S})")
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    run.send_signal(number)
    assert "status 9" in run.communicate(timeout=PATIENCE_S)[0]


def test_a_signal_after_the_end_changes_nothing() -> None:
    late = (
        PROGRAM.format(work="return 0").replace("sys.exit(", "code = (")
        + "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.1)\nsys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", late], timeout=PATIENCE_S, start_new_session=True).returncode == 0


STARTED = {
    "child": "import subprocess\nsubprocess.Popen(['sleep', '600'])",
    "session of its own": "import subprocess\nsubprocess.Popen(['setsid', 'sh', '-c', 'sleep 600 & sleep 600'])",
}
"""Processes that a command leaves behind. Each holds its stdout, which ends when nothing holds it any more."""


@pytest.mark.parametrize("started", STARTED.values(), ids=STARTED)
@pytest.mark.parametrize(
    "death", ["return 0", "os._exit(1)", *(f"os.kill({who}, 9)\ntime.sleep(600)" for who in ("os.getpid()", "os.getppid()"))]
)
def test_what_the_command_has_started_ends_with_it(death: str, started: str) -> None:
    run = start_program(f"{started}\n{death}")
    run.communicate(timeout=PATIENCE_S)
    assert run.returncode == (0 if death == "return 0" else 3)


@pytest.mark.parametrize("started", STARTED.values(), ids=STARTED)
def test_a_command_and_what_it_has_started_die_with_their_supervisor(started: str) -> None:
    run = start_program(f"{started}\nprint('ready', flush=True)\ntime.sleep(600)")
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    run.kill()
    run.communicate(timeout=PATIENCE_S)
    assert run.returncode == -signal.SIGKILL
