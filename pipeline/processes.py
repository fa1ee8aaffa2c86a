"""Process primitives of Linux: how a process ends with its parent, and how it ends what it has started.

    die_with_parent         the kernel sends a signal when the thread that started this process ends
    die_when_pipe_closes    the kernel kills this process when the last process that holds the other end of a pipe ends
    OrphanKiller            a second process that kills processes of other programs when this one ends
    adopt_orphans           grandchildren whose parents end become children of this process …
    kill_children           … which kills them
    hide_process            other processes of the same user cannot look into this one

All of them but the last hold when a process ends by SIGKILL, which runs no handler. Standard library only.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

PARENT_DEATH_SIGNAL, DUMPABLE, CHILD_SUBREAPER = 1, 4, 36
"""PR_SET_PDEATHSIG, PR_SET_DUMPABLE and PR_SET_CHILD_SUBREAPER of prctl(2)."""
KILL_AT_END_OF_INPUT = "while read -r line; do processes=$line; done; kill -9 $processes"
KILL_TIMEOUT_S = 10.0
"""How long to wait for killed processes to end: one may hang in a device driver."""
REAP_PERIOD_S = 0.01


def set_process_option(option: int, value: int) -> None:
    """Call prctl(2). What the kernel refuses stays as it was."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def hide_process() -> None:
    """Keep other processes of the same user from this one's environment, memory and open files in /proc, and from ptrace.

    It holds in forked children and ends with an execve. Root is not kept out. It costs the core dumps, and debuggers and py-spy need root.
    """
    if sys.platform == "linux":
        set_process_option(DUMPABLE, 0)


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send this process a signal when the thread that forked it ends, or now if the parent has ended already.

    A parent whose main thread forks ends with that thread; use die_when_pipe_closes for one that forks from other threads.
    """
    set_process_option(PARENT_DEATH_SIGNAL, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def die_when_pipe_closes(pipe: int) -> None:
    """Have the kernel kill this process when the other end of a pipe is closed, which the death of its last holder does.

    Unlike die_with_parent this means the whole parent process, not one thread of it. Raises OSError.
    """
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_ASYNC)


class OrphanKiller:
    """Kills processes when this process ends: those of a library that does not end them itself.

    A shell holds a pipe from this process, reads process ids from it, and kills the last ones named when the pipe closes.
    """

    def __init__(self) -> None:
        self.shell = subprocess.Popen(
            ["/bin/sh", "-c", KILL_AT_END_OF_INPUT], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, bufsize=0
        )

    def name_processes(self, processes: Iterable[int]) -> None:
        """Replace the processes that are killed."""
        if self.shell.stdin and (line := " ".join(map(str, processes))):
            self.shell.stdin.write(f"{line}\n".encode())

    def release(self) -> None:
        """End the shell; it kills nothing."""
        self.shell.kill()
        self.shell.communicate()


def adopt_orphans() -> None:
    """Become the parent of every descendant whose parent ends."""
    set_process_option(CHILD_SUBREAPER, 1)


def kill_children() -> None:
    """Kill the children of this process and, after adopt_orphans, their descendants; wait until all have ended, at most KILL_TIMEOUT_S."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while time.monotonic() < deadline:
        for child in list_child_processes():
            send_signal(child, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(REAP_PERIOD_S)
        except ChildProcessError:
            return


def list_child_processes() -> Iterator[int]:
    """Yield the ids of this process's children."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                yield int(folder.name)


def send_signal(process: int, number: signal.Signals) -> None:
    """Send a signal to a process, unless it has ended."""
    with suppress(ProcessLookupError):
        os.kill(process, number)
