"""File fence by Landlock: takes folders and leaves this process able to read them, and no other file, and to write none.

Landlock is a security module of Linux (5.13 and newer, where it is enabled) that a process without privileges can use on itself. It
restricts what is opened from then on, not what is open already. A new version of its interface (ABI) can restrict more: see
`RIGHTS_BY_ABI`. It does not restrict changes of mode, owner, times and attributes: `syscall_filter.py` does.
https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from contextlib import suppress

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""System calls, with the same numbers on all machines."""
GET_VERSION, PATH_BENEATH = 1, 1
READ_FILE, READ_FOLDER = 1 << 2, 1 << 3
RIGHTS_BY_ABI = {1: (13, 0, 0), 2: (14, 0, 0), 3: (15, 0, 0), 4: (15, 2, 0), 5: (16, 2, 0), 6: (16, 2, 2)}
"""ABI -> how many rights there are on files, on TCP sockets and across the fence: each a bit, from the lowest."""
ADDED_BY_ABI = {3: "truncating files", 4: "TCP", 5: "commands to devices", 6: "signals and abstract sockets"}
"""ABI -> what it is the first to restrict, of what the system-call filter restricts, too."""


def query_landlock_abi() -> int:
    """Return the version of the kernel's Landlock, 0 where there is none."""
    return max(0, call_kernel(CREATE_RULESET, None, 0, GET_VERSION))


def restrict_files(readable: Iterable[str]) -> int:
    """Let this process read nothing but these folders and files, and write nothing, and return the ABI that was used.

    It returns 0 and restricts nothing where Landlock is missing. Paths that do not exist are left out. Needs PR_SET_NO_NEW_PRIVS; holds
    for the calling thread and those that it starts.
    """
    abi = query_landlock_abi()
    if not abi:
        return 0
    counts = RIGHTS_BY_ABI[min(abi, max(RIGHTS_BY_ABI))]
    rights = struct.pack("=QQQ", *((1 << count) - 1 for count in counts))  # struct landlock_ruleset_attr; older kernels take zeros
    ruleset = call_kernel(CREATE_RULESET, rights, len(rights), 0)
    if ruleset < 0:
        return 0
    try:
        for path in readable:
            with suppress(OSError):
                allow_reading(ruleset, path)
        return abi if call_kernel(RESTRICT_SELF, ruleset, 0) == 0 else 0
    finally:
        os.close(ruleset)


def allow_reading(ruleset: int, path: str) -> None:
    """Add a folder with all that is below it, or a file, to what may be read. Raises OSError."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rights = READ_FILE | READ_FOLDER if os.path.isdir(path) else READ_FILE
        call_kernel(ADD_RULE, ruleset, PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0)  # struct landlock_path_beneath_attr
    finally:
        os.close(descriptor)


def call_kernel(number: int, *arguments: int | bytes | None) -> int:
    """Return the result of a system call that the C library has no function for, -1 for an error."""
    given = [ctypes.c_long(argument) if isinstance(argument, int) else ctypes.c_char_p(argument) for argument in arguments]
    return int(ctypes.CDLL(None).syscall(ctypes.c_long(number), *given))
