"""Two runs do not work on one output: the second is refused while the first lives, and takes over when it is dead."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import lease, store
from pipeline.errors import JobError, RunError
from pipeline.lease import NAME, Holder, Lease
from pipeline.store import Store

HELD = """
import sys, time
from pathlib import Path
from pipeline import lease, store
with lease.Lease(store.at(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def place(tmp_path: Path) -> Store:
    return store.at(tmp_path)


def left(place: Store, **given: object) -> None:
    """Leave a lease behind: that of a run elsewhere, unless told otherwise."""
    holder = replace(Holder.here(60.0), holder="other", host="worker-3", boot="another machine")
    place.put(NAME, replace(holder, **given).text())  # type: ignore[arg-type]


def test_a_lease_is_there_while_it_is_held(place: Store, tmp_path: Path) -> None:
    with Lease(place):
        assert json.loads((tmp_path / NAME).read_text())["life_s"] == lease.LIFE_S
    assert not (tmp_path / NAME).exists()


def test_a_second_run_is_refused_and_told_by_whom(place: Store) -> None:
    left(place, pid=4711, renewed_at=time.time() - 10)
    with pytest.raises(JobError, match=r"another run works on .*: process 4711 on worker-3, which said so 10 s ago; wait .* for 60 s$"):
        Lease(place)


def test_a_lease_that_was_not_renewed_is_taken_over(place: Store, tmp_path: Path) -> None:
    left(place, renewed_at=time.time() - 61)
    with Lease(place) as mine:
        assert json.loads((tmp_path / NAME).read_text())["holder"] == mine.mine.holder


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found by /proc")
def test_a_killed_process_of_this_machine_is_not_waited_for(place: Store, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HELD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(JobError, match=f"process {first.pid} on"):
            Lease(place)
        first.kill()
        first.wait()
        with Lease(place):
            pass


def test_a_process_id_that_is_used_again_is_another_process(place: Store) -> None:
    left(place, boot=lease.boot(), started="1")
    if not lease.boot():
        pytest.skip("processes are found by /proc")
    with Lease(place):
        pass


@pytest.mark.parametrize("text", [b"", b"shopping list", b'{"holder": 1}', b"[]"])
def test_a_lease_that_says_nothing_holds_nothing(place: Store, text: bytes) -> None:
    place.put(NAME, text)
    with Lease(place) as mine:
        mine.check()


def test_a_lease_is_renewed(place: Store, tmp_path: Path) -> None:
    with Lease(place, life_s=0.6) as mine:
        time.sleep(1.0)
        assert json.loads((tmp_path / NAME).read_text())["renewed_at"] > mine.mine.renewed_at


def test_a_run_that_was_held_up_learns_that_another_took_over(place: Store, tmp_path: Path) -> None:
    with Lease(place, life_s=0.3) as mine:
        left(place)
        mine.thread.join(10)
        with pytest.raises(RunError, match=r"another run \(process \d+ on worker-3\) has taken over .*, because this one was silent"):
            mine.check()
    assert json.loads((tmp_path / NAME).read_text())["holder"] == "other"
