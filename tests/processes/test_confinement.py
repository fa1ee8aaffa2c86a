"""Confinement of a renderer, tried from inside: code that runs in the confined child, as an exploit of MuPDF would, gets nowhere.

Every attempt is an expression that the child evaluates. It counts as refused if the kernel says EPERM, EACCES or ENOSYS; that
something is missing would be another error. `test_without_confinement_the_attempts_succeed` shows that each would work otherwise.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.budget import RenderSettings
from pipeline.render.document import FILE_SIGNATURES, render_pages
from pipeline.render.landlock import query_landlock_abi
from pipeline.render.sandbox import Sandbox, describe_confinement
from pipeline.render.syscall_filter import CHECKED_CALLS, MACHINES, REFUSED_CALLS
from tests.support.hidden import ORDER, WAYS
from tests.support.hostile_files import make_hostile_files
from tests.support.pdfs import encode_image, make_page_pdf

pytestmark = pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in MACHINES, reason="confined on Linux only")

ATTACKER = """
import ctypes, errno, mmap, os, resource, signal, socket, stat, struct, subprocess, sys, threading
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from pipeline.records import Page
from pipeline.render import confine, landlock, syscall_filter, worker

REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOSYS)
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), number)
    return result

def attempt(code):
    try:
        return repr(eval(code))
    except OSError as error:
        return f"refused: {error}" if error.errno in REFUSALS else f"failed otherwise: {error}"
    except RuntimeError as error:
        return f"refused: {error}"

def open_document(data, settings):
    def draw(page_no):
        return Page(page_no, np.zeros((28, 28, 3), np.uint8), 1.0, 1.0, 1.0, 1, (), (attempt(data.decode()),))
    return SimpleNamespace(page_count=1, draw=draw)

