"""Partitions of the ledger: a shard's name says which doc_ids its rows can have.

    4f0c….parquet               any: written while a run goes on
    a3000000-08-4f0c….parquet   those that begin with the 8 bits of a3
    none-4f0c….parquet          none: documents whose bytes could not be read

doc_ids are hashes, so that partitions of the same number of bits have about the same number of rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

MAX_BITS = 32
NAME = re.compile(r"(?:(?P<first>[0-9a-f]{8})-(?P<bits>\d\d)-|(?P<none>none)-)?[0-9a-f]{24}\.parquet")


@dataclass(frozen=True, order=True)
class Partition:
    """Rows whose doc_id begins with certain bits, by default none, which is every row; or rows without a doc_id."""

    number: int = 0
    """These bits as a number."""
    bits: int = 0
    is_null: bool = False

    @property
    def prefix(self) -> str:
        """The beginning of the names of its shards."""
        if self.is_null:
            return "none-"
        return f"{self.format_bound(self.number)}-{self.bits:02}-" if self.bits else ""

    @property
    def first(self) -> str:
        """The least doc_id that it can have."""
        return self.format_bound(self.number) if self.number else ""

    @property
    def end(self) -> str | None:
        """The least doc_id that is too great for it; None where none is."""
        return None if self.number + 1 == 1 << self.bits else self.format_bound(self.number + 1)

    def format_bound(self, number: int) -> str:
        return f"{number << (MAX_BITS - self.bits):08x}"

    def list_parts(self, bits: int) -> Iterator[Partition]:
        """Yield the partitions of so many bits that it consists of."""
        more = bits - self.bits
        for number in range(self.number << more, (self.number + 1) << more):
            yield Partition(number, bits)

    def overlaps(self, low: str | None, high: str | None, with_null: bool) -> bool:
        """Say whether a row of this partition can have a doc_id from `low` to `high`, or none if those without one are wanted."""
        if self.is_null or (not self.bits and with_null):
            return with_null
        if low is None or high is None:
            return False
        return self.first <= high and (self.end is None or low < self.end)


@lru_cache(maxsize=65_536)
def parse_partition(name: str) -> Partition:
    """Return the partition of a shard, given its name; one that says nothing may hold every row."""
    found = NAME.fullmatch(name)
    if not found or not (found["first"] or found["none"]):
        return Partition()
    if found["none"]:
        return Partition(is_null=True)
    bits = min(int(found["bits"]), MAX_BITS)
    return Partition(int(found["first"], 16) >> (MAX_BITS - bits), bits)
