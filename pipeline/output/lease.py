"""Who works on an output folder, said in the folder itself, so that two runs do not. Knows nothing of what they do there.

    lease.json   {"holder": "9f…", "host": "worker-3", "boot": "1c…", "pid": 4711, "started": "88231", "renewed_at": 1760000000.0, …}

A lease is renewed three times in its life, and one that was not renewed for its life is dead; so is one of a process of this machine
that is gone, for which nobody need wait. Clocks of several machines must agree to within a few seconds.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from pipeline.errors import JobError, RunError
from pipeline.storage.store import Store

NAME = "lease.json"
LIFE_S = 60.0
SETTLE_S = 0.3
"""How long whoever takes a lease waits before looking whether another has taken it meanwhile."""


@dataclass(frozen=True)
class LeaseHolder:
    """A process that holds a lease: where it runs, and when it last said so."""

    holder: str
    host: str
    boot: str
    """The machine's start and the process namespace: process ids of another have nothing to do with ours."""
    pid: int
    started: str
    """When the process started, in ticks since the machine did: a process id is used again."""
    life_s: float
    renewed_at: float

    @classmethod
    def here(cls, life_s: float) -> LeaseHolder:
        pid = os.getpid()
        return cls(uuid.uuid4().hex, socket.gethostname(), read_boot_id(), pid, read_start_time(pid), life_s, time.time())

    @classmethod
    def parse(cls, text: bytes) -> LeaseHolder | None:
        """Return what a lease says; None where it says nothing sensible."""
        try:
            found = cls(**json.loads(text))
            return replace(found, life_s=float(found.life_s), renewed_at=float(found.renewed_at), pid=int(found.pid))
        except (TypeError, ValueError):
            return None

    def text(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()

    @property
    def is_dead(self) -> bool:
        """It was not renewed in time, or its process was one of this machine and is gone."""
        if time.time() - self.renewed_at > self.life_s:
            return True
        return bool(self.boot) and self.boot == read_boot_id() and read_start_time(self.pid) != self.started


def read_boot_id() -> str:
    """Return what tells this machine, since it was started, and this process's namespace from all others; "" where unknown."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
    return ""


def read_start_time(pid: int) -> str:
    """Return when a process started; "" for one that is no more."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    return ""


class Lease:
    """The right to work on an output, held and renewed by a thread while the block runs."""

    def __init__(self, store: Store, life_s: float = LIFE_S) -> None:
        """Take the lease. Raises JobError while another run holds it."""
        self.store, self.mine = store, LeaseHolder.here(life_s)
        self.over = threading.Event()
        self.lost: LeaseHolder | None = None
        self.take()
        self.thread = threading.Thread(target=self.renew, name="lease", daemon=True)

    def take(self) -> None:
        """Write down that it is mine, wait a moment, and look whether it still is: of two that do so at once, one stays."""
        other = self.holder()
        if other is not None and not other.is_dead:
            raise JobError(format_lease_conflict(self.store, other))
        self.store.put(NAME, self.mine.text())
        time.sleep(SETTLE_S)
        other = self.holder()
        if other is not None and other.holder != self.mine.holder:
            raise JobError(format_lease_conflict(self.store, other))

    def holder(self) -> LeaseHolder | None:
        """Return who holds it; None where nobody does."""
        try:
            return LeaseHolder.parse(self.store.read(NAME))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise JobError(f"cannot read {self.store / NAME}: {error}") from None

    def renew(self) -> None:
        """Renew until it is over, or until somebody else has taken it while this process was held up."""
        while not self.over.wait(self.mine.life_s / 3):
            with suppress(RunError, JobError):  # storage may come back before the lease is dead
                other = self.holder()
                if other is not None and other.holder != self.mine.holder:
                    self.lost = other
                    return
                self.store.put(NAME, replace(self.mine, renewed_at=time.time()).text())

    def check(self) -> None:
        """Raise RunError when another run has taken over."""
        if self.lost is not None:
            other = f"process {self.lost.pid} on {self.lost.host}"
            raise RunError(f"another run ({other}) has taken over {self.store}, because this one was silent for too long")

    def __enter__(self) -> Lease:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.over.set()
        self.thread.join()
        if self.lost is None:
            with suppress(RunError):
                self.store.remove([NAME])


def is_output_leased(store: Store) -> bool:
    """Say whether a run works there."""
    try:
        other = LeaseHolder.parse(store.read(NAME))
    except OSError:
        return False
    return other is not None and not other.is_dead


def format_lease_conflict(store: Store, other: LeaseHolder) -> str:
    """Return the sentence that refuses a second run."""
    silent_s = max(0.0, time.time() - other.renewed_at)
    return (
        f"another run works on {store}: process {other.pid} on {other.host}, which said so {silent_s:.0f} s ago; "
        f"wait until it ends, or until it has been silent for {other.life_s:.0f} s"
    )
