"""This process -> one that can do little harm: no network, no children, little memory. Knows nothing of documents.

What a kernel or system does not know is left as it is, so each thing a renderer must not do is forbidden by more than
one means where that is cheap: no network by an empty network namespace (which many containers do not grant) and by a
filter of system calls (which every Linux of x86-64 or ARM64 does).

Memory: a process cannot have more bytes resident than mapped, and what is mapped has a limit, on top of what an idle
renderer has. So a document costs at most `memory_bytes` of real memory, a quarter of a percent of page tables aside.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import signal
import struct
import sys
from contextlib import suppress

from pipeline.processes import die_when_pipe_closes, set_process_option

NO_NEW_PRIVILEGES, SET_FILTER = 38, 22
NEW_NETWORK, NEW_USER = 0x40000000, 0x10000000
FORBIDDEN = {
    # machine: (its name in the kernel's audit, sockets, children and programs, others' memory, io_uring)
    "x86_64": (0xC000003E, 41, 42, 49, 50, 53, 56, 57, 58, 59, 322, 435, 101, 311, 425),
    "aarch64": (0xC00000B7, 198, 199, 200, 201, 203, 220, 221, 281, 435, 117, 271, 425),
}
"""Numbers of the calls socket, connect, bind, listen, socketpair, clone, fork, vfork, execve, execveat, clone3, ptrace,
process_vm_writev and io_uring_setup, from asm/unistd_64.h and asm-generic/unistd.h. They answer EPERM."""
OTHER_NUMBERS = 0x40000000
"""x86-64's second set of numbers for the same calls begins here."""
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000


def confine_process(memory_bytes: int) -> None:
    """Give up what a renderer does not need, and let memory grow by so much at most."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 2**20), (resource.RLIMIT_NOFILE, 64)):
        set_resource_limit(limit, most)
    if sys.platform != "linux":
        return
    with suppress(OSError):
        die_when_pipe_closes(sys.stdin.fileno())
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # should the machine's memory run out, this process goes first, and no neighbour
    libc = ctypes.CDLL(None, use_errno=True)
    set_process_option(NO_NEW_PRIVILEGES, 1)
    if libc.unshare(NEW_NETWORK) != 0:
        libc.unshare(NEW_NETWORK | NEW_USER)
    install_syscall_filter(libc)
    with open("/proc/self/statm") as file:
        idle_bytes = int(file.read().split()[0]) * resource.getpagesize()
    set_resource_limit(resource.RLIMIT_AS, idle_bytes + memory_bytes)


def install_syscall_filter(libc: ctypes.CDLL) -> None:
    """Have the kernel refuse the forbidden system calls, here and in whatever this process might become."""
    if platform.machine() not in FORBIDDEN:
        return
    machine, *calls = FORBIDDEN[platform.machine()]
    refuse = len(calls) + 1
    lines = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, machine), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0), (AT_LEAST, refuse, 0, OTHER_NUMBERS)]
    lines += [(EQUAL, refuse - after, 0, call) for after, call in enumerate(calls, 1)]
    lines += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    described = struct.pack("@HP", len(lines), ctypes.addressof(program))
    libc.prctl(SET_FILTER, 2, described, 0, 0)


def limit_cpu_time(timeout_s: float) -> None:
    """Let the kernel end this process when one call has used its time, should the parent be unable to."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    set_resource_limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + timeout_s) + 2)


def set_resource_limit(limit: int, most: int) -> None:
    """Set a limit of this process, or keep a tighter one that it was born with."""
    _, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