%s
worker.serve_parent(int(sys.argv[1]), open_document)
"""
"""A worker whose documents are attempts, and each page of them says what became of it."""
NO_LANDLOCK = "landlock.query_landlock_abi = lambda: 0"
NO_FILTER = "confine.install_syscall_filter = lambda **_: False"
SAME_USER = "confine.take_own_user = lambda libc: True"
NOT_CONFINED = "worker.confine_process = lambda memory_bytes: []"
LEVELS = {
    "all": "",
    "as the same user": SAME_USER,
    "filter alone": f"{NO_LANDLOCK}; {SAME_USER}",
    "older kernel": NO_LANDLOCK,
}
"""How much of the confinement there is: root is tried without a user of its own, too, whom the modes of files would stop."""

CALL = {name: numbers[MACHINES.get(platform.machine(), (0, 0))[0]] for name, numbers in (REFUSED_CALLS | CHECKED_CALLS).items()}
SECRET = b"correct-horse-7391"
SECRET_IN_MEMORY = ctypes.create_string_buffer(SECRET)
ADDRESS = ctypes.addressof(SECRET_IN_MEMORY)
MARKER = f".pipeline-test-{os.getpid()}"

READS = {
    "the parent's environment": "open(f'/proc/{os.getppid()}/environ').read()",
    "the parent's map of memory": "open(f'/proc/{os.getppid()}/maps').read()",
    "the parent's memory": f"os.pread(os.open(f'/proc/{{os.getppid()}}/mem', os.O_RDONLY), 18, {ADDRESS})",
    "the parent's memory by a call": f"call({CALL['process_vm_readv']}, os.getppid(), iov(18), 1, iov(18, {ADDRESS}), 1, 0)",
    "the parent's descriptors": "os.listdir(f'/proc/{os.getppid()}/fd')",
    "the parent's stdin": "open(f'/proc/{os.getppid()}/fd/0', 'rb')",
    "the environment of the first process": "open('/proc/1/environ').read()",
    "passwords of users": "open('/etc/shadow').read()",
    "a private key": "open('{home}/.ssh/id_rsa').read()",
    "a cloud's keys": "open('{home}/.aws/credentials').read()",
    "Ray's token": "open('{home}/.ray/auth_token').read()",
    "a file that everybody may read": "open('{open}').read()",
    "the output": "open('{folder}/out/records/a.parquet').read()",
    "the job": "open('{folder}/job.yaml').read()",
    "a relative path": "(os.chdir('{folder}'), open('job.yaml').read())",
    "the names in a folder": "os.listdir('{home}')",
    "a file by openat2": "call(437, -100, b'{open}', struct.pack('QQQ', 0, 0, 0), 24)",
    "a file by its handle": f"call({CALL['name_to_handle_at']}, -100, b'{{open}}', handle(), ctypes.byref(ctypes.c_int()), 0)",
    "attributes of a file": "os.listxattr('{open}')",
    "shared memory": f"call({CALL['shmat']}, {{shared}}, 0, 0o10000)",
    "a socket in the file system": "socket.socket(socket.AF_UNIX).connect('{folder}/socket')",
    "an abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0{abstract}')",
}
PLACES = {
    "temporary files": "/tmp",
    "shared memory files": "/dev/shm",
    "temporary files that stay": "/var/tmp",
    "home": "{home}",
    "the working folder": ".",
    "installed packages": sysconfig.get_paths()["purelib"],
    "the output": "{folder}/out",
}
WRITES = {
    **{f"into {what}": f"open('{place}/{MARKER}', 'x').close()" for what, place in PLACES.items()},
    "to the end of a file": "open('{victim}', 'a').write('x')",
    "by openat2": f"call(437, -100, b'{{home}}/{MARKER}', struct.pack('QQQ', os.O_CREAT | os.O_RDWR, 0o600, 0), 24)",
    "a file without a name": "os.open('{home}', os.O_TMPFILE | os.O_RDWR)",
    "a shorter file": "os.truncate('{victim}', 0)",
    "a new name": f"os.rename('{{victim}}', '{{home}}/{MARKER}')",
    "a removed file": "os.unlink('{victim}')",
    "a removed folder": "os.rmdir('{home}/empty')",
    "a folder": f"os.mkdir('{{home}}/{MARKER}')",
    "a link": f"os.link('{{victim}}', '{{home}}/{MARKER}')",
    "a symbolic link": f"os.symlink('/etc', '{{home}}/{MARKER}')",
    "a pipe": f"os.mkfifo('{{home}}/{MARKER}')",
    "a mode": "os.chmod('{victim}', 0o777)",
    "an owner": "os.chown('{victim}', os.geteuid(), os.getegid())",
    "a time": "os.utime('{victim}', (1, 1))",
    "an attribute": "os.setxattr('{victim}', 'user.a', b'b')",
    "its own score for the kernel's choice": "open('/proc/self/oom_score_adj', 'w').write('0')",
}
SIGNALS = {
    "the parent": "os.kill(os.getppid(), 0)",
    "a bystander": "os.kill({bystander}, signal.SIGKILL)",
    "everybody": "os.kill(-1, 0)",
    "its group": "os.kill(0, 0)",
    "the parent's thread": f"call({CALL['tgkill']}, os.getppid(), os.getppid(), 0)",
    "a thread": f"call({CALL['tkill']}, os.getppid(), 0)",
    "the parent with a value": f"call({CALL['rt_sigqueueinfo']}, os.getppid(), 0, struct.pack('iii', 0, 0, -1) + bytes(116))",
    "the parent by a descriptor": "os.pidfd_open(os.getppid())",
    "the parent by the kernel": "fcntl.fcntl(0, 8, os.getppid())",
    "the parent's limits": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU)",
    "the parent's processors": "os.sched_setaffinity(os.getppid(), os.sched_getaffinity(0))",
    "the parent's priority": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 5)",
}
STARTS = {
    "a connection": "socket.socket().connect(('127.0.0.1', 9))",
    "another peer": f"call({CALL['connect']}, int(sys.argv[1]), struct.pack('H', 1) + b'\\0a', 4)",
    "a local pair": "socket.socketpair()",
    "a copy": "os.fork()",
    "a program": "subprocess.run(['/bin/true'])",
    "another program": "os.execv('/bin/true', ['true'])",
    "a process by clone": f"call({CALL['clone']}, 0x11, 0, 0, 0, 0)",
    "a process by clone3": "call(435, struct.pack('11Q', *[0] * 11), 88)",
    "a namespace": f"call({CALL['unshare']}, 0x10000000)",
    "a ring of calls": "call(425, 1, bytes(120))",
    "a trace": f"call({CALL['ptrace']}, 16, os.getppid(), 0, 0)",
}
HELPERS = """
import fcntl
def iov(size, address=None):
    iov.buffer = getattr(iov, "buffer", None) or ctypes.create_string_buffer(size)
    return struct.pack("QQ", ctypes.addressof(iov.buffer) if address is None else address, size)
