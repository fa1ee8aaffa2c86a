"""Alignment of lists: equal items first, then the best of all pairings."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.score.align import align_items

RATINGS = st.integers(1, 5).flatmap(
    lambda columns: st.lists(st.lists(st.integers(0, 9), min_size=columns, max_size=columns), min_size=1, max_size=5)
)


def find_best(ratings: list[list[int]]) -> int:
    """The largest sum of all ways to give each item of the shorter list one of the longer."""
    if len(ratings) > len(ratings[0]):
        ratings = [list(row) for row in zip(*ratings, strict=True)]
    return max(sum(row[j] for row, j in zip(ratings, chosen, strict=True)) for chosen in permutations(range(len(ratings[0])), len(ratings)))


@given(RATINGS)
def test_no_pairing_has_a_larger_sum(ratings: list[list[int]]) -> None:
    truth, found = [f"t{i}" for i in range(len(ratings))], [f"f{j}" for j in range(len(ratings[0]))]
    pairs = align_items(truth, found, lambda i, j: ratings[i][j])
    assert sorted(i for i, _ in pairs if i is not None) == list(range(len(truth)))
    assert sorted(j for _, j in pairs if j is not None) == list(range(len(found)))
    full = [(i, j) for i, j in pairs if i is not None and j is not None]
    assert len(full) == min(len(truth), len(found))
    assert sum(ratings[i][j] for i, j in full) == find_best(ratings)


def test_equal_items_are_pairs_in_their_order() -> None:
    assert align_items("aba", "caab", lambda i, j: 0.0) == [(0, 1), (1, 3), (2, 2), (None, 0)]


def test_an_equal_item_is_no_partner_of_another() -> None:
    """Even where that would make the sum larger: 1 and 0 instead of twice 0.9."""
    ratings = {("x", "x"): 1.0, ("x", "xa"): 0.9, ("xb", "x"): 0.9, ("xb", "xa"): 0.0}
    truth, found = ["x", "xb"], ["xa", "x"]
    assert align_items(truth, found, lambda i, j: ratings[truth[i], found[j]]) == [(0, 1), (1, 0)]


def test_empty_lists_have_no_pairs() -> None:
    assert align_items("", "", lambda i, j: 0.0) == []
    assert align_items("ab", "", lambda i, j: 0.0) == [(0, None), (1, None)]
    assert align_items("", "ab", lambda i, j: 0.0) == [(None, 0), (None, 1)]
