"""Which doc_ids a shard of the ledger can have, told by its name."""

from __future__ import annotations

import hashlib

import pytest

from pipeline.output.partitions import Partition, parse_partition

HASH = "0123456789abcdef01234567.parquet"


@pytest.mark.parametrize(
    "partition", [Partition(), Partition(0xA3, 8), Partition(0, 1), Partition(1, 1), Partition(5, 3), Partition(is_null=True)]
)
def test_a_name_says_its_partition(partition: Partition) -> None:
    assert parse_partition(partition.prefix + HASH) == partition


def test_the_name_begins_with_the_bits() -> None:
    assert Partition(0xA3, 8).prefix == "a3000000-08-"


@pytest.mark.parametrize("name", [HASH, "zz.parquet", "part-0.parquet", f"a3-08-{HASH}"])
def test_any_other_name_may_hold_every_row(name: str) -> None:
    assert parse_partition(name) == Partition()


@pytest.mark.parametrize("bits", [1, 3, 4, 9])
def test_each_doc_id_is_in_one_part(bits: int) -> None:
    parts = list(Partition().list_parts(bits))
    assert len(parts) == 2**bits
    for number in range(200):
        doc_id = hashlib.sha256(str(number).encode()).hexdigest()
        (part,) = [part for part in parts if part.overlaps(doc_id, doc_id, with_null=False)]
        assert part.number == int(doc_id, 16) >> (256 - bits)


def test_a_range_overlaps_the_partitions_of_its_ends_and_those_between() -> None:
    parts = Partition().list_parts(4)
    assert [part.number for part in parts if part.overlaps("3f", "61", with_null=False)] == [3, 4, 5, 6]


def test_rows_without_a_doc_id_are_in_their_partition_or_not_sorted_yet() -> None:
    both = [Partition(), Partition(3, 4), Partition(is_null=True)]
    assert [one.overlaps(None, None, with_null=True) for one in both] == [True, False, True]
    assert [one.overlaps("3f", "3f", with_null=False) for one in both] == [True, True, False]