def handle():
    return ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
"""


@pytest.fixture(scope="module")
def planted() -> Iterator[dict[str, object]]:
    """Secrets, a file to damage, and a process to kill: the values for the attempts' placeholders. Any user could reach all of them."""
    libc = ctypes.CDLL(None)
    with (
        tempfile.TemporaryDirectory(prefix=MARKER) as folder,
        tempfile.NamedTemporaryFile() as open_file,
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as abstract,
        subprocess.Popen(["sleep", "600"]) as bystander,
    ):
        home = Path(folder) / "home"
        secrets = ("home/.ssh/id_rsa", "home/.aws/credentials", "home/.ray/auth_token", "out/records/a.parquet", "job.yaml")
        for name in (*secrets, "home/victim"):
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).write_bytes(SECRET)
        (home / "empty").mkdir()
        open_file.write(SECRET)
        open_file.flush()
        os.chmod(open_file.name, 0o644)
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o777)  # what stops a renderer must not be a mode
        listener.bind(f"{folder}/socket")
        abstract.bind(f"\0{MARKER}")
        for one in (listener, abstract):
            one.listen()
        os.chmod(f"{folder}/socket", 0o777)
        shared = libc.shmget(0, 4096, 0o1666)
        try:
            yield {
                "folder": folder, "home": home, "victim": home / "victim", "open": open_file.name, "abstract": MARKER, "shared": shared,
                "bystander": bystander.pid,
            }  # fmt: skip
        finally:
            libc.shmctl(shared, 0, None)
            bystander.kill()
            for place in PLACES.values():
                with suppress(OSError):
                    os.unlink(f"{place.format(home=home, folder=folder)}/{MARKER}")


def start_attacker(folder: Path, change: str) -> Sandbox:
    script = folder / "attacker.py"
    script.write_text(ATTACKER % (HELPERS + change))
    sandbox = Sandbox(RenderSettings(timeout_s=30, memory_bytes=2**28))
    sandbox.program = (str(script),)
    sandbox.start_child()
    return sandbox


@pytest.fixture(scope="module", params=LEVELS.values(), ids=LEVELS)
def attacker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    if NO_LANDLOCK not in request.param and not query_landlock_abi():
        pytest.skip("this kernel has no Landlock")
    with start_attacker(tmp_path_factory.mktemp("attacker"), request.param) as sandbox:
        yield sandbox


def attempt(sandbox: Sandbox, code: str, planted: dict[str, object]) -> str:
    """Return what became of an attempt: "refused: …", or what it returned."""
    for name, value in planted.items():
        code = code.replace(f"{{{name}}}", str(value))
    sandbox.open(code.encode())
    (page,) = sandbox.draw_pages()
    return page.warnings[0]


def describe_tree(planted: dict[str, object]) -> dict[str, tuple[object, ...]]:
    """Return what can be changed of the planted files."""
    paths = sorted(Path(str(planted["folder"])).rglob("*"))
    states = {str(path): path.lstat() for path in paths}
    return {path: (state.st_mode, state.st_size, state.st_uid, state.st_mtime_ns, state.st_nlink) for path, state in states.items()}


@pytest.mark.parametrize("code", READS.values(), ids=READS)
def test_it_reads_no_secret(attacker: Sandbox, planted: dict[str, object], code: str) -> None:
    assert attempt(attacker, code, planted).startswith("refused: ")


@pytest.mark.parametrize("code", WRITES.values(), ids=WRITES)
def test_it_writes_nowhere(attacker: Sandbox, planted: dict[str, object], code: str) -> None:
    before = describe_tree(planted)
    assert attempt(attacker, code, planted).startswith("refused: ")
    assert describe_tree(planted) == before


