"""The place that differs least from a text is the one that a plain table of edits finds."""

from __future__ import annotations

import random

from pipeline.evidence.similar import compare_inside


def count_plainly(one: str, other: str) -> int:
    """Return the edits between two texts by the whole table."""
    row = list(range(len(other) + 1))
    for count, letter in enumerate(one, 1):
        new = [count]
        for at, beside in enumerate(other, 1):
            new.append(min(row[at - 1] + (letter != beside), row[at] + 1, new[-1] + 1))
        row = new
    return row[-1]


def test_the_fewest_edits_are_those_of_the_best_part() -> None:
    chance = random.Random(5)
    for _ in range(60):
        wanted, within = ("".join(chance.choices("abc", k=count)) for count in (9, 14))
        parts = {(begin, end): count_plainly(wanted, within[begin:end]) for begin in range(14) for end in range(begin + 1, 15)}
        edits, begin, end = compare_inside(wanted, within, most=9)
        assert edits == min(parts.values()) == parts[begin, end]


def test_more_edits_than_allowed_are_no_place() -> None:
    assert compare_inside("consulting", "xxconsultxngxx", 1) == (1, 2, 12)
    assert compare_inside("consulting", "xxcansultxngxx", 1)[0] == -1
    assert compare_inside("consulting", "", 3)[0] == -1
