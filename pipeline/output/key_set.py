"""Set of request keys that takes 16 bytes a key, for ledgers of millions of requests.

keys = KeySet.of(["00ff…", "17a0…"])       32 hex digits each
"17a0…" in keys                            True
keys.find(["17a0…", "beef…"])              [True, False]
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

BYTES = 16
HEX_KEY, HEX_KEYS = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]+")
Keys = NDArray[np.bytes_]
"""(keys,): 16 bytes each."""
MERGED_AT = 100_000
"""Keys added one by one are merged into the array when there are so many of them."""


class KeySet:
    """Keys in a sorted array, and those added since the last merge in a set."""

    def __init__(self, keys: Keys | None = None) -> None:
        """`keys`: in any order, repeated or not."""
        self.sorted: Keys = sort_unique(keys) if keys is not None else np.empty(0, f"S{BYTES}")
        self.added: set[bytes] = set()

    @classmethod
    def of(cls, keys: Iterable[str]) -> KeySet:
        """Return the set of these keys."""
        return cls(pack_keys(list(keys)))

    def __len__(self) -> int:
        return len(self.sorted) + len(self.added)

    def __contains__(self, key: str) -> bool:
        return bool(self.find([key])[0])

    def find(self, keys: Sequence[str]) -> NDArray[np.bool_]:
        """Return for each key whether it is in the set."""
        packed = pack_keys(keys)
        found = find_packed(packed, self.sorted)
        if self.added:
            found |= np.fromiter((pack_key(key) in self.added for key in keys), np.bool_, len(keys))
        return found

    def update(self, keys: Sequence[str]) -> None:
        """Add keys."""
        is_there = find_packed(pack_keys(keys), self.sorted).tolist()
        self.added.update(pack_key(key) for key, there in zip(keys, is_there, strict=True) if not there)
        if len(self.added) >= MERGED_AT:
            added = np.sort(np.array(list(self.added), f"S{BYTES}"))
            self.sorted = np.insert(self.sorted, np.searchsorted(self.sorted, added), added)  # a copy, where sorting all took seconds
            self.added = set()


def sort_unique(keys: Keys) -> Keys:
    """Return keys sorted, each once; needs less memory than numpy's `unique`."""
    keys = np.sort(keys)
    is_first = np.ones(len(keys), np.bool_)
    is_first[1:] = keys[1:] != keys[:-1]
    return keys if is_first.all() else keys[is_first]


def find_packed(keys: Keys, among: Keys) -> NDArray[np.bool_]:
    """Return for each key whether it is in a sorted array of keys."""
    if not len(among):
        return np.zeros(len(keys), np.bool_)
    places = np.minimum(np.searchsorted(among, keys), len(among) - 1)
    return np.asarray(among[places] == keys, np.bool_)


def pack_key(key: str) -> bytes:
    """Return a key of 32 hex digits as 16 bytes; a digest of 16 bytes for any other text."""
    return bytes.fromhex(key) if HEX_KEY.fullmatch(key) else hashlib.blake2b(key.encode(), digest_size=BYTES).digest()


def pack_keys(keys: Sequence[str]) -> Keys:
    """Return what `pack_key` returns for each key; fast where all of them have 32 hex digits."""
    text = "".join(keys)
    if HEX_KEYS.fullmatch(text) and all(len(key) == 2 * BYTES for key in keys):
        return np.frombuffer(bytes.fromhex(text), f"S{BYTES}")
    return np.array([pack_key(key) for key in keys], f"S{BYTES}")


def pack_column(column: pa.Array) -> Keys:
    """Return what `pack_key` returns for each key of a column of the ledger; without a Python object for each."""
    if not len(column):
        return np.empty(0, f"S{BYTES}")
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
    if not column.null_count and (np.diff(offsets) == 2 * BYTES).all():
        values = DIGIT_VALUES[np.frombuffer(column.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]]
        if (values < 16).all():
            return np.frombuffer((values[0::2] << 4 | values[1::2]).tobytes(), f"S{BYTES}")
    return pack_keys([str(key) for key in column.to_pylist()])


def make_digit_values() -> NDArray[np.uint8]:
    """Return for each byte its value as a hex digit; 255 for one that is none."""
    values = np.full(256, 255, np.uint8)
    for value, digit in enumerate("0123456789abcdef"):
        values[ord(digit)] = value
    return values


DIGIT_VALUES = make_digit_values()
