"""`pipeline run` in a process of its own -> its processes, how it ended, and what it left on the disk.

Linux only: processes are found by /proc, by the session that each run has for itself. Knows neither what is done to a
run (`faults.py`) nor what should have come out (`reliability.py`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
POLL_S = 0.03
Ledger = dict[tuple[str, int], list[Any]]
"""(key, attempt) -> when each of its rows was asked; one row each, if all is well."""


@dataclass(frozen=True)
class Member:
    """A process of a run."""

    pid: int
    parent: int
    title: str


@dataclass(frozen=True)
class Ended:
    """What became of a run."""

    code: int | None
    """Exit status; None for a run that did not end in time, and was killed."""
    report: dict[str, Any]
    """What it said as JSON; empty if it said nothing."""
    err: str
    noise: str
    """What stood on stdout beside the JSON, where nothing should."""
    gone_s: float
    """How long its processes stayed when the driver had ended."""
    left: list[str]
    """Its processes that were still there when one had waited for them to go."""

    @property
    def done(self) -> bool:
        """It came to its end; Ray ends a driver without a word and with 1, too."""
        return self.code in (0, 1) and bool(self.report)


class Run:
    """A run in a session of its own."""

    started_here: ClassVar[list[Run]] = []

    def __init__(self, job: Path, output: Path, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "pipeline.cli", "run", str(job), "--output", str(output), "--json", *arguments]
        own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.said = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115  `end` closes them
        out, err = self.said
        self.started = time.monotonic()
        self.driver = subprocess.Popen(command, cwd=ROOT, env=own, start_new_session=True, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        self.started_here.append(self)

    @classmethod
    def kill_all(cls) -> None:
        """Kill what an interrupted benchmark leaves."""
        for member in (member for run in cls.started_here for member in run.members()):
            send(member, signal.SIGKILL)

    @property
    def going(self) -> bool:
        return self.driver.poll() is None

    def members(self) -> list[Member]:
        """Return the processes of this session that still run, the driver among them."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.driver.pid and state != "Z":
                    title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    found.append(Member(int(folder.name), int(parent), title))
            except (OSError, ValueError):  # it ended meanwhile
                continue
        return found

    def find(self, word: str) -> list[Member]:
        return [member for member in self.members() if word in member.title]

    def wait(self, happened: Callable[[], object], patience_s: float) -> bool:
        """Wait until something has happened; return False when the run ended first or patience did."""
        deadline = time.monotonic() + patience_s
        while self.going and time.monotonic() < deadline:
            if happened():
                return True
            time.sleep(POLL_S)
        return False

    def end(self, patience_s: float) -> Ended:
        """Wait for the run and then for its processes; kill what stays, so that the next run finds the machine empty."""
        code: int | None
        try:
            code = self.driver.wait(patience_s)
        except subprocess.TimeoutExpired:
            code = None
            self.driver.kill()
            self.driver.wait()
        ended = time.monotonic()
        while (left := self.members()) and time.monotonic() < ended + patience_s / 3:
            time.sleep(POLL_S)
        gone_s = time.monotonic() - ended
        for member in left:
            send(member, signal.SIGKILL)
        out, err = (read_all(file) for file in self.said)
        before, _, said = out.partition("{")
        report, end = json.JSONDecoder().raw_decode("{" + said) if said else ({}, 1)
        noise = (before + said[end - 1 :]).strip()
        self.started_here.remove(self)
        return Ended(code, report, err, noise, gone_s, [member.title[:60] for member in left])


def read_all(file: Any) -> str:
    with file:
        file.seek(0)
        return str(file.read())


def send(member: Member, number: signal.Signals) -> bool:
    """Send a signal; return False when there is nobody any more."""
    try:
        os.kill(member.pid, number)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def volume(folder: Path, mib: int) -> Iterator[Path]:
    """Mount a small volume. Raises OSError where one may not."""
    folder.mkdir(parents=True)
    found = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], capture_output=True, text=True)
    if found.returncode:
        raise OSError(f"no volume of its own can be mounted here: {found.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, mode: str) -> None:
    """Make a volume `ro` or `rw`."""
    subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], check=True)


# ---- What is on the disk ----------------------------------------------------------------------------------------------


def read_ledger(output: Path) -> Ledger:
    """Return the rows of the ledger; a shard that cannot be read has none."""
    found: Ledger = {}
    for file in (output / "requests").glob("*.parquet"):
        with suppress(OSError, pa.ArrowException):
            for row in pq.read_table(file, columns=["key", "attempt", "started_at"]).to_pylist():
                found.setdefault((row["key"], row["attempt"]), []).append(row["started_at"])
    return found


def read_records(output: Path) -> list[dict[str, Any]]:
    """Return the rows of the records."""
    return [row for file in sorted((output / "records").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def read_values(output: Path) -> list[dict[str, Any]]:
    """Return the rows of the records without the columns of confidence."""
    return [{name: value for name, value in row.items() if "confidence" not in name} for row in read_records(output)]


def record_bytes(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (output / "records").glob("*")}


def settled(output: Path) -> Counter[str]:
    """Return how many records each source has; one that says that it was not asked yet is none."""
    rows = read_records(output) if output.exists() else []
    return Counter(row["_source"] for row in rows if (row["_failure"] or {}).get("kind") != "pending")


def temporary(output: Path) -> list[str]:
    return [file.name for file in output.rglob("*") if file.name.endswith(".tmp")]
