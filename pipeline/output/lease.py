"""Lease: lets one run at a time write to an output. The holder is named in the output itself and renews the lease while it runs.

    lease.json   {"holder": "9f…", "host": "worker-3", "machine": "1c…/pid:[4026531836]/1000", "pid": 4711, "life_s": 60.0, …}

On one machine a file lock decides: the kernel releases it when its process dies, so that a killed run is not waited for. Between machines
a lease that was not renewed for its life is over. Clocks of several machines must agree to within a few seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from pipeline.errors import JobError, RunError
from pipeline.storage.store import FolderStore, Store

NAME = "lease.json"
LIFE_S = 60.0
"""How long a lease lasts without renewal; it is renewed three times in its life."""
LOOK_AGAIN_S = 0.3
"""How long a process that writes its lease into an object store waits before it looks whether another one has written meanwhile."""
LOCK_TIMEOUT_S = 0.5
"""How long a lock is waited for: `is_output_leased` holds it for a moment."""


@dataclass(frozen=True)
class LeaseHolder:
    """A process that holds a lease: where it runs, and when it renewed the lease last."""

    holder: str
    host: str
    machine: str
    """What file locks of this process are visible to: the machine's boot, its process namespace and the user."""
    pid: int
    life_s: float
    renewed_at: float

    @classmethod
    def for_this_process(cls, life_s: float) -> LeaseHolder:
        return cls(uuid.uuid4().hex, socket.gethostname(), read_machine_id(), os.getpid(), life_s, time.time())

    @classmethod
    def parse(cls, text: bytes) -> LeaseHolder | None:
        """Return the holder in a lease file; None where it names none."""
        try:
            found = cls(**json.loads(text))
            return replace(found, life_s=float(found.life_s), renewed_at=float(found.renewed_at), pid=int(found.pid))
        except (TypeError, ValueError):
            return None

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()

    @property
    def is_expired(self) -> bool:
        """Whether it was not renewed in time."""
        return time.time() - self.renewed_at > self.life_s

    @property
    def is_here(self) -> bool:
        """Whether a lock of its process would be visible to this one."""
        return bool(self.machine) and self.machine == read_machine_id()


def read_machine_id() -> str:
    """Return what tells this machine since its start, this process namespace and this user from all others; "" where unknown."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.getuid()}"
    return ""


def make_output_lock(store: Store) -> FileLock:
    """Return the lock of an output on this machine: in its folder, or for an object store in the folder of temporary files."""
    if isinstance(store, FolderStore):
        return FileLock(store.path / ".lease.lock", mode=0o600)
    name = hashlib.sha256(str(store).encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"pipeline-lease-{os.getuid()}-{name}.lock", mode=0o600)


class Lease:
    """The right to write to an output, renewed by a thread while the block runs."""

    def __init__(self, store: Store, life_s: float = LIFE_S) -> None:
        """Take the lease. Raises JobError while another run holds it."""
        self.store, self.mine, self.lock = store, LeaseHolder.for_this_process(life_s), make_output_lock(store)
        self.over = threading.Event()
        self.lost: LeaseHolder | None = None
        self.acquire()
        self.thread = threading.Thread(target=self.renew, name="lease", daemon=True)

    def acquire(self) -> None:
        """Lock the output on this machine, then write the lease unless another machine's is valid."""
        try:
            self.lock.acquire(timeout=LOCK_TIMEOUT_S)
        except Timeout:
            raise JobError(format_lease_conflict(self.store, self.read_holder()), key="output.path") from None
        try:
            other = self.read_holder()
            if other is not None and not other.is_expired and not other.is_here:
                raise JobError(format_lease_conflict(self.store, other), key="output.path")
            self.store.put(NAME, self.mine.to_json())
            if not isinstance(self.store, FolderStore):  # two machines may have written at the same time: the last one stays
                time.sleep(LOOK_AGAIN_S)
                other = self.read_holder()
                if other is not None and other.holder != self.mine.holder:
                    raise JobError(format_lease_conflict(self.store, other), key="output.path")
        except BaseException:
            self.lock.release()
            raise

    def read_holder(self) -> LeaseHolder | None:
        """Return the holder of the lease; None where there is none. Raises JobError."""
        try:
            return LeaseHolder.parse(self.store.read(NAME))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise JobError(f"cannot read {self.store / NAME}: {error}", str(self.store / NAME)) from None

    def renew(self) -> None:
        """Renew until the block ends, or until another run has taken the lease while this process was suspended."""
        while not self.over.wait(self.mine.life_s / 3):
            with suppress(RunError, JobError):  # storage may come back before the lease expires
                other = self.read_holder()
                if other is not None and other.holder != self.mine.holder:
                    self.lost = other
                    return
                self.store.put(NAME, replace(self.mine, renewed_at=time.time()).to_json())

    def check(self) -> None:
        """Raise RunError when another run has taken the lease."""
        if self.lost is not None:
            other = f"process {self.lost.pid} on {self.lost.host}"
            raise RunError(f"another run ({other}) has taken over {self.store}, because this one did not renew its lease in time")

    def __enter__(self) -> Lease:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.over.set()
        self.thread.join()
        if self.lost is None:
            with suppress(RunError):
                self.store.remove([NAME])
        self.lock.release()


def is_output_leased(store: Store) -> bool:
    """Say whether a run writes to an output."""
    try:
        other = LeaseHolder.parse(store.read(NAME))
    except OSError:
        return False
    if other is None or other.is_expired:
        return False
    if not other.is_here:
        return True
    try:
        with make_output_lock(store).acquire(timeout=0):
            return False
    except (Timeout, OSError):
        return True


def format_lease_conflict(store: Store, other: LeaseHolder | None) -> str:
    """Return the sentence that refuses a second run."""
    if other is None:
        return f"another run on this machine is starting or ending in {store}; wait until it ends"
    silent_s = max(0.0, time.time() - other.renewed_at)
    return (
        f"another run works on {store}: process {other.pid} on {other.host}, which said so {silent_s:.0f} s ago; "
        f"wait until it ends, or until it has been silent for {other.life_s:.0f} s"
    )
