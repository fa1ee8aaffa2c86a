"""Work in a child process, watched -> an exit status, also when the child ends without a word. Knows nothing of the work.

Ray ends its driver by `_Exit(1)`, past all handlers, when its own node dies, and the kernel kills whoever has most memory when
that runs out. A scheduler would take the one for a run that has finished with failures, and nobody would say a word
about the other. And what a killed driver leaves behind, Ray's agents notice only after a minute or more.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def watched(work: Callable[[], int], broken: Callable[[str], int]) -> int:
    """Do some work in a child of this process and return its exit status.

    If the child ends before the work does, `broken` is told how, and what it returns is the status. Signals go on to the child,
    which a terminal's Ctrl-C does not reach directly; it dies when this process is killed, and with it whatever it has started.
    """
    if sys.platform != "linux":
        return work()
    (reading, writing), (ending, living) = os.pipe(), os.pipe()
    here = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until there is somebody to send them on to
    child = os.fork()
    if not child:
        os.close(reading)
        os.close(ending)
        do(work, writing, here)
    os.close(writing)
    os.close(living)
    if not os.fork():
        clear(child, ending)
    os.close(ending)
    before = [signal.signal(number, lambda number, _: os.kill(child, number)) for number in FORWARDED]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    _, status = os.waitpid(child, 0)
    for number, listener in zip(FORWARDED, before, strict=True):
        signal.signal(number, listener)
    with os.fdopen(reading, "rb") as said:
        code = said.read()
    return code[0] if code else broken(how(status))


def clear(group: int, ending: int) -> NoReturn:
    """Another child, which nobody kills with the first: when that has ended, however, kill what it has left in its process group."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # who reads what the work says shall not wait for this
        os.dup2(nothing, stream)
    os.read(ending, 1)  # nothing is ever written there: this returns when the last who could is gone
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    os._exit(0)


def do(work: Callable[[], int], writing: int, parent: int) -> NoReturn:
    """The child: work, and say with which code it ended, before anything else can end this process."""
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    code = work()
    os.write(writing, bytes([code]))
    sys.exit(code)


def how(status: int) -> str:
    """Return how a process ended that nobody asked to."""
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        return "it was killed, as the kernel does when memory runs out"
    if code < 0:
        return f"it ended by {signal.Signals(-code).name}"
    return f"it ended with status {code} and without a word, as Ray does when its node dies"
