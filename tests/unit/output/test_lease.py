"""Two runs do not work on one output: the second is refused while the first lives, and takes over when it is dead."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import JobError, RunError
from pipeline.output import lease
from pipeline.output.lease import NAME, Lease, LeaseHolder, is_output_leased
from pipeline.storage import store
from pipeline.storage.store import Store
from tests.support.buckets import Bucket
from tests.support.leases import leave_lease

HELD = """
import sys, time
from pathlib import Path
from pipeline.output import lease
from pipeline.storage import store
with lease.Lease(store.open_store(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return store.open_store(tmp_path)


def test_a_lease_is_there_while_it_is_held(folder: Store, tmp_path: Path) -> None:
    with Lease(folder):
        assert json.loads((tmp_path / NAME).read_text())["life_s"] == lease.LIFE_S
    assert not (tmp_path / NAME).exists()


def test_a_second_run_is_refused_and_told_by_whom(folder: Store) -> None:
    leave_lease(folder, pid=4711, renewed_at=time.time() - 10)
    with pytest.raises(JobError, match=r"another run works on .*: process 4711 on worker-3, which said so 10 s ago; wait .* for 60 s$"):
        Lease(folder)


def test_a_lease_that_was_not_renewed_is_taken_over(folder: Store, tmp_path: Path) -> None:
    leave_lease(folder, renewed_at=time.time() - 61)
    with Lease(folder) as mine:
        assert json.loads((tmp_path / NAME).read_text())["holder"] == mine.mine.holder


def test_a_killed_process_of_this_machine_is_not_waited_for(folder: Store, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HELD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(JobError, match=f"process {first.pid} on"):
            Lease(folder)
        first.kill()
        first.wait()
        with Lease(folder):
            pass


def test_a_lease_of_this_machine_without_its_lock_is_over(folder: Store) -> None:
    if not lease.read_machine_id():
        pytest.skip("machines are told apart by /proc")
    leave_lease(folder, machine=lease.read_machine_id())
    with Lease(folder) as mine:
        assert mine.read_holder() == mine.mine


def test_settling_beside_a_run_of_this_machine_sees_its_lease(folder: Store) -> None:
    with Lease(folder):
        assert is_output_leased(folder)
    assert not is_output_leased(folder)


def test_a_lease_of_another_machine_holds_until_it_expires(folder: Store) -> None:
    leave_lease(folder)
    assert is_output_leased(folder)
    leave_lease(folder, renewed_at=time.time() - 61)
    assert not is_output_leased(folder)


@pytest.mark.parametrize("text", [b"", b"shopping list", b'{"holder": 1}', b"[]"])
def test_a_lease_that_says_nothing_holds_nothing(folder: Store, text: bytes) -> None:
    folder.put(NAME, text)
    with Lease(folder) as mine:
        mine.check()


def test_a_lease_is_renewed(folder: Store, tmp_path: Path) -> None:
    with Lease(folder, life_s=0.6) as mine:
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / NAME).read_text())["renewed_at"] <= mine.mine.renewed_at and time.monotonic() < deadline:
            time.sleep(0.02)
        assert json.loads((tmp_path / NAME).read_text())["renewed_at"] > mine.mine.renewed_at


def test_a_run_that_was_held_up_learns_that_another_took_over(folder: Store, tmp_path: Path) -> None:
    with Lease(folder, life_s=0.3) as mine:
        leave_lease(folder)
        mine.thread.join(10)
        with pytest.raises(RunError, match=r"another run \(process \d+ on worker-3\) has taken over .*, because this one did not renew"):
            mine.check()
    assert json.loads((tmp_path / NAME).read_text())["holder"] == "other"


# ---- In an object store


@pytest.fixture
def prefix(any_bucket: Bucket, tmp_path: Path) -> Store:
    return store.open_store(any_bucket.url(tmp_path.name))


def test_a_lease_in_a_store_is_there_while_it_is_held(prefix: Store) -> None:
    with Lease(prefix) as mine:
        assert LeaseHolder.parse(prefix.read(NAME)) == mine.mine
        assert is_output_leased(prefix)
        with pytest.raises(JobError, match=r"another run works on ..://bucket/.*: process"):
            Lease(prefix)
    assert prefix.list_names("") == {}


def test_a_lease_of_another_machine_in_a_store_holds_until_it_expires(prefix: Store) -> None:
    leave_lease(prefix, pid=4711)
    with pytest.raises(JobError, match=r"another run works on ..://bucket/.*: process 4711 on worker-3"):
        Lease(prefix)
    leave_lease(prefix, renewed_at=time.time() - 61)
    with Lease(prefix) as mine:
        assert LeaseHolder.parse(prefix.read(NAME)) == mine.mine


def test_of_two_machines_that_take_a_lease_in_a_store_one_has_it(prefix: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other machine's lease arrives right after this one's."""
    monkeypatch.setattr(lease.time, "sleep", lambda _: leave_lease(prefix, pid=4711))
    with pytest.raises(JobError, match=r"process 4711 on worker-3"):
        Lease(prefix)


def test_a_run_learns_from_a_store_that_another_took_over(prefix: Store) -> None:
    with Lease(prefix, life_s=0.3) as mine:
        leave_lease(prefix)
        mine.thread.join(30)
        with pytest.raises(RunError, match="has taken over"):
            mine.check()
