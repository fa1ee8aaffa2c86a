"""Folders of many shards -> seconds to list and to read them, before and after a compaction, on this disk.

    python benchmarks/listing.py --names 100000 --shards 2000

A name costs nothing but its listing; a shard of one row costs its opening, which is what `settle` saves by gathering them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from pipeline.compaction import compact
from pipeline.sink import LEDGER, SUFFIX, Output, read_outcomes, write_shard
from pipeline.store import Folder

T = TypeVar("T")


def timed(what: str, work: Callable[[], T]) -> T:
    started = time.monotonic()
    found = work()
    print(f"{what}: {time.monotonic() - started:.2f} s")
    return found


def row(number: int) -> dict[str, object]:
    return {"key": f"{number:064x}", "attempt": 1, "source": f"{number}.pdf", "doc_id": f"{number * 7919:064x}", "status": "extracted"}


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--names", type=int, default=100_000)
    given.add_argument("--shards", type=int, default=2_000)
    wanted = given.parse_args()
    with tempfile.TemporaryDirectory() as place:
        many = Path(place) / "many"
        many.mkdir()
        for number in range(wanted.names):
            os.close(os.open(many / f"{number:024x}{SUFFIX}", os.O_CREAT | os.O_WRONLY))
        timed(f"{wanted.names} names listed", lambda: Folder(many).names(SUFFIX))
        output = Output(Path(place) / "out")
        output.make()
        for number in range(wanted.shards):
            write_shard(output.requests, pa.Table.from_pylist([row(number)], LEDGER), [str(number)])
        timed(f"{wanted.shards} shards of a row read", lambda: list(read_outcomes(output)))
        print(timed("gathered", lambda: compact(output)), "shards fewer")
        timed("the same rows read", lambda: list(read_outcomes(output)))


if __name__ == "__main__":
    main()
