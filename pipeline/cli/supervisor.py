"""Work in a child process, watched -> an exit status, also when the child ends without a word. Knows nothing of the work.

Ray ends its driver by `_Exit(1)`, past all handlers, when its own node dies, and the kernel kills whoever has most memory when
that runs out. A scheduler would take the one for a run that has finished with failures, and nobody would say a word
about the other. And what a killed driver leaves behind, its workers and agents, notice only after half a minute or more.

    this process         passes signals on
      the keeper         waits for the work, says how it ended, and ends what it has left; lives on when this process is killed
        the work         dies with the keeper
          Ray, …         come to the keeper, as its children, when theirs die: it is their subreaper
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNAL_AT_PARENTS_DEATH, SUBREAPER = 1, 36
"""PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of prctl(2)."""
CLEARED_S = 10.0
"""How long is waited for killed processes to be gone: one may hang in a driver."""
REAP_PERIOD_S = 0.01


def run_supervised(work: Callable[[], int], broken: Callable[[str], int]) -> int:
    """Do some work in a process of its own and return its exit status.

    If that process ends before the work does, `broken` is told how, and what it returns is the status. Signals go on to the work,
    which a terminal's Ctrl-C does not reach directly; it dies when this process is killed, and with it whatever it has started.
    """
    if sys.platform != "linux":
        return work()
    here = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until there is somebody to send them on to
    set_process_option(SUBREAPER, 1)  # should the keeper be killed
    keeper = os.fork()
    if not keeper:
        run_keeper(work, broken, here)
    status = wait_for_child(keeper)
    kill_children()
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else broken(describe_end(status))


def run_keeper(work: Callable[[], int], broken: Callable[[str], int], parent: int) -> NoReturn:
    """The keeper: have the work done, end what it has left, and exit with its status."""
    os.setpgid(0, 0)
    set_process_option(SUBREAPER, 1)
    here = os.getpid()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        run_work(work, writing, here)
    os.close(writing)
    signal.signal(signal.SIGUSR1, lambda *_: send_signal(child, signal.SIGKILL))
    set_process_option(SIGNAL_AT_PARENTS_DEATH, signal.SIGUSR1)
    if os.getppid() != parent:
        send_signal(child, signal.SIGKILL)
    status = wait_for_child(child)
    kill_children()
    said = os.read(reading, 1)
    code = said[0] if said else broken(describe_end(status))
    sys.stdout.flush()
    os._exit(code)


def run_work(work: Callable[[], int], writing: int, parent: int) -> NoReturn:
    """The work: do it, and say with which code it ended, before anything else can end this process."""
    os.setpgid(0, 0)
    set_process_option(SIGNAL_AT_PARENTS_DEATH, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    if os.getppid() != parent:
        os._exit(1)
    code = work()
    os.write(writing, bytes([code]))
    sys.exit(code)


def wait_for_child(process: int) -> int:
    """Wait for a child and return its wait status; pass signals on to it, and let others that end here meanwhile go.

    Nobody listens to signals from then on: a second Ctrl-C shall not break off what is to be done after the end.
    """

    def forward(number: int, _: FrameType | None) -> None:
        send_signal(process, signal.Signals(number))

    for number in FORWARDED:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    found, status = 0, 0
    while found != process:
        found, status = os.waitpid(-1, 0)
    return status


def kill_children() -> None:
    """Kill the children of this process, and theirs, which become its own when they lose their parents."""
    deadline = time.monotonic() + CLEARED_S
    while time.monotonic() < deadline:
        for child in list_child_processes():
            send_signal(child, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(REAP_PERIOD_S)
        except ChildProcessError:
            return


def list_child_processes() -> Iterator[int]:
    """Yield the children of this process."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it is gone
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                yield int(folder.name)


def send_signal(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def set_process_option(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def describe_end(status: int) -> str:
    """Return how a process ended that nobody asked to."""
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        return "it was killed, as the kernel does when memory runs out"
    if code < 0:
        return f"it ended by {signal.Signals(-code).name}"
    return f"it ended with status {code} and without a word, as Ray does when its node dies"
