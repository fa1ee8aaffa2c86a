"""Loop detection: what is a loop, what is not, and the message of its failure."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engines.completion import LOOP_PERIOD, find_loop, make_loop_error

LONG = list(range(LOOP_PERIOD))


@pytest.mark.parametrize(("tokens", "repeated"), [
    ([1] * 600, [1]),
    ([1, 2, 3] * 200, [1, 2, 3]),
    ([9, *[1, 2] * 300], [1, 2]),
    ([7] * 300 + LONG[:100] * 6, LONG[:100]),
    ([9, *LONG * 4], LONG),
    ([9, *LONG * 5][:-37], LONG),
    ([1] * 500, []),
    (LONG * 3, []),
    ([*LONG, 600] * 5, []),
    ([token for row in range(200) for token in (*LONG[:40], 1000 + row)], []),
    ([1] * 600 + [2], []),
])  # fmt: skip
def test_a_loop_is_a_pattern_repeated_to_the_letter_and_to_the_end(tokens: list[int], repeated: list[int]) -> None:
    assert find_loop(tokens) == repeated


@given(st.lists(st.integers(0, 1), min_size=1, max_size=160), st.integers(490, 700), st.lists(st.integers(0, 1), max_size=8))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_the_period_found_is_that_of_an_exhaustive_search(pattern: list[int], length: int, before: list[int]) -> None:
    tokens = before + (pattern * length)[:length]
    tails = {period: tokens[-max(512, 4 * period) :] for period in range(1, LOOP_PERIOD + 1)}
    periods = [period for period, tail in tails.items() if len(tail) >= max(512, 4 * period) and tail[period:] == tail[:-period]]
    assert len(find_loop(tokens)) == min(periods, default=0)


def test_a_long_loop_is_shown_by_its_beginning() -> None:
    assert (
        str(make_loop_error("ab" * 100, 150, 2048)) == f"the answer repeats '{'ab' * 40}'… (150 tokens) and was stopped after 2,048 tokens"
    )
