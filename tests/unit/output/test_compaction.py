"""A ledger sorted into partitions: the same rows, few shards for each range of doc_ids, and nothing lost or doubled by a kill."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.output import SHARD_SUFFIX, Output, compaction
from pipeline.output.compaction import compact_shards
from pipeline.output.ledger import LEDGER_SCHEMA, read_requests
from pipeline.output.partitions import Partition, parse_partition
from pipeline.output.shards import read_shards, write_shard
from pipeline.storage.store import FolderStore

ROWS_PER_SHARD = 50


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Output:
    """An output whose ledger counts as large from 64 kB on."""
    monkeypatch.setattr(compaction, "TARGET_BYTES", 2**16)
    monkeypatch.setattr(compaction, "MAX_MERGED_BYTES", 2**18)
    (output := Output(tmp_path / "out")).create()
    return output


def make_row(number: int, attempt: int = 1) -> dict[str, Any]:
    """Return a request; every tenth is about a document that could not be read."""
    doc_id = hashlib.sha256(str(number // 2).encode()).hexdigest() if number % 10 else None
    answer = random.Random(number).randbytes(200).hex()
    return {"key": f"k{number}", "attempt": attempt, "source": f"{number}.pdf", "doc_id": doc_id, "status": "extracted", "answer": answer}


def write_rows(output: Output, numbers: range) -> None:
    """Write shards as a run does."""
    for start in range(numbers.start, numbers.stop, ROWS_PER_SHARD):
        rows = [make_row(number) for number in range(start, min(start + ROWS_PER_SHARD, numbers.stop))]
        write_shard(output.requests, pa.Table.from_pylist(rows, LEDGER_SCHEMA), [f"{row['key']}/1" for row in rows])


def count_keys(output: Output) -> Counter[str]:
    return Counter(read_shards(output.requests, ["key"], LEDGER_SCHEMA)["key"].to_pylist())


def list_partitions(output: Output) -> list[Partition]:
    return sorted(parse_partition(name) for name in output.requests.list_names(SHARD_SUFFIX))


def test_a_large_ledger_becomes_one_shard_for_each_partition(output: Output) -> None:
    write_rows(output, range(1000))
    before = output.requests.list_names(SHARD_SUFFIX)
    found = compact_shards(output)
    after = list_partitions(output)
    assert found == len(before) - len(after)
    assert after == sorted([Partition(is_null=True), *Partition().list_parts(max(one.bits for one in after))])
    assert len(after) > 4
    assert max(output.requests.list_names(SHARD_SUFFIX).values()) < 1.5 * compaction.TARGET_BYTES
    assert count_keys(output) == Counter(f"k{number}" for number in range(1000))
    assert compact_shards(output) == 0


def test_a_shard_holds_the_rows_of_its_partition_in_order(output: Output) -> None:
    write_rows(output, range(1000))
    compact_shards(output)
    for name in output.requests.list_names(SHARD_SUFFIX):
        part, found = parse_partition(name), read_one(output, name)["doc_id"].to_pylist()
        assert all(part.is_null if one is None else part.overlaps(one, one, with_null=False) for one in found)
        assert part.is_null or found == sorted(found)


def read_one(output: Output, name: str) -> pa.Table:
    return compaction.read_group(output.requests, {name: output.requests.list_names(SHARD_SUFFIX)[name]})[0]


def test_rows_of_any_range_are_those_of_the_unsorted_ledger(output: Output) -> None:
    write_rows(output, range(1000))
    ranges = [
        pa.chunked_array([[make_row(number)["doc_id"] for number in numbers]], pa.string()) for numbers in ([3, 95, 701], [11], [20, 30])
    ]

    def read() -> list[list[dict[str, Any]]]:
        return [sorted(read_requests(output, some).to_pylist(), key=lambda row: row["key"]) for some in ranges]

    before = read()
    compact_shards(output)
    assert read() == before


def test_new_rows_stay_beside_the_partitions_until_there_are_many(output: Output) -> None:
    write_rows(output, range(1000))
    compact_shards(output)
    sorted_before = list_partitions(output)
    write_rows(output, range(1000, 1060))
    assert compact_shards(output) == 0
    assert list_partitions(output) == sorted([*sorted_before, Partition(), Partition()])
    write_rows(output, range(1060, 2000))
    compact_shards(output)
    assert Partition() not in list_partitions(output)
    assert max(list_partitions(output)[-1].bits, 0) > sorted_before[-1].bits
    assert len(set(list_partitions(output))) == len(list_partitions(output))
    assert count_keys(output) == Counter(f"k{number}" for number in range(2000))


class Killed(BaseException):
    """Stands for a kill of the process between two steps: no cleanup of the code under test runs on it."""


@pytest.mark.parametrize("step", range(0, 24, 4))
def test_a_kill_between_any_two_steps_loses_no_row_and_the_next_compaction_ends_it(
    output: Output, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Steps are writing a shard and removing those that it replaces; the ledger grows by a bit."""
    write_rows(output, range(1000))
    compact_shards(output)
    write_rows(output, range(1000, 1800))
    steps = iter(range(10_000))
    real = {name: getattr(FolderStore, name) for name in ("put", "remove")}

    def make_mortal(name: str) -> Any:
        def call(*arguments: Any) -> None:
            if next(steps) == step:
                raise Killed
            real[name](*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(FolderStore, name, make_mortal(name))
        with pytest.raises(Killed):
            compact_shards(output)
    assert set(count_keys(output)) == {f"k{number}" for number in range(1800)}
    compact_shards(output)
    assert count_keys(output) == Counter(f"k{number}" for number in range(1800))
    assert len(set(list_partitions(output))) == len(list_partitions(output))


def test_the_number_of_shards_opened_for_a_range_does_not_grow_with_the_ledger(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    open_file = FolderStore.open_file

    def open_counted(store: FolderStore, name: str, size_bytes: int) -> Any:
        opened.append(name)
        return open_file(store, name, size_bytes)

    monkeypatch.setattr(FolderStore, "open_file", open_counted)
    for stop in (1000, 4000):
        write_rows(output, range(0 if stop == 1000 else 1000, stop))
        compact_shards(output)
        opened.clear()
        for number in range(1, stop, stop // 20):
            read_requests(output, pa.chunked_array([[make_row(number)["doc_id"]]], pa.string()))
        assert len(opened) <= 20, stop