@pytest.mark.parametrize("code", SIGNALS.values(), ids=SIGNALS)
def test_it_signals_and_changes_no_other_process(attacker: Sandbox, planted: dict[str, object], code: str) -> None:
    assert attempt(attacker, code, planted).startswith("refused: ")
    os.kill(int(str(planted["bystander"])), 0)


@pytest.mark.parametrize("code", STARTS.values(), ids=STARTS)
def test_it_starts_and_reaches_nothing(attacker: Sandbox, planted: dict[str, object], code: str) -> None:
    assert attempt(attacker, code, planted).startswith("refused: ")


def test_it_cannot_raise_its_limits(attacker: Sandbox, planted: dict[str, object]) -> None:
    for name in ("AS", "FSIZE", "NOFILE", "CORE"):
        same = f"len({{*resource.getrlimit(resource.RLIMIT_{name})}})"
        assert attempt(attacker, same, planted) == "1", name
    assert attempt(attacker, "libc.setrlimit(resource.RLIMIT_FSIZE, struct.pack('QQ', 2**30, 2**30))", planted) == "-1"


NO_FILES = ("attributes of a file", "shared memory", "a socket in the file system", "an abstract socket", "a file by its handle")
LANDLOCK_READS = [name for name in READS if name not in NO_FILES]
LANDLOCK_WRITES = [name for name in WRITES if name not in ("a mode", "an owner", "a time", "an attribute")]
LANDLOCK_SIGNALS = ["the parent", "a bystander", "the parent's thread", "a thread", "the parent with a value"]


@pytest.mark.skipif(query_landlock_abi() < 6, reason="older versions of Landlock restrict less")
def test_landlock_alone_is_a_fence(planted: dict[str, object], tmp_path: Path) -> None:
    attempts = [
        *(READS[name] for name in LANDLOCK_READS),
        *(WRITES[name] for name in LANDLOCK_WRITES),
        *(SIGNALS[name] for name in LANDLOCK_SIGNALS),
    ]
    with start_attacker(tmp_path, f"{NO_FILTER}; {SAME_USER}") as sandbox:
        results = {code: attempt(sandbox, code, planted) for code in attempts}
    assert {code: result for code, result in results.items() if not result.startswith("refused: ")} == {}


NOT_TO_SUCCEED = ("the parent's stdin", "an attribute", "the environment of the first process")
"""Attempts that may fail without confinement, too: stdin may be closed, a file system have no attributes, the first process be hidden."""


@pytest.mark.skipif(os.geteuid() != 0, reason="others are refused some of them anyway")
def test_without_confinement_the_attempts_succeed(planted: dict[str, object], tmp_path: Path) -> None:
    victim = Path(str(planted["victim"]))
    refused = {}
    with start_attacker(tmp_path, NOT_CONFINED) as sandbox:
        for name, code in (READS | WRITES | SIGNALS).items():
            result = attempt(sandbox, code, planted)
            if result.startswith(("refused", "failed")) and name not in NOT_TO_SUCCEED:
                refused[name] = result
            victim.write_bytes(SECRET)
            victim.parent.joinpath("empty").mkdir(exist_ok=True)
            made = victim.parent / MARKER
            made.rmdir() if made.is_dir() and not made.is_symlink() else made.unlink(missing_ok=True)
    assert refused == {}


# ---- What it needs is left to it --------------------------------------------------------------------------------------

pillow_heif = pytest.importorskip("pillow_heif")
pillow_heif.register_heif_opener()
NOISE = Image.effect_noise((280, 420), 90).convert("RGB")
NEWER = {f"whole.{kind.lower()}": encode_image(NOISE, kind) for kind in ("JPEG2000", "AVIF", "HEIF")}
FILES = make_hostile_files() | NEWER
WHOLE = {name: data for name, data in FILES.items() if name.startswith("whole.")}
OLDER_KERNEL = f"""
import sys
from pipeline.render import landlock, worker
from pipeline.render.document import open_document
{NO_LANDLOCK}
worker.serve_parent(int(sys.argv[1]), open_document)
"""
"""The worker itself on a kernel without Landlock, where it opens no file at all."""


def test_every_kind_of_document_is_tried_below() -> None:
    assert {name.rpartition(".")[2].upper() for name in WHOLE} | {"PDF"} == {*FILE_SIGNATURES}


