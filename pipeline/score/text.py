"""Texts compared: two strings in, equality after normalisation or a similarity between 0 and 1 out."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

ANLS_THRESHOLD = 0.5
"""A normalised distance from here on counts as another text, with a similarity of 0."""


@lru_cache(maxsize=100_000)
def normalize_text(text: str) -> str:
    """Return a text in NFKC, in lower case, with single spaces and without punctuation.

    Punctuation between two digits stays, because 1.5 is not 15; all dashes are one there. A text of punctuation alone stays as it is.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    dashed = "".join("-" if unicodedata.category(c) == "Pd" else c for c in folded)
    kept = [c for at, c in enumerate(dashed) if not unicodedata.category(c).startswith("P") or is_between_digits(dashed, at)]
    return " ".join("".join(kept).split()) or " ".join(dashed.split())


def is_between_digits(text: str, at: int) -> bool:
    return text[at - 1 : at].isdigit() and text[at + 1 : at + 2].isdigit()


@lru_cache(maxsize=100_000)
def compute_anls(truth: str, found: str) -> float:
    """Return 1 - distance / length of the longer text, or 0 from the threshold on; case and spacing do not count.

    The Levenshtein similarity of ANLS: Biten et al., Scene Text Visual Question Answering, ICCV 2019, equation 1.
    """
    one, other = (re.sub(r"\s+", " ", text.strip()).lower() for text in (truth, found))
    if one == other:
        return 1.0
    distance = compute_distance(one, other) / max(len(one), len(other))
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def compute_distance(one: str, other: str) -> int:
    """Return the Levenshtein distance of two texts, a column of the table at a time as bits of an integer.

    Hyyrö, Explaining and extending the bit-parallel approximate string matching algorithm of Myers, 2001.
    """
    if not one:
        return len(other)
    everything, last = (1 << len(one)) - 1, 1 << (len(one) - 1)
    places: dict[str, int] = {}
    for at, c in enumerate(one):
        places[c] = places.get(c, 0) | 1 << at
    plus, minus, distance = everything, 0, len(one)
    for c in other:
        equal = places.get(c, 0)
        diagonal = (((equal & plus) + plus) ^ plus) | equal | minus
        up, down = minus | (everything & ~(diagonal | plus)), diagonal & plus
        distance += bool(up & last) - bool(down & last)
        up, down = (up << 1) | 1, down << 1
        plus, minus = everything & (down | ~(diagonal | up)), up & diagonal & everything
    return distance
