"""Scratch folder: a folder with mode 0700 for the temporary files of a run, removed when the last process that knows it has ended.

A process that ends by SIGKILL removes nothing. A shell therefore holds the other end of a pipe, which the kernel closes then, and
removes the folder. Processes that are forked from the one that made the folder share it; processes of other programs do not hold
the pipe. Standard library only.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

PRIVATE_UMASK = 0o077
"""No rights for the group and others on what a process makes."""
MAX_BASE_CHARS = 32
"""Longest path of the folder that holds the scratch folder. Ray's sockets, 70 characters below it, may have paths of 107 bytes."""
REMOVE_AT_END_OF_INPUT = 'while read -r line; do :; done; for pause in 0 1 4 15 40; do sleep $pause; rm -rf -- "$1"; done'
"""Several times: processes of the run that are still ending may write into it again."""


@cache
def open_scratch_folder() -> Path:
    """Return this run's scratch folder; the first call makes it. Raises OSError."""
    folder = tempfile.mkdtemp(prefix="pipeline-", dir=find_scratch_base())
    reading, _ = os.pipe()  # the other end stays open as long as this process, and is closed in programs that it starts
    null = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
    command = ["/bin/sh", "-c", REMOVE_AT_END_OF_INPUT, "sh", folder]
    os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, reading, 0), *null], setsid=True)
    os.close(reading)
    return Path(folder)


def find_scratch_base() -> str:
    """Return where the scratch folder is made: RAY_TMPDIR, TMPDIR or /tmp, the first that is set and short enough."""
    wanted = [os.environ[name] for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    return next((base for base in wanted if len(os.fsencode(base)) <= MAX_BASE_CHARS), "/tmp")


def remove_scratch_folder() -> None:
    """Remove the scratch folder now, if there is one. To be called when the run's processes have ended."""
    if open_scratch_folder.cache_info().currsize:
        shutil.rmtree(open_scratch_folder(), ignore_errors=True)
