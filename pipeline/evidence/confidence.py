"""Raw confidence of values: the probability of a value's tokens and its evidence in, a number from 0 to 1 out.

    odds = p / (1 - p) * factor        p: exp of the sum of the log-probabilities of the value's tokens, within 0.0001 and 0.9999
    confidence = odds / (1 + odds)

The factor says how much more often a value so witnessed is right than wrong, beside its tokens; `FACTORS` has it, a guess in round
numbers, for a printed value in one place. In several places its label decides: a value whose label stands nowhere near proves less.
It is a ranking, and no probability before it is calibrated on labelled documents.
"""

from __future__ import annotations

import math
from typing import TypedDict

from pipeline.evidence.match import Evidence, Match, Witness

LEAST_P = 1e-4
FACTORS = {Match.EXACT: 20.0, Match.NORMALIZED: 20.0, Match.SIMILAR: 0.5, Match.HIDDEN: 0.05, Match.ABSENT: 0.1}
FACTORS |= {Match.REREAD: 1.0, Match.NOT_APPLICABLE: 1.0}
SEVERAL_PLACES, WITH_LABEL = 3.0, 7.0
"""Factor of a value in several places without any word of its label there, and what a whole label adds."""
WEIGHTS = {None: 1.0, Witness.TEXT: 1.0, Witness.MODEL: 1.0, Witness.OCR: 0.75, Witness.OCR_LAYER: 0.5}
"""To which power the factor of a witness is raised: OCR of the pixels errs, and what OCR software has added to a scan errs more often."""
DISAGREEMENT = 0.2
"""Factor of a value on which the parts of a document disagree."""


class ConfidenceRow(TypedDict):
    """The confidence of a value as a record holds it."""

    path: str
    confidence: float


def compute_confidence(token_logprob: float, evidence: Evidence | None, is_disputed: bool) -> float:
    """Return the raw confidence of a value: the sum of its tokens' log-probabilities (nats), its evidence, and whether parts disagree."""
    p = min(max(math.exp(min(token_logprob, 0.0)), LEAST_P), 1 - LEAST_P)
    odds = p / (1 - p) * weigh_evidence(evidence) * (DISAGREEMENT if is_disputed else 1.0)
    return odds / (1 + odds)


def weigh_evidence(evidence: Evidence | None) -> float:
    """Return by how much evidence multiplies the odds of a value; 1 for none."""
    if evidence is None:
        return 1.0
    factor: float = FACTORS[evidence.match]
    if evidence.match in (Match.EXACT, Match.NORMALIZED) and evidence.places > 1:
        factor = SEVERAL_PLACES + WITH_LABEL * evidence.label_fit
    return float(factor ** WEIGHTS[evidence.witness])
