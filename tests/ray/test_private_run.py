"""A local run is closed to others: its ports, its files, its temporary folder, its token, the URLs and the password that it reads.

The environment of these runs asks for the opposite: RAY_AUTH_MODE=disabled and umask 022.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow.parquet as pq
import pymupdf
import pytest

from tests.support.workspace import Workspace, draw_slip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes and sockets are found by /proc")
ROOT = Path(__file__).parents[2]
PATIENCE_S = 300
POLL_S = 0.3
PAGES = 24
PASSWORD, SIGNATURE = "pass-6f1f2c", "sig-9d3b7e"
LISTENING = "0A"
LOOPBACK = re.compile("[0-9A-F]{6}7F|0{24}01000000|0{16}FFFF0000[0-9A-F]{6}7F")
"""Addresses of /proc/net/tcp and tcp6: 127.0.0.0/8, ::1, and the former as an IPv6 address."""
JOIN_WITHOUT_TOKEN = """\
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)
    print("let in")
except AuthenticationError:
    print("refused")
"""


class SlipServer(BaseHTTPRequestHandler):
    """Serves a slip at every path, to those whose URL is signed."""

    def do_GET(self) -> None:
        data = draw_slip(1) if SIGNATURE in self.path else b""
        self.send_response(200 if data else 403)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def serve_slips() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), SlipServer) as server:
        Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@dataclass
class Observed:
    """What was seen of a run."""

    code: int = 0
    out: str = ""
    err: str = ""
    open_sockets: set[str] = field(default_factory=set)
    """Sockets that listen off loopback, with the title of their process."""
    programs: set[str] = field(default_factory=set)
    """Of the processes that listen."""
    titles: set[str] = field(default_factory=set)
    """Of its processes."""
    readable: set[str] = field(default_factory=set)
    """Files and folders with a right for the group or others."""
    leaks: set[str] = field(default_factory=set)
    """Where the token, the password or a signature stood, other than in `sources/`."""
    scratch: Path = Path("/nonexistent")
    refused: str = ""
    """What a process without the token says."""


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("private"))
    for page in range(PAGES):
        workspace.put(f"{page}.pdf", draw_slip(page))
    encrypted = pymupdf.open(stream=draw_slip(PAGES), filetype="pdf")
    workspace.put("locked.pdf", encrypted.tobytes(encryption=pymupdf.PDF_ENCRYPT_AES_256, owner_pw="owner", user_pw=PASSWORD))
    return workspace


@pytest.fixture(scope="module")
def runs(private: Workspace) -> list[Observed]:
    """A run that is killed with its supervisor, and one to its end, over the same documents."""
    with serve_slips() as url:
        (private.folder / "list.txt").write_text(f"{url}/a.pdf?id=1&{SIGNATURE}\n{url}/a.pdf?id=2&{SIGNATURE}\n{url}/b.pdf?late\n")
        killed, complete = Observed(), Observed()
        watch_run(start_run(private), private, killed, kill=True)
        watch_run(start_run(private), private, complete, kill=False)
    return [killed, complete]


def start_run(workspace: Workspace) -> subprocess.Popen[str]:
    settings = ["source.paths=[in, list.txt]", "source.password_env=SLIP_PASSWORD", "source.allow_private=true", "model.batch_size=1"]
    command = [sys.executable, "-m", "pipeline.cli", "run", str(workspace.file), "--log", str(workspace.folder / "out.log"), "--json"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= {"RAY_AUTH_MODE": "disabled", "SLIP_PASSWORD": PASSWORD}
    return subprocess.Popen(
        [*command, *(word for setting in settings for word in ("--set", setting))],
        cwd=ROOT, text=True, env=own, umask=0o022, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def watch_run(run: subprocess.Popen[str], workspace: Workspace, seen: Observed, kill: bool) -> None:
    """Look at a run until it ends, or until it has written a shard and its processes of this package are killed all at once."""
    token, before = "", list_shards(workspace)
    deadline = time.monotonic() + PATIENCE_S
    while run.poll() is None and time.monotonic() < deadline:
        family = list_family(run.pid)
        look_at_sockets(family, seen)
        seen.titles |= set(map(read_title, family))
        for process in family:
            environment = read_environment(process)
            token = environment.get("RAY_AUTH_TOKEN", token)
            if "RAY_AUTH_TOKEN" in environment and environment.get("TMPDIR", "").startswith("/tmp/pipeline-"):
                seen.scratch = Path(environment["TMPDIR"])
            if any(secret and secret in read_title(process) for secret in (token, PASSWORD, SIGNATURE)):
                seen.leaks.add(read_title(process))
        look_at_files(seen.scratch, (token, PASSWORD), seen)
        look_at_files(workspace.folder / "out", (token, PASSWORD, SIGNATURE), seen)
        seen.refused = seen.refused or join_without_token(family)
        if kill and list_shards(workspace) != before:
            for process in family:
                if "pipeline.cli" in read_title(process):
                    os.kill(process, signal.SIGKILL)
        time.sleep(POLL_S)
    seen.out, seen.err = run.communicate(timeout=PATIENCE_S)
    seen.code = run.returncode
    look_at_files(workspace.folder / "out", (token, PASSWORD, SIGNATURE), seen)
    look_at_files(workspace.folder / "out.log", (token, PASSWORD, SIGNATURE), seen)
    assert token


def list_shards(workspace: Workspace) -> set[Path]:
    return set((workspace.folder / "out" / "requests").glob("*.parquet"))


def list_family(first: int) -> list[int]:
    """Return a process, its descendants, and what else is in its session."""
    parents: dict[int, tuple[int, int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            _, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            parents[int(folder.name)] = int(parent), int(session)
    family = {first} | {process for process, (_, session) in parents.items() if session == first}
    while more := {process for process, (parent, _) in parents.items() if parent in family} - family:
        family |= more
    return sorted(family)


def read_title(process: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def read_environment(process: int) -> dict[str, str]:
    with suppress(OSError):
        words = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
        return {name: value for name, _, value in (word.partition("=") for word in words)}
    return {}


def look_at_sockets(family: list[int], seen: Observed) -> None:
    """Note the listening sockets of these processes."""
    listening: dict[str, str] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == LISTENING:
                listening[f"socket:[{inode}]"] = address
    for process in family:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{process}/fd").iterdir():
                with suppress(OSError):
                    if address := listening.get(os.readlink(descriptor)):
                        seen.programs.add(re.sub(r".*/", "", read_title(process).partition(" ")[0]))
                        if not LOOPBACK.fullmatch(address.partition(":")[0]):
                            seen.open_sockets.add(f"{read_title(process)[:80]} {address}")


def look_at_files(top: Path, secrets: tuple[str, ...], seen: Observed) -> None:
    """Note the files and folders here that others may read, and those that hold a secret.

    Ray makes its own folders 0777, within one that nobody else enters.
    """
    for path in (top, *top.rglob("*")):
        with suppress(OSError):
            mode = path.lstat().st_mode
            if not stat.S_ISLNK(mode) and mode & 0o077 and not (stat.S_ISDIR(mode) and seen.scratch in path.parents):
                seen.readable.add(f"{path} {mode:o}")
            if stat.S_ISREG(mode) and path.parent.name != "sources":
                data = path.read_bytes()
                seen.leaks |= {f"{path}: {secret}" for secret in secrets if secret and secret.encode() in data}
            elif stat.S_ISREG(mode) and path.suffix == ".parquet":
                shown = pq.read_table(path).drop_columns("full_url").to_pylist()
                seen.leaks |= {f"{path}: {secret}" for secret in secrets if secret and secret in str(shown)}


def join_without_token(family: list[int]) -> str:
    """Return what a process says that wants to know the nodes of the run's Ray, if that runs, and has no token."""
    addresses = {found[1] for process in family if (found := re.search(r"--gcs-address=(\S+)", read_title(process)))}
    if not addresses:
        return ""
    command = [sys.executable, "-c", JOIN_WITHOUT_TOKEN, addresses.pop()]
    return subprocess.run(command, env=os.environ | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True).stdout.strip()


