"""Statistics of scores: counts and certainties in; shares with intervals, and how well certainty tells right from wrong, out."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""
RESAMPLES, SEED, CHUNK = 1000, 0, 50
ECE_BINS = 10
SUREST = 0.9
Floats = NDArray[np.float64]


class Interval(TypedDict):
    """A score and its 95 % interval, each between 0 and 1; null where nothing was counted."""

    value: float | None
    low: float | None
    high: float | None


class ReviewRow(TypedDict):
    """What is left when the least certain values have been reviewed and put right."""

    reviewed: float
    """Share of the values that were reviewed."""
    errors_left: int
    share_of_errors_left: float | None
    error_rate_left: float | None
    """Share of errors among the values that were not reviewed; null if none is left."""


def compute_wilson(count: int, total: int) -> Interval:
    """Return a share with its 95 % score interval. Wilson, Probable inference, 1927 (JASA 22, 209-212)."""
    if not total:
        return {"value": None, "low": None, "high": None}
    share, square = count / total, Z_95**2
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = Z_95 * sqrt(share * (1 - share) / total + square / (4 * total**2)) / (1 + square / total)
    return {"value": share, "low": max(0.0, min(share, centre - half)), "high": min(1.0, max(share, centre + half))}


def draw_weights(documents: int) -> Iterator[Floats]:
    """Yield how often each document is in each of 1,000 samples with replacement, a chunk of samples at a time; always the same."""
    random = np.random.default_rng(SEED)
    for _ in range(0, RESAMPLES, CHUNK):
        drawn = random.integers(0, documents, (CHUNK, documents)) + np.arange(CHUNK)[:, None] * documents
        yield np.bincount(drawn.ravel(), minlength=CHUNK * documents).reshape(CHUNK, documents).astype(float)


def divide_sums(parts: Floats, wholes: Floats) -> Floats:
    """Return quotients; NaN where there is nothing to divide by."""
    quotients: Floats = np.divide(parts, wholes, out=np.full(np.shape(parts), np.nan), where=wholes > 0)
    return quotients


def bootstrap_ratios(parts: Floats, wholes: Floats) -> list[Interval]:
    """Return the quotient of the sums of each column with its 95 % interval; both arrays are (documents, columns).

    The interval is the percentile bootstrap's over documents, because the values of one document fail together. Efron and Tibshirani,
    An Introduction to the Bootstrap, 1993, chapter 13.
    """
    if not len(parts):
        return [{"value": None, "low": None, "high": None} for _ in range(parts.shape[1])]
    values = divide_sums(parts.sum(0), wholes.sum(0))
    samples = np.concatenate([divide_sums(weights @ parts, weights @ wholes) for weights in draw_weights(len(parts))])
    return [make_interval(value, samples[:, column]) for column, value in enumerate(values)]


def bootstrap_difference(parts: tuple[Floats, Floats], wholes: tuple[Floats, Floats]) -> Interval:
    """Return the second quotient of sums less the first; each array has one number per document, and documents are drawn in pairs."""
    value = divide_sums(parts[1].sum(), wholes[1].sum()) - divide_sums(parts[0].sum(), wholes[0].sum())
    samples = [
        divide_sums(weights @ parts[1], weights @ wholes[1]) - divide_sums(weights @ parts[0], weights @ wholes[0])
        for weights in draw_weights(len(parts[0]))
    ]
    return make_interval(float(value), np.concatenate(samples))


def make_interval(value: float, samples: Floats) -> Interval:
    """Return a value between the 2.5 % and the 97.5 % quantile of the samples that have one."""
    known = samples[~np.isnan(samples)]
    if np.isnan(value) or not len(known):
        return {"value": None, "low": None, "high": None}
    low, high = np.quantile(known, (0.025, 0.975))
    return {"value": float(value), "low": float(low), "high": float(high)}


def compute_auroc(scores: Floats, rights: NDArray[np.bool_]) -> float | None:
    """Return how probable it is that a right value has a higher score than a wrong one, equal scores counting half.

    That is the area under the ROC curve (Hanley and McNeil, Radiology 143, 1982). None without a right and a wrong value.
    """
    ones, zeros = int(rights.sum()), int((~rights).sum())
    if not ones or not zeros:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[rights].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def compute_ece(confidences: Floats, rights: NDArray[np.bool_]) -> float | None:
    """Return the expected calibration error: |share right - mean confidence| in 10 bins of equal width, weighted by their sizes.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3.
    """
    if not len(confidences):
        return None
    bins = np.minimum((confidences * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.bincount(bins, rights.astype(float) - confidences, ECE_BINS)
    return float(np.abs(gaps).sum() / len(confidences))


def compute_brier(confidences: Floats, rights: NDArray[np.bool_]) -> float | None:
    """Return the mean squared difference of confidence and outcome (1 right, 0 wrong). Brier, Monthly Weather Review 78, 1950."""
    return float(np.mean((confidences - rights) ** 2)) if len(confidences) else None


def compute_surest_error(confidences: Floats, rights: NDArray[np.bool_]) -> float | None:
    """Return the share of wrong values among the surest 90 %, of equals the earlier ones; None where there is no value."""
    kept = np.argsort(-confidences, kind="stable")[: round(SUREST * len(confidences))]
    return float((~rights[kept]).mean()) if len(kept) else None


def list_reviews(scores: Floats, rights: NDArray[np.bool_]) -> list[ReviewRow]:
    """Return what is left after a review of the least certain 0 %, 1 %, … 100 % of the values; of equals the earlier first."""
    order = np.argsort(scores, kind="stable")
    errors = np.concatenate([[0], np.cumsum(~rights[order])])
    total, rows = int(errors[-1]), list[ReviewRow]()
    for percent in range(101 if len(scores) else 0):
        reviewed = round(len(scores) * percent / 100)
        left, unseen = total - int(errors[reviewed]), len(scores) - reviewed
        rows.append(
            {
                "reviewed": percent / 100,
                "errors_left": left,
                "share_of_errors_left": left / total if total else None,
                "error_rate_left": left / unseen if unseen else None,
            }
        )
    return rows
