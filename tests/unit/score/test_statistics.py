"""Statistics: intervals, and how well a certainty tells right from wrong, against definitions and published figures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.score.statistics import (
    bootstrap_difference,
    bootstrap_ratios,
    compute_auroc,
    compute_brier,
    compute_ece,
    compute_wilson,
    list_reviews,
)

SCORED = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_is_as_published(count: int, total: int, low: float, high: float) -> None:
    """Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3; the last is the mirror of the third."""
    found = compute_wilson(count, total)
    assert (found["low"], found["high"]) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_nothing_counted_has_no_share() -> None:
    nothing = {"value": None, "low": None, "high": None}
    assert compute_wilson(0, 0) == nothing
    assert bootstrap_ratios(np.zeros((3, 1)), np.zeros((3, 1))) == [nothing]
    assert bootstrap_ratios(np.zeros((0, 2)), np.zeros((0, 2))) == [nothing, nothing]


def test_the_bootstrap_is_as_wide_as_the_normal_interval() -> None:
    rights = (np.arange(400) < 300).astype(float)[:, None]
    [found] = bootstrap_ratios(rights, np.ones((400, 1)))
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert found["value"] == 0.75
    assert (found["low"], found["high"]) == (pytest.approx(0.75 - half, abs=0.006), pytest.approx(0.75 + half, abs=0.006))


def test_the_bootstrap_draws_documents_and_not_values() -> None:
    """Ten documents of a hundred values that fail together: as wide as ten values, not as a thousand."""
    rights = np.array([100.0] * 5 + [0.0] * 5)[:, None]
    [found] = bootstrap_ratios(rights, np.full((10, 1), 100.0))
    assert found["low"] is not None
    assert found["low"] <= 0.25


def test_the_bootstrap_is_the_same_each_time() -> None:
    parts, wholes = np.arange(20.0).reshape(10, 2), np.full((10, 2), 20.0)
    assert bootstrap_ratios(parts, wholes) == bootstrap_ratios(parts, wholes)


def test_a_difference_is_taken_over_pairs() -> None:
    """B has one value less right in each document: no doubt is left, however much the documents differ."""
    one = np.array([1.0, 5.0, 9.0, 10.0])
    found = bootstrap_difference((one, one - 1), (np.full(4, 10.0), np.full(4, 10.0)))
    assert [found[name] for name in ("value", "low", "high")] == [pytest.approx(-0.1)] * 3  # type: ignore[literal-required]


@given(SCORED)
def test_auroc_is_the_share_of_pairs_in_order(scored: list[tuple[int, bool]]) -> None:
    rights, wrongs = ([score for score, is_right in scored if is_right is kind] for kind in (True, False))
    pairs = [1.0 if right > wrong else 0.5 * (right == wrong) for right in rights for wrong in wrongs]
    found = compute_auroc(np.array([float(score) for score, _ in scored]), np.array([is_right for _, is_right in scored]))
    assert found == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


def test_ece_weighs_the_gap_of_each_bin() -> None:
    """Bins [0.9, 1]: 3 values, mean 0.95, 2 right; [0.2, 0.3): 1 value of 0.25, right. (3·|2/3 - 0.95| + 0.75) / 4."""
    found = compute_ece(np.array([0.92, 0.93, 1.0, 0.25]), np.array([True, False, True, True]))
    assert found == pytest.approx((3 * abs(2 / 3 - 0.95) + 0.75) / 4)


def test_brier_is_the_mean_square() -> None:
    assert compute_brier(np.array([1.0, 0.5]), np.array([True, False])) == pytest.approx(0.125)
    assert compute_brier(np.array([]), np.array([], bool)) is None
    assert compute_ece(np.array([]), np.array([], bool)) is None


def test_a_review_takes_the_least_certain_first() -> None:
    scores, rights = np.linspace(-1, 0, 100), np.ones(100, bool)
    rights[[0, 1, 50]] = False
    rows = list_reviews(scores, rights)
    assert [row["errors_left"] for row in rows[:4]] == [3, 2, 1, 1]
    assert (rows[50]["errors_left"], rows[51]["errors_left"]) == (1, 0)
    assert rows[10] == {
        "reviewed": 0.1,
        "errors_left": 1,
        "share_of_errors_left": pytest.approx(1 / 3),
        "error_rate_left": pytest.approx(1 / 90),
    }
    assert rows[100]["error_rate_left"] is None