def test_no_socket_listens_off_loopback(runs: list[Observed]) -> None:
    assert {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= runs[1].programs
    assert [seen.open_sockets for seen in runs] == [set(), set()]


def test_ray_starts_no_process_that_a_run_on_one_machine_does_not_need(runs: list[Observed]) -> None:
    assert any("/raylet" in title for title in runs[1].titles)
    assert not [title for title in runs[1].titles if re.search(r"/(log_)?monitor\.py|/dashboard\.py", title)]
    assert not [title for title in runs[1].titles if re.search("StatsActor|AutoscalingCoordinator|ActorLocationTracker", title)]


def test_a_process_without_the_token_is_refused(runs: list[Observed]) -> None:
    assert [seen.refused for seen in runs] == ["refused", "refused"]


def test_no_file_is_readable_by_others(runs: list[Observed]) -> None:
    assert runs[1].scratch.parent == Path("/tmp")
    assert [seen.readable for seen in runs] == [set(), set()]


def test_the_scratch_folder_goes_with_the_run(runs: list[Observed]) -> None:
    assert not runs[1].scratch.exists()


def test_the_scratch_folder_goes_when_every_process_of_the_run_is_killed(runs: list[Observed]) -> None:
    assert runs[0].code == -signal.SIGKILL
    deadline = time.monotonic() + PATIENCE_S
    while runs[0].scratch.exists() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    assert not runs[0].scratch.exists()


def test_token_password_and_signature_are_written_nowhere(runs: list[Observed]) -> None:
    assert [seen.leaks for seen in runs] == [set(), set()]
    assert not [secret for seen in runs for secret in (PASSWORD, SIGNATURE) if secret in seen.out + seen.err]


def test_each_url_has_its_row_and_the_password_opens_its_document(runs: list[Observed], private: Workspace) -> None:
    report = json.loads(runs[1].out)
    assert (report["statuses"], report["failures"]) == ({"extracted": PAGES + 3, "failed": 1}, {"source/unreadable": 1})
    shown = [row["_source"] for row in pq.read_table(private.folder / "out" / "records").to_pylist() if "?" in row["_source"]]
    assert sorted(re.sub(r"^http://[^/]*|[0-9a-f]{16}$", "", name) for name in shown) == ["/a.pdf?…", "/a.pdf?…", "/b.pdf?…"]
    assert SIGNATURE in str(pq.read_table(private.folder / "out" / "sources")["full_url"].to_pylist())
