"""Texts compared: normalisation, the Levenshtein distance and its similarity."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.score.text import compute_anls, compute_distance, normalize_text

SHORT = st.text("abé ", max_size=7)


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("Quirke & Co.", "QUIRKE   Co", True),
        ("Café", "Cafe\u0301", True),
        ("ﬁne", "fine", True),
        ("STRASSE", "Straße", True),
        ("A\u00a0B", "a b", True),
        ("“A” – B", "a b", True),
        ("20–27", "20-27", True),
        ("1.5 kg", "15 kg", False),
        ("2022/566", "2022566", False),
        ("C++", "C", False),
        ("-", ".", False),
        ("Cafe", "Café", False),
    ],
)
def test_normalised_texts_are_equal(one: str, other: str, is_same: bool) -> None:
    assert (normalize_text(one) == normalize_text(other)) is is_same


@given(st.text("aBß1.,-– ()é&", max_size=20))
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    assert normalize_text(normalize_text(text)) == normalize_text(text)


@cache
def measure(one: str, other: str) -> int:
    """The definition of the distance, letter by letter."""
    if not one or not other:
        return len(one) + len(other)
    return min(measure(one[1:], other) + 1, measure(one, other[1:]) + 1, measure(one[1:], other[1:]) + (one[0] != other[0]))


@given(SHORT, SHORT)
def test_the_distance_is_that_of_the_definition(one: str, other: str) -> None:
    assert compute_distance(one, other) == measure(one, other)


def test_long_texts_have_a_distance() -> None:
    assert compute_distance("kitten" * 50, "sitting" * 50) == 150


@pytest.mark.parametrize(
    ("truth", "found", "similarity"),
    [
        ("CW6N-990", "CWSN-990", 0.875),
        ("Tea", " TEA ", 1.0),
        ("abcd", "abxy", 0.0),
        ("abcde", "abcxy", 0.6),
        ("", "x", 0.0),
        ("", "", 1.0),
    ],
)
def test_similarity_is_0_from_half_of_the_letters_on(truth: str, found: str, similarity: float) -> None:
    assert compute_anls(truth, found) == pytest.approx(similarity)
