"""System-call filter: its program, executed here for both machines, and its numbers, compared with the system's headers."""

from __future__ import annotations

import errno
import os
import re
import struct
from pathlib import Path

import pytest

from pipeline.render.syscall_filter import ALLOW, CHECKED_CALLS, KILL, MACHINES, REFUSE, REFUSED_CALLS, Instruction, build_filter

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
UNKNOWN = 0x50000 | errno.ENOSYS
HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"),
    "aarch64": ("/usr/include/asm-generic/unistd.h",),
}
PROCESS = 4242
CALLS = REFUSED_CALLS | CHECKED_CALLS


def execute(program: list[Instruction], number: int, arguments: tuple[int, ...] = (), architecture: int = 0) -> int:
    """Return what a filter decides, as the kernel's BPF machine does."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    place, value = 0, 0
    while True:
        code, if_true, if_false, operand = program[place]
        if code == RETURN:
            return operand
        if code == LOAD:
            (value,) = struct.unpack_from("<I", data, operand)
            place += 1
            continue
        holds = {EQUAL: value == operand, AT_LEAST: value >= operand, ANY_BIT: bool(value & operand)}[code]
        place += 1 + (if_true if holds else if_false)


def decide(machine: str, call: str | int, *arguments: int, may_read: bool = True) -> int:
    column, architecture = MACHINES[machine]
    number = call if isinstance(call, int) else CALLS[call][column]
    assert number is not None
    return execute(build_filter(machine, PROCESS, may_read), number, arguments, architecture)


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_refused_is_refused_with_any_argument(machine: str) -> None:
    numbers = [numbers[MACHINES[machine][0]] for numbers in REFUSED_CALLS.values()]
    assert {decide(machine, number, PROCESS, PROCESS) for number in numbers if number is not None} == {REFUSE}


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_not_in_the_tables_is_allowed(machine: str) -> None:
    named = {numbers[MACHINES[machine][0]] for numbers in CALLS.values()}
    assert {decide(machine, number) for number in range(424) if number not in named} == {ALLOW}
    assert {decide(machine, number) for number in (424, 425, 435, 437, 452, 0x40000000, 0x400001F8, 0xFFFFFFFF)} == {UNKNOWN}


@pytest.mark.parametrize("machine", MACHINES)
def test_another_architectures_numbers_end_the_process(machine: str) -> None:
    assert execute(build_filter(machine, PROCESS, True), 0, architecture=0x40000003) == KILL


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("call", ["kill", "tkill", "tgkill", "prlimit64"])
def test_a_process_may_signal_and_limit_itself_alone(machine: str, call: str) -> None:
    others = (1, PROCESS + 1, 2**32 - 1, 2**32 - PROCESS)
    assert decide(machine, call, PROCESS) == ALLOW
    assert {decide(machine, call, other, PROCESS) for other in others} == {REFUSE}
    assert decide(machine, call, 0) == (ALLOW if call == "prlimit64" else REFUSE)


@pytest.mark.parametrize("machine", MACHINES)
def test_files_are_opened_for_reading_or_not_at_all(machine: str) -> None:
    openers = {"open": 1, "openat": 2} if machine == "x86_64" else {"openat": 2}
    for call, place in openers.items():
        before = (7,) * place
        assert decide(machine, call, *before, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK) == ALLOW
        for flags in (os.O_WRONLY, os.O_RDWR, 3, os.O_CREAT, os.O_TRUNC, os.O_APPEND, os.O_TMPFILE | os.O_RDWR, os.O_RDWR | os.O_CLOEXEC):
            assert decide(machine, call, *before, flags) == REFUSE
        assert decide(machine, call, *before, os.O_RDONLY, may_read=False) == REFUSE


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("call", "allowed", "refused"),
    [("fcntl", (1, 2, 3, 4, 1030), (8, 10, 15, 1024, 1026)), ("ioctl", (0x5401, 0x5451), (0x8901, 0x8902, 0x5412, 0x40086602))],
)
def test_commands_that_reach_others_are_refused(machine: str, call: str, allowed: tuple[int, ...], refused: tuple[int, ...]) -> None:
    assert {decide(machine, call, 0, command) for command in allowed} == {ALLOW}
    assert {decide(machine, call, 0, command) for command in refused} == {REFUSE}


@pytest.mark.parametrize("machine", MACHINES)
def test_a_thread_may_be_started_and_no_process(machine: str) -> None:
    assert decide(machine, "clone", 0x3D0F00) == ALLOW  # the flags of pthread_create
    assert decide(machine, "clone", 0x1200011) == REFUSE  # those of fork


@pytest.mark.parametrize("machine", MACHINES)
def test_the_numbers_are_those_of_the_headers(machine: str) -> None:
    header = next((Path(path) for path in HEADERS[machine] if Path(path).exists()), None)
    if header is None:
        pytest.skip("the kernel's headers are not installed")
    stated = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())}
    ours = {name: numbers[MACHINES[machine][0]] for name, numbers in CALLS.items()}
    assert ours == {name: stated.get(name) for name in CALLS}
