"""Raw confidence ranks values by their tokens, their witness and what contradicts them."""

from __future__ import annotations

import pytest

from pipeline.evidence.confidence import compute_confidence
from pipeline.evidence.match import Evidence, Match, Witness


def rate(match: Match | None = None, places: int = 1, token_logprob: float = -0.5, disputed: bool = False, **more: object) -> float:
    evidence = Evidence("$.a", "1", match, places=places, **{"witness": Witness.TEXT, **more}) if match else None  # type: ignore[arg-type]
    return compute_confidence(token_logprob, evidence, disputed)


def test_without_evidence_it_is_the_probability_of_the_tokens() -> None:
    assert rate(token_logprob=-0.5) == pytest.approx(0.6065, abs=1e-4)
    assert rate(Match.NOT_APPLICABLE, witness=None) == rate(Match.REREAD, witness=Witness.MODEL) == rate()


def test_the_formula_is_that_of_the_documentation() -> None:
    assert rate(Match.EXACT, token_logprob=-0.6931472) == pytest.approx(20 / 21)
    assert rate(Match.ABSENT, token_logprob=-0.6931472, witness=None) == pytest.approx(0.1 / 1.1)


def test_what_is_witnessed_is_surer_and_what_is_not_less_sure() -> None:
    order = [
        rate(Match.HIDDEN),
        rate(Match.ABSENT, witness=None),
        rate(Match.SIMILAR),
        rate(),
        rate(Match.EXACT, places=5),
        rate(Match.NORMALIZED, witness=Witness.OCR_LAYER),
        rate(Match.EXACT, places=5, label_fit=1.0),
        rate(Match.NORMALIZED),
    ]
    assert order == sorted(order)
    assert len({*order}) == len(order)


def test_a_disputed_value_is_less_sure() -> None:
    assert rate(Match.EXACT, disputed=True) < rate(Match.EXACT)


def test_it_stays_between_0_and_1() -> None:
    assert 0 < rate(Match.HIDDEN, token_logprob=-1e6) < rate(Match.EXACT, token_logprob=0.0) < 1
