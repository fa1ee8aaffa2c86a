"""A Ray head of its own, with its job server and Ray's client server, on loopback and behind a token: a cluster of one machine."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
STARTS = 4
"""On a busy machine Ray's own processes miss their deadline of 15 s (ray#65983)."""
PARENT, SESSION = 1, 3
"""Where /proc says so of a process, after its name and from 0."""


@dataclass(frozen=True)
class RayHead:
    """Where a head is spoken to, and the environment of who may."""

    jobs: str
    address: str
    environment: dict[str, str]

    def pipeline(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of this package to its end, as someone who has the token."""
        run = self.start(*arguments, **environment)
        out, err = run.communicate()
        return subprocess.CompletedProcess(run.args, run.returncode, out, err)

    def start(self, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, text=True, env=self.environment | environment, stdout=pipe, stderr=pipe)


@contextmanager
def start_head(cpus: int = 2) -> Iterator[RayHead]:
    """Start a head, and end all its processes at the end."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets in it have paths of at most 107 bytes
    gcs, jobs, client = free_ports(3)
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0"}
    own["RAY_worker_niceness"] = "0"  # Ray lets whoever else works on the machine go before it
    own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"
    options = {
        "temp-dir": folder, "port": gcs, "dashboard-host": "127.0.0.1", "dashboard-port": jobs, "ray-client-server-port": client,
        "num-cpus": cpus, "num-gpus": 0, "object-store-memory": 200_000_000, "dashboard-agent-listen-port": 0,
    }  # fmt: skip
    command = ["ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    process = started(command, own)
    try:
        yield RayHead(f"http://127.0.0.1:{jobs}", f"127.0.0.1:{gcs}", own)
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def started(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a head and wait until it is up."""
    words: list[str] = []
    for _ in range(STARTS):
        process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            words = []
            for line in process.stdout or ():
                words.append(line)
                if "will now block forever" in line:
                    return process
        except BaseException:
            end(process)
            raise
        end(process)
    raise AssertionError("".join(words))


def end(process: subprocess.Popen[str]) -> None:
    """End a head at once, with all that it has started; by itself it would wait half a minute for its work."""
    kill(SESSION, process.pid)
    process.communicate()


def kill(kin: int, pid: int) -> None:
    """Kill all processes whose parent, or whose session, this one is."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[kin]) == pid:
                os.kill(int(folder.name), signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
