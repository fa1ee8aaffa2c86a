"""Fit of a calibration: it finds what is to be found in made-up values, and its figures are of documents that it has not seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import JobError
from pipeline.evidence.calibration import PageKind, ValueFacts
from pipeline.evidence.match import Evidence, Match, Witness
from pipeline.schema.certainty import TokenScore
from pipeline.score.calibration import LabelledRecord, fit_calibration, fit_logistic, measure_half, score_measured
from pipeline.score.statistics import compute_surest_error


def make_records(documents: int, seed: int = 0) -> list[LabelledRecord]:
    """Return records whose values are right as often as their tokens say, and more often where they are printed; photos lie."""
    random, found = np.random.default_rng(seed), []
    for number in range(documents):
        kind, facts, rights = (PageKind.DIGITAL, PageKind.PHOTO)[number % 2], [], []
        for at in range(12):
            logprob, is_printed = -float(random.exponential(0.4)), bool(random.random() < 0.6)
            odds = np.exp(logprob) / (1 - np.exp(logprob)) * (12 if is_printed else 0.4) * (1.0 if kind is PageKind.DIGITAL else 0.3)
            match = Match.EXACT if is_printed else Match.ABSENT
            evidence = Evidence("", "x", match, witness=Witness.TEXT if is_printed else None, places=1)
            score = TokenScore(logprob, 1, logprob, logprob)
            facts.append(ValueFacts(f"$.v{at}", f"v{at}", "x", "text", score, evidence, False, {}, kind, None))
            rights.append(bool(random.random() < odds / (1 + odds)))
        found.append(LabelledRecord(f"{number}.pdf", tuple(facts), tuple(rights)))
    return found


def test_a_logistic_regression_finds_the_weights_of_its_data() -> None:
    random = np.random.default_rng(1)
    given = random.standard_normal((20_000, 2))
    rights = random.random(20_000) < 1 / (1 + np.exp(-(given @ [1.5, -0.5] + 0.7)))
    assert fit_logistic(given, rights, np.zeros(3), np.zeros(3)) == pytest.approx([1.5, -0.5, 0.7], abs=0.06)


def test_a_penalty_keeps_weights_near_their_start() -> None:
    given, rights = np.array([[1.0], [-1.0]]), np.array([True, False])
    assert fit_logistic(given, rights, np.array([1.0, 0.0]), np.full(2, 1e6)) == pytest.approx([1.0, 0.0], abs=1e-4)


def test_what_was_not_seen_is_rated_better_than_by_its_tokens_and_as_often_right_as_said() -> None:
    measured = measure_half(make_records(400))
    scores = score_measured(measured)
    assert (scores["documents"], scores["values"]) == (200, 2400)
    assert scores["auroc"] is not None
    assert scores["auroc_tokens"] is not None
    assert scores["auroc"] > scores["auroc_tokens"] + 0.05
    for kind in PageKind.DIGITAL, PageKind.PHOTO:
        ece = score_measured([one for one in measured if one[0].kind == kind])["ece"]
        assert ece is not None
        assert ece < 0.06


def test_the_measured_half_is_not_the_fitted_one() -> None:
    records = make_records(60)
    measured = {record.source for record, _ in measure_half(records)}
    fitted = {record.source for record in records} - measured
    assert (len(measured), len(fitted)) == (30, 30)
    flipped = [LabelledRecord(r.source, r.facts, tuple(not right for right in r.rights)) if r.source in measured else r for r in records]
    assert [found.tolist() for _, found in measure_half(flipped)] == [found.tolist() for _, found in measure_half(records)]


def test_the_pages_of_a_document_are_in_one_half_which_its_folder_does_not_change() -> None:
    pages = [replace(record, source=f"in/{number // 3}.pdf") for number, record in enumerate(make_records(90))]
    moved = [replace(record, source=record.source.replace("in/", "s3://other/")) for record in pages]
    measured, again = measure_half(pages), measure_half(moved)
    assert len(measured) == 3 * len({record.source for record, _ in measured}) == 45
    assert [found.tolist() for _, found in again] == [found.tolist() for _, found in measured]


def test_the_same_records_give_the_same_calibration() -> None:
    one, other = fit_calibration(make_records(40)), fit_calibration(make_records(40))
    assert (one.weights.tolist(), one.kinds) == (other.weights.tolist(), other.kinds)


def test_without_an_error_nothing_can_be_fitted() -> None:
    records = [LabelledRecord(r.source, r.facts, (True,) * len(r.rights)) for r in make_records(4)]
    with pytest.raises(JobError, match="needs right and wrong values"):
        fit_calibration(records)


def test_the_surest_nine_tenths_are_counted() -> None:
    confidences, rights = np.linspace(0.1, 1.0, 10), np.array([False, True, True, True, True, False, True, True, True, True])
    assert compute_surest_error(confidences, rights) == pytest.approx(1 / 9)
    assert compute_surest_error(np.zeros(0), np.zeros(0, bool)) is None
