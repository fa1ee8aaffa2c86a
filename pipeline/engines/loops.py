"""What an answer has been so far -> the pattern that it repeats, if it does nothing else any more. Knows no model.

    loop([7, 1, 2, 3, 1, 2, 3, …])  ->  [1, 2, 3]

A weak model on a hard page writes the same row until `max_tokens`: a minute of a GPU for an answer that is a failure anyway.
"""

from __future__ import annotations

from typing import TypeVar

from pipeline.errors import DocumentError

LOOP_PERIOD = 512
"""An answer that repeats up to 512 tokens …"""
LOOP_TIMES = 4
"""… this many times, one after the other, to the letter …"""
LOOP_TOKENS = 512
"""… and for this long will not end by itself. Tables with so many equal rows in sequence are rarer than loops; rows that only
count on are no loop."""
LOOP_SHOWN = 80
"""Characters of a loop that its failure shows."""
LOOP_EVERY = 64
"""How many tokens are written between two looks of 0.4 ms each."""
LOOP_CHARACTERS = 4 * LOOP_TOKENS
"""What stands for 512 tokens, and for the longest period, where only characters are known: JSON has one to four to a token, so that
hardly anything is stopped sooner than by its tokens. A table's row has some hundred: twenty equal ones, one after the other, pass."""
LOOP_EVERY_CHARACTERS = 512
"""How many characters are written between two looks of 2 ms at most."""

Written = TypeVar("Written", list[int], list[str], str)
"""Tokens, or characters where nobody says which tokens they are."""


def looped(text: str, period: int, written: int, unit: str = "tokens") -> DocumentError:
    """Return the failure that names a loop; a long one is shown by its beginning."""
    shown = repr(text) if len(text) <= LOOP_SHOWN else f"{text[:LOOP_SHOWN]!r}… ({period:,} {unit})"
    return DocumentError("loop", f"the answer repeats {shown} and was stopped after {written:,} {unit}")


def loop(written: Written, longest: int = LOOP_PERIOD, least: int = LOOP_TOKENS) -> Written:
    """Return the pattern that the last tokens repeat, as it stands where they begin to; nothing when they repeat none.

    Reads the tail from its end and keeps, for each of its beginnings, the length of the longest shorter beginning that it ends with
    (Knuth, Morris and Pratt's prefix function): what is missing to the whole is its shortest period. Each token is looked at twice.
    """
    tail = written[: -longest * LOOP_TIMES - 1 : -1]
    border, borders = 0, [0]
    for end in range(1, len(tail)):
        while border and tail[end] != tail[border]:
            border = borders[border - 1]
        border += tail[end] == tail[border]
        borders.append(border)
        period = end + 1 - border
        if end + 1 >= max(least, LOOP_TIMES * period):
            start = len(written) - end - 1
            while start and written[start - 1] == written[start - 1 + period]:
                start -= 1
            return written[start : start + period]
    return written[:0]
