"""Ray head of a test's own, with a job server, on loopback and behind a token: a cluster of one machine."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
STARTS = 4
"""On a busy machine Ray's own processes miss their deadline of 15 s (ray#65983)."""
PARENT, SESSION = 1, 3
"""Positions of these in /proc/PID/stat behind the name, from 0."""


IN_TURN = """\
import json, sys
from click.testing import CliRunner
from pipeline import cli
ended = [CliRunner().invoke(cli.main, command) for command in json.load(sys.stdin)]
print(json.dumps([[one.exit_code, one.stdout, one.stderr] for one in ended]))
"""


@dataclass(frozen=True)
class RayHead:
    """Addresses of the job server and of the head, and the environment that has their token."""

    jobs: str
    address: str
    environment: dict[str, str]

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of this package to its end, with the token."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(self, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, text=True, env=self.environment | environment, stdout=pipe, stderr=pipe)

    def run_in_turn(self, *commands: Sequence[str | Path]) -> list[subprocess.CompletedProcess[str]]:
        """Run short commands one after another in one process, whose start takes longer than they do."""
        lines = json.dumps([list(map(str, command)) for command in commands])
        program = [sys.executable, "-c", IN_TURN]
        ended = subprocess.run(program, input=lines, cwd=ROOT, text=True, env=self.environment, stdout=subprocess.PIPE, check=True)
        results = json.loads(ended.stdout.splitlines()[-1])
        return [subprocess.CompletedProcess(list(command), *result) for command, result in zip(commands, results, strict=True)]


@contextmanager
def start_head(cpus: int = 2, gpus: int = 0) -> Iterator[RayHead]:
    """Start a head, and end all its processes at the end."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets in it have paths of at most 107 bytes
    gcs, jobs, client = find_free_ports(3)
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0"}
    own["RAY_worker_niceness"] = "0"  # Ray's default is 15
    own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"
    options = {
        "temp-dir": folder, "port": gcs, "dashboard-host": "127.0.0.1", "dashboard-port": jobs, "dashboard-agent-listen-port": 0,
        "num-cpus": cpus, "num-gpus": gpus, "object-store-memory": 200_000_000,
        "ray-client-server-port": client, "include-log-monitor": False,  # neither is used here
    }  # fmt: skip
    command = ["ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    process = start_process(command, own)
    try:
        yield RayHead(f"http://127.0.0.1:{jobs}", f"127.0.0.1:{gcs}", own)
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def start_process(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a head and wait until it is up."""
    log: list[str] = []
    for _ in range(STARTS):
        process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            log = []
            for line in process.stdout or ():
                log.append(line)
                if "will now block forever" in line:
                    return process
        except BaseException:
            end(process)
            raise
        end(process)
    raise AssertionError("".join(log))


def end(process: subprocess.Popen[str]) -> None:
    """Kill a head and everything that it started; by itself it would wait half a minute for its work."""
    kill(SESSION, process.pid)
    process.communicate()


def kill(kin: int, pid: int) -> None:
    """Kill all processes that have this process as parent, or as session, whichever position `kin` is."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[kin]) == pid:
                os.kill(int(folder.name), signal.SIGKILL)


def find_free_ports(count: int) -> list[int]:
    """Return ports on which nothing listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
