"""Confinement of the render process: takes away files, network, other processes, privileges, and memory beyond a limit.

What matters is restricted twice, because a system may not grant one of the two:

    files       Landlock: reads the folders of the interpreter and the libraries, writes nothing (`landlock.py`)
                system-call filter: opens nothing for writing, changes nothing; without Landlock, opens nothing (`syscall_filter.py`)
    network     an empty network namespace, which many containers do not grant; system-call filter
    processes   system-call filter: starts none, signals none but itself; Landlock from ABI 6 on (signals)
    secrets     PR_SET_DUMPABLE 0 in the parent, which has them (`sandbox.py`), and here; a user id of its own where the parent is root

A renderer opens no file after its confinement: `document.py` imports whatever it will need. That Landlock leaves the libraries readable
is for a library of another version that imports something late.

Memory: a process cannot have more bytes resident than mapped, and `RLIMIT_AS` limits the mapped bytes to those of an idle
renderer plus `memory_bytes`. So a document uses at most `memory_bytes` of real memory, plus 0.25 % for page tables.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

from pipeline.processes import die_when_pipe_closes, hide_process, set_process_option
from pipeline.render.landlock import ADDED_BY_ABI, restrict_files
from pipeline.render.syscall_filter import install_syscall_filter

PR_SET_NO_NEW_PRIVS = 38
CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000
CAP_KILL, CAP_SETGID, CAP_SETUID = 5, 6, 7
CAPABILITY_VERSION = 0x20080522
UNUSED_USERS = 1_900_000_000
"""User ids from here on are not assigned (https://systemd.io/UIDS-GIDS); a renderer takes the one that its process id leads to."""
NOBODY = 65534
"""The id in a user namespace that has no such high ones."""
SYSTEM_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64", "/etc/ld.so.cache")


def confine_process(memory_bytes: int) -> list[str]:
    """Drop what a renderer does not need, and limit the memory of this process to `memory_bytes` more than it has now.

    Returns a sentence for each restriction that the system does not grant.
    """
    # 1) limits that every system has
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 2**20), (resource.RLIMIT_NOFILE, 64)):
        set_resource_limit(limit, most)
    if sys.platform != "linux":
        return ["this system is not Linux: a renderer can read and write files, use the network and start programs"]
    # 2) what takes files or privileges that are about to go
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if the machine runs out of memory, the kernel kills this process first
    libc = ctypes.CDLL(None)
    set_process_option(PR_SET_NO_NEW_PRIVS, 1)
    has_own_network = libc.unshare(CLONE_NEWNET) == 0
    with open("/proc/self/statm") as memory_file:
        # 3) files, user, namespace of a user without privileges, capabilities
        abi = restrict_files(list_library_folders())
        has_own_user = take_own_user(libc)
        has_own_network = has_own_network or libc.unshare(CLONE_NEWNET | CLONE_NEWUSER) == 0
        drop_capabilities(libc)
        hide_process()
        with suppress(OSError):
            die_when_pipe_closes(sys.stdin.fileno())  # after the change of user: the kernel checks who asked for the signal
        # 4) system calls, and last the memory
        has_filter = install_syscall_filter(may_read=abi > 0)
        idle_bytes = int(memory_file.read().split()[0]) * resource.getpagesize()
    set_resource_limit(resource.RLIMIT_AS, idle_bytes + memory_bytes)
    return describe_gaps(abi, has_filter, has_own_network, has_own_user)


def list_library_folders() -> list[str]:
    """Return what a renderer may read: the folders of the standard library, of installed packages and of shared libraries.

    No folder that may hold a project or a user's files: not `sys.prefix`, nor all of `sys.path`.
    """
    paths = sysconfig.get_paths()
    installed = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    above = Path(paths["stdlib"]).parent
    shared = [str(above)] if above.name.startswith("lib") else []  # the libraries of an interpreter that brings its own
    elsewhere = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    packages = [folder for name, module in sys.modules.items() if "." not in name for folder in getattr(module, "__path__", ())]
    return [*dict.fromkeys((*installed, *shared, *elsewhere, *packages, *SYSTEM_FOLDERS))]


def take_own_user(libc: ctypes.CDLL) -> bool:
    """Become a user with an id of this process alone, if this process is root, and return False if root lacks the capabilities for it.

    CAP_KILL among them: the parent has to be able to kill this process afterwards.
    """
    if os.geteuid() != 0:
        return True
    sets = ctypes.create_string_buffer(24)  # effective, permitted and inheritable ones below 32, then those above
    libc.capget(struct.pack("=Ii", CAPABILITY_VERSION, 0), sets)
    if not all(struct.unpack_from("=I", sets)[0] >> needed & 1 for needed in (CAP_KILL, CAP_SETGID, CAP_SETUID)):
        return False
    for user in (UNUSED_USERS + os.getpid(), NOBODY):
        with suppress(OSError):
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            return True
    return False


def drop_capabilities(libc: ctypes.CDLL) -> None:
    """Give up all capabilities: root's, if it stayed root, and those that a new user namespace gives."""
    libc.capset(struct.pack("=Ii", CAPABILITY_VERSION, 0), bytes(24))


def describe_gaps(abi: int, has_filter: bool, has_own_network: bool, has_own_user: bool) -> list[str]:
    """Return a sentence for each restriction that is missing, given the version of Landlock (0 for none) and what was granted."""
    gaps = []
    if not has_filter and not abi:
        gaps.append("files: neither Landlock nor a system-call filter: a renderer can read and write what this user can")
    elif not abi:
        gaps.append("files: no Landlock (Linux 5.13 or newer, where it is enabled); the system-call filter refuses to open any file")
    elif missing := [what for since, what in ADDED_BY_ABI.items() if since > abi]:
        alone = "the system-call filter alone does" if has_filter else "nothing does"
        gaps.append(f"files: Landlock of ABI {abi} does not restrict {', '.join(missing)}; {alone}")
    if not has_filter:
        gaps.append("system calls: no filter (it takes Linux with seccomp on x86-64 or ARM64): a renderer can start and signal processes")
    if not has_own_network:
        alone = "the system-call filter alone keeps a renderer off the network" if has_filter else "a renderer can use the network"
        gaps.append(f"network: no namespace of its own is granted; {alone}")
    if not has_own_user:
        gaps.append("user: a root without CAP_SETUID, CAP_SETGID or CAP_KILL, or in a small user namespace: a renderer is root, too")
    return gaps


def limit_cpu_time(timeout_s: float) -> None:
    """Have the kernel end this process about 2 s of CPU time after a call's timeout, in case the parent cannot."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most, (_, hard) = int(used.ru_utime + used.ru_stime + timeout_s) + 2, resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def set_resource_limit(limit: int, most: int) -> None:
    """Set a limit of this process for good, or keep a lower one that it inherited."""
    _, hard = resource.getrlimit(limit)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(limit, (most, most))
