"""Parts of sentences that many messages have."""

from __future__ import annotations

import pytest

from pipeline.wording import format_count, format_duration, suggest_word, truncate_text


@pytest.mark.parametrize(("count", "text"), [(0, "0 records"), (1, "1 record"), (2000, "2,000 records")])
def test_a_count_has_its_noun(count: int, text: str) -> None:
    assert format_count(count, "record") == text


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (99.9, "99.9 s"), (100, "0:01:40"), (3725.6, "1:02:06")])
def test_a_long_time_has_minutes(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_duration_has_as_many_decimals_as_it_is_worth() -> None:
    assert (format_duration(0.04, 2), format_duration(7.5, 0)) == ("0.04 s", "8 s")


def test_a_long_text_ends_with_an_ellipsis() -> None:
    assert (truncate_text("abcd", 4), truncate_text("abcde", 4)) == ("abcd", "abc…")


def test_a_near_word_is_suggested_and_a_far_one_is_not() -> None:
    assert suggest_word("modle", ["model", "pages"]) == "; did you mean 'model'?"
    assert suggest_word("xyz", ["model", "pages"]) == ""
