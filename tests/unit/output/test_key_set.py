"""Set of keys at 16 bytes each."""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pytest

from pipeline.output import key_set
from pipeline.output.key_set import KeySet, pack_column, pack_keys


def make_keys(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(count)]


def test_a_set_has_what_was_put_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_set, "MERGED_AT", 7)
    keys = make_keys(60)
    found = KeySet.of(keys[:20] * 2)
    for first in range(10, 40, 5):
        found.update(keys[first : first + 5])
    assert len(found) == 40
    assert found.find(keys).tolist() == [True] * 40 + [False] * 20
    assert all(key in found for key in keys[:40])
    assert len(found.added) < 7


def test_an_empty_set_has_nothing() -> None:
    assert KeySet().find(make_keys(3)).tolist() == [False] * 3
    assert KeySet.of(make_keys(3)).find([]).tolist() == []


def test_keys_that_end_in_zeros_are_told_apart() -> None:
    keys = ["ab" + "00" * 15, "ab00" + "cd" + "00" * 13, "00" * 16]
    for key in keys:
        assert [other in KeySet.of([key]) for other in keys] == [other == key for other in keys]


def test_any_text_is_a_key() -> None:
    keys = ["k1", "K1", "", "ä" * 16, "F" * 32, "f" * 32, "g" * 32]
    for key in keys:
        assert [other in KeySet.of([key]) for other in keys] == [other == key for other in keys]


def test_a_slice_of_a_column_is_packed_as_its_own_keys() -> None:
    keys = make_keys(10)
    assert pack_column(pa.array(keys).slice(3, 4)).tolist() == pack_keys(keys[3:7]).tolist()
    assert len(pack_keys(keys).tobytes()) == 160