@pytest.mark.parametrize("name", [*WHOLE, "several.mpo.jpeg", "palette-with-holes.gif", "page.pdf", "covered.pdf", "layered.pdf"])
def test_no_file_is_opened_to_draw_a_document(tmp_path: Path, name: str) -> None:
    made = {
        "page.pdf": make_page_pdf(content=b"BT /F 20 Tf 60 60 Td (Gr\374n 1) Tj ET"),
        "covered.pdf": WAYS["under a rectangle"](ORDER),
        "layered.pdf": WAYS["a layer that is off"](ORDER),
    }
    data = made.get(name) or FILES[name]
    (tmp_path / "worker.py").write_text(OLDER_KERNEL)
    with Sandbox(RenderSettings(text_layer=True)) as sandbox:
        sandbox.program = (str(tmp_path / "worker.py"),)
        sandbox.open(data)
        drawn = list(sandbox.draw_pages())
    expected = list(render_pages(data, RenderSettings(text_layer=True)))
    assert [page.words for page in drawn] == [page.words for page in expected]
    assert all(np.array_equal(ours.pixels, theirs.pixels) for ours, theirs in zip(drawn, expected, strict=True))


def test_it_may_signal_itself(attacker: Sandbox, planted: dict[str, object]) -> None:
    assert attempt(attacker, "os.kill(os.getpid(), 0)", planted) == "None"


@pytest.mark.skipif(not query_landlock_abi(), reason="without Landlock no file is opened")
def test_it_may_read_libraries(tmp_path: Path, planted: dict[str, object]) -> None:
    with start_attacker(tmp_path, SAME_USER) as sandbox:  # the user of root's renderer may not reach the libraries
        assert attempt(sandbox, "__import__('colorsys').__name__", planted) == "'colorsys'"


# ---- Parent and child in /proc ----------------------------------------------------------------------------------------


def read_status(process: int, name: str) -> list[str]:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(line.split()[1:] for line in lines if line.startswith(f"{name}:"))


def test_parent_and_child_are_hidden(attacker: Sandbox, planted: dict[str, object]) -> None:
    assert ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 0
    assert attempt(attacker, "libc.prctl(3, 0, 0, 0, 0)", planted) == "0"


def test_it_holds_its_three_streams_and_one_socket(attacker: Sandbox, planted: dict[str, object]) -> None:
    open_now = attempt(attacker, "[fd == int(sys.argv[1]) for fd in range(64) if libc.fcntl(fd, 1) >= 0]", planted)
    assert open_now == "[False, False, False, True]"


def test_it_has_no_capability_one_thread_and_is_killed_first(attacker: Sandbox) -> None:
    assert attacker.child is not None
    process = attacker.child.pid
    assert [read_status(process, name) for name in ("CapEff", "CapPrm", "Threads")] == [["0" * 16], ["0" * 16], ["1"]]
    assert Path(f"/proc/{process}/oom_score_adj").read_text() == "1000\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="an own user takes root")
def test_two_renderers_of_root_are_two_other_users() -> None:
    users = []
    with Sandbox(RenderSettings()) as one, Sandbox(RenderSettings()) as other:
        for sandbox in (one, other):
            sandbox.start_child()
            assert sandbox.child is not None
            users += [int(user) for user in read_status(sandbox.child.pid, "Uid")[:1]]
            assert read_status(sandbox.child.pid, "Groups") == []
    assert len({0, *users}) == 3


def test_a_renderer_of_another_user_can_be_killed(attacker: Sandbox, tmp_path: Path) -> None:
    with start_attacker(tmp_path, "") as sandbox:
        assert sandbox.child is not None
        sandbox.child.send_signal(signal.SIGKILL)
        assert sandbox.child.wait(10) == -signal.SIGKILL


def test_what_the_kernel_does_not_grant_is_said(tmp_path: Path) -> None:
    assert any(query_landlock_abi() or "no Landlock" in gap for gap in describe_confinement() or [""])
    with start_attacker(tmp_path, f"{NO_LANDLOCK}; {NO_FILTER}") as sandbox:
        assert "files: neither Landlock nor a system-call filter: a renderer can read and write what this user can" in sandbox.gaps
