"""Confinement of the render process: takes away network, child processes, large files and memory beyond a limit.

A restriction that the kernel or the system does not support is skipped, so what matters is restricted twice where that is
cheap: the network by an empty network namespace (which many containers do not grant) and by a seccomp filter of system
calls (which every Linux on x86-64 or ARM64 has).

Memory: a process cannot have more bytes resident than mapped, and `RLIMIT_AS` limits the mapped bytes to those of an idle
renderer plus `memory_bytes`. So a document uses at most `memory_bytes` of real memory, plus 0.25 % for page tables.
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

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000
AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Machine -> the number of its architecture in linux/audit.h."""
FORBIDDEN_CALLS = {
    "x86_64": {
        "socket": 41, "connect": 42, "bind": 49, "listen": 50, "socketpair": 53,
        "fork": 57, "vfork": 58, "execve": 59, "execveat": 322,
        "ptrace": 101, "process_vm_writev": 311, "io_uring_setup": 425,
    },
    "aarch64": {
        "socket": 198, "socketpair": 199, "bind": 200, "listen": 201, "connect": 203,
        "execve": 221, "execveat": 281,
        "ptrace": 117, "process_vm_writev": 271, "io_uring_setup": 425,
    },
}  # fmt: skip
"""Machine -> system calls that fail with EPERM, with their numbers in asm/unistd_64.h and asm-generic/unistd.h."""
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE_THREAD = 0x10000
"""The flag of a clone that starts a thread and no process. Threads are allowed, because libde265 (HEIC) decodes in one; they share all
limits of their process. clone3 has its flags in memory, which a filter does not see, and fails as on a kernel without it: the C library
then calls clone."""
CLONE3 = 435
X32_CALLS = 0x40000000
"""On x86-64 a second set of numbers for the same system calls (the x32 ABI) begins here."""
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE, UNKNOWN, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
"""Results of the filter: SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO with EPERM or ENOSYS, SECCOMP_RET_KILL_PROCESS."""


def confine_process(memory_bytes: int) -> None:
    """Drop what a renderer does not need, and limit the memory of this process to `memory_bytes` more than it has now."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 2**20), (resource.RLIMIT_NOFILE, 64)):
        set_resource_limit(limit, most)
    if sys.platform != "linux":
        return
    with suppress(OSError):
        die_when_pipe_closes(sys.stdin.fileno())
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if the machine runs out of memory, the kernel kills this process first
    libc = ctypes.CDLL(None, use_errno=True)
    set_process_option(PR_SET_NO_NEW_PRIVS, 1)
    if libc.unshare(CLONE_NEWNET) != 0:
        libc.unshare(CLONE_NEWNET | CLONE_NEWUSER)
    install_syscall_filter(libc)
    with open("/proc/self/statm") as file:
        idle_bytes = int(file.read().split()[0]) * resource.getpagesize()
    set_resource_limit(resource.RLIMIT_AS, idle_bytes + memory_bytes)


def install_syscall_filter(libc: ctypes.CDLL) -> None:
    """Install a seccomp filter that refuses the forbidden system calls, also after an execve.

    The filter is a BPF program of (code, jump if true, jump if false, operand): it loads the architecture (offset 4 of
    `struct seccomp_data`), then the number of the call (offset 0), and compares that with each forbidden number; of clone it
    loads the flags, too (offset 16).
    """
    if platform.machine() not in FORBIDDEN_CALLS:
        return
    architecture, calls = AUDIT_ARCHITECTURES[platform.machine()], FORBIDDEN_CALLS[platform.machine()].values()
    to_refuse = len(calls) + 6
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)]
    program += [(LOAD, 0, 0, 0), (AT_LEAST, to_refuse, 0, X32_CALLS)]
    program += [(EQUAL, to_refuse - index, 0, call) for index, call in enumerate(calls, 1)]
    program += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, UNKNOWN), (EQUAL, 0, 2, CLONE[platform.machine()])]
    program += [(LOAD, 0, 0, 16), (ANY_BIT, 0, 1, CLONE_THREAD), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    sock_fprog = struct.pack("@HP", len(program), ctypes.addressof(code))
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, sock_fprog, 0, 0)


def limit_cpu_time(timeout_s: float) -> None:
    """Have the kernel end this process about 2 s of CPU time after a call's timeout, in case the parent cannot."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    set_resource_limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + timeout_s) + 2)


def set_resource_limit(limit: int, most: int) -> None:
    """Set a limit of this process, or keep a lower one that it inherited."""
    _, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
