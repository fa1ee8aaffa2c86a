"""Alignment of lists: the items of two lists in, pairs of their indices out, those that are alike together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
from scipy.optimize import linear_sum_assignment

Item = TypeVar("Item", bound=Hashable)


def align_items(
    truth: Sequence[Item], found: Sequence[Item], rate_pair: Callable[[int, int], float]
) -> list[tuple[int | None, int | None]]:
    """Return each item of both lists once, in the order of `truth`, with its partner's index; None where there is none left.

    Equal items are pairs first, in their order. Of all pairings of the others the one with the largest sum of `rate_pair` is taken
    (Hungarian method, scipy's: Crouse, On implementing 2D rectangular assignment algorithms, 2016). So items are left alone only in the
    longer list.
    """
    partners: dict[int, int] = {}
    waiting: dict[Item, list[int]] = {}
    for j in reversed(range(len(found))):
        waiting.setdefault(found[j], []).append(j)
    for i, item in enumerate(truth):
        if waiting.get(item):
            partners[i] = waiting[item].pop()
    rows = [i for i in range(len(truth)) if i not in partners]
    columns = sorted(j for places in waiting.values() for j in places)
    if rows and columns:
        ratings = np.array([[rate_pair(i, j) for j in columns] for i in rows])
        chosen = zip(*linear_sum_assignment(ratings, maximize=True), strict=True)
        partners |= {rows[row]: columns[column] for row, column in chosen}
    alone = sorted(set(columns) - set(partners.values()))
    return [*((i, partners.get(i)) for i in range(len(truth))), *((None, j) for j in alone)]
