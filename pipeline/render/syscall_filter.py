"""System-call filter (seccomp) of the render process: takes a table of system calls and installs a BPF program that refuses them.

    refused always        REFUSED_CALLS: network, processes, other processes, changes of files, shared memory and messages
    refused as unknown    FIRST_NEW_CALL and later: no library needs them, because kernels of 2018 did not have them
    refused by argument   signals to and limits of other processes, commands of fcntl and ioctl, opening files, clone for a process

It holds also after an execve and is the same for every user. A filter cannot read what a pointer points to, so it cannot tell one
path from another: that is done by Landlock (`landlock.py`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> the column of its numbers below, and the number of its architecture in linux/audit.h."""
REFUSED_CALLS: dict[str, tuple[int | None, int | None]] = {
    # network
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    # new processes and programs, namespaces, the kernel's interpreters
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "unshare": (272, 97),
    "setns": (308, 268), "perf_event_open": (298, 241), "bpf": (321, 280), "userfaultfd": (323, 282), "io_setup": (206, 0),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122), "sched_setattr": (314, 274), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # files: made, moved, removed, changed, opened in other ways
    "creat": (85, None), "truncate": (76, 45), "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "unlink": (87, None), "unlinkat": (263, 35), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "mknod": (133, None), "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "uselib": (134, None), "inotify_init": (253, None), "inotify_init1": (294, 26),
    "fanotify_init": (300, 262), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "getxattr": (191, 8), "lgetxattr": (192, 9), "fgetxattr": (193, 10),
    "listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    # shared memory, messages and keys of other processes, the kernel's log
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193), "semtimedop": (220, 192),
    "semctl": (66, 191), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "mq_unlink": (241, 181), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "syslog": (103, 116),
}  # fmt: skip
"""System call -> its numbers in asm/unistd_64.h (x86-64) and asm-generic/unistd.h (ARM64, which lacks some); it fails with EPERM."""
CHECKED_CALLS: dict[str, tuple[int | None, int | None]] = {
    "clone": (56, 220), "open": (2, None), "openat": (257, 56), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "prlimit64": (302, 261), "fcntl": (72, 25), "ioctl": (16, 29),
}  # fmt: skip
"""System calls that are refused or not by one argument."""
FIRST_NEW_CALL = 424
"""From here on (Linux 5.1) all machines have the same numbers: io_uring, openat2, pidfd_open, clone3, …; they fail with ENOSYS, as on
older kernels, and C libraries fall back. On x86-64 a second set of numbers for all calls (the x32 ABI) is far above it."""
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: not F_SETOWN, which has the kernel send signals to others."""
IOCTL_COMMANDS = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS (isatty), FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: not FIOSETOWN, nor TIOCSTI, which types into a terminal."""
CLONE_THREAD = 0x10000
"""The flag of a clone that starts a thread and no process. libde265 (HEIC) decodes in one; threads share all limits of their process."""
WRITING_FLAGS = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | os.O_APPEND
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
"""Results of the filter: SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO with EPERM, SECCOMP_RET_KILL_PROCESS."""
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
"""Offsets in `struct seccomp_data`; each argument has 8 bytes, of which the kernel uses the lower 4 of those that are checked here."""

Instruction = tuple[int, int, int, int]
"""(code, how many instructions to skip if true, and if false, operand)"""


def install_syscall_filter(*, may_read: bool) -> bool:
    """Install the filter for this process, and return whether the system has taken it.

    Files can be opened for reading if `may_read` is set, otherwise not at all.
    """
    if platform.machine() not in MACHINES:
        return False
    program = build_filter(platform.machine(), os.getpid(), may_read)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    sock_fprog = struct.pack("@HP", len(program), ctypes.addressof(code))
    return bool(ctypes.CDLL(None).prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, sock_fprog, 0, 0) == 0)


def build_filter(machine: str, process: int, may_read: bool) -> list[Instruction]:
    """Return the program for a machine and the process that it is for."""
    column, architecture = MACHINES[machine]
    program: list[Instruction] = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)]
    program += [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, FIRST_NEW_CALL), (RETURN, 0, 0, 0x00050000 | errno.ENOSYS)]
    for numbers in REFUSED_CALLS.values():
        program += match_call(numbers[column], [(RETURN, 0, 0, REFUSE)])
    checks = {name: allow_values(0, (process,)) for name in ("kill", "tkill", "tgkill")}
    checks["clone"] = allow_bits(0, CLONE_THREAD)
    checks["prlimit64"] = allow_values(0, (0, process))
    checks |= {"fcntl": allow_values(1, FCNTL_COMMANDS), "ioctl": allow_values(1, IOCTL_COMMANDS)}
    for argument, name in enumerate(("open", "openat"), 1):
        checks[name] = refuse_bits(argument, WRITING_FLAGS) if may_read else [(RETURN, 0, 0, REFUSE)]
    for name, check in checks.items():
        program += match_call(CHECKED_CALLS[name][column], check)
    return [*program, (RETURN, 0, 0, ALLOW)]


def match_call(number: int | None, then: list[Instruction]) -> list[Instruction]:
    """Return the instructions that end with a result for one call, and go on for others; none if the machine has no such call."""
    return [] if number is None else [(EQUAL, 0, len(then), number), *then]


def allow_values(argument: int, values: tuple[int, ...]) -> list[Instruction]:
    """Return the instructions that allow a call if this argument has one of these values, and refuse it otherwise."""
    tests: list[Instruction] = [(EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
    return [(LOAD, 0, 0, FIRST_ARGUMENT + 8 * argument), *tests, (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]


def allow_bits(argument: int, bits: int) -> list[Instruction]:
    """Return the instructions that allow a call if this argument has any of these bits, and refuse it otherwise."""
    return [(LOAD, 0, 0, FIRST_ARGUMENT + 8 * argument), (ANY_BIT, 0, 1, bits), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]


def refuse_bits(argument: int, bits: int) -> list[Instruction]:
    """Return the instructions that refuse a call if this argument has any of these bits, and allow it otherwise."""
    return [(LOAD, 0, 0, FIRST_ARGUMENT + 8 * argument), (ANY_BIT, 0, 1, bits), (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
