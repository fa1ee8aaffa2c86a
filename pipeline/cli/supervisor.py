"""Process supervisor: runs a command in a child process and returns its exit status, also when that process ends without one.

Ray ends its driver by `_Exit(1)`, past all handlers, when its own node dies, and the kernel kills the process with most memory when
memory runs out. A scheduler would take the first for a run that has finished with failures, and the second would end without a
message. And the workers and agents that a killed driver leaves behind notice its end only after half a minute or more.

    this process         forwards signals
      the keeper         waits for the command, reports how it ended, kills what it has left; survives a SIGKILL of this process
        the command      dies with the keeper
          Ray, …         become the keeper's children when their parents end: the keeper is a subreaper
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from pipeline import cluster
from pipeline.processes import adopt_orphans, die_with_parent, kill_children, send_signal
from pipeline.scratch import open_scratch_folder, remove_scratch_folder

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LEAVE_S = 1.0
"""How long Ray's exit handlers may take when the command is over and leaves a cluster."""


def run_supervised(work: Callable[[], int], broken: Callable[[str], int]) -> int:
    """Run a function in a process of its own and return its exit status.

    If that process ends before the function does, `broken` gets a phrase that says how, and returns the status. Signals are forwarded
    to the function's process, which a terminal's Ctrl-C does not reach directly. It dies when this process is killed, and with it
    every process that it has started. The scratch folder is removed at the end.
    """
    if sys.platform != "linux":
        return work()
    with suppress(OSError):  # what needs the folder says that it cannot be made
        open_scratch_folder()
    here = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until there is a process to forward them to
    adopt_orphans()  # should the keeper be killed
    keeper = os.fork()
    if not keeper:
        run_keeper(work, broken, here)
    status = wait_for_child(keeper)
    kill_children()
    remove_scratch_folder()
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else broken(describe_end(status))


def run_keeper(work: Callable[[], int], broken: Callable[[str], int], parent: int) -> NoReturn:
    """The keeper: start the command, wait for it, kill what it has left, and exit with its status."""
    os.setpgid(0, 0)
    adopt_orphans()
    here = os.getpid()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        run_work(work, writing, here)
    os.close(writing)
    signal.signal(signal.SIGUSR1, lambda *_: send_signal(child, signal.SIGKILL))
    die_with_parent(parent, signal.SIGUSR1)  # which kills the command first
    status = wait_for_child(child)
    kill_children()
    sent = os.read(reading, 1)
    code = sent[0] if sent else broken(describe_end(status))
    sys.stdout.flush()
    os._exit(code)


def run_work(work: Callable[[], int], writing: int, parent: int) -> NoReturn:
    """The command: run it, and send its exit status to the keeper before an exit handler can end this process.

    The processes of a Ray that was started for it are killed by the keeper; to stop them takes a second.
    """
    os.setpgid(0, 0)
    die_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    code = work()
    os.write(writing, bytes([code]))
    if cluster.STARTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends this process
    signal.setitimer(signal.ITIMER_REAL, LEAVE_S)
    sys.exit(code)


def wait_for_child(process: int) -> int:
    """Wait for a child and return its wait status; forward signals to it, and reap other children that end in the meantime.

    From then on signals have no effect: a second Ctrl-C must not interrupt what is done after the child's end.
    """

    def forward(number: int, _: FrameType | None) -> None:
        send_signal(process, signal.Signals(number))

    for number in FORWARDED:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    ended, status = 0, 0
    while ended != process:
        ended, status = os.waitpid(-1, 0)
    return status


def describe_end(status: int) -> str:
    """Return a phrase for how a process ended that nothing had asked to end."""
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        return "it was killed, as the kernel does when memory runs out"
    if code < 0:
        return f"it ended by {signal.Signals(-code).name}"
    return f"it ended with status {code} and without a message, as Ray does when its node dies"
