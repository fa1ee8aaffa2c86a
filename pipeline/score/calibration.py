"""Fit of a calibration: records with their facts and what of them is right in, a calibration and how it does on other documents out.

The model is a logistic regression with an L2 penalty over all values; slope and offset of each kind of page are fitted on scores of
documents that the regression has not seen (five folds), since those that it has seen look better than others will.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from pipeline.errors import JobError
from pipeline.evidence.calibration import (
    Calibration,
    ValueFacts,
    compute_schema_digest,
    dump_calibration,
    list_features,
)
from pipeline.output.records import RecordTable
from pipeline.score.cells import Tolerance
from pipeline.score.evaluation import compare_output
from pipeline.score.outputs import RecordSet
from pipeline.score.statistics import Floats, compute_auroc, compute_brier, compute_ece, compute_surest_error

OPTION = "--calibrate"
INVERSE_PENALTY = 0.3
LINE_PENALTY = 2.0
"""Of a kind's slope (from 1) and offset (from 0)."""
FOLDS = 5
LEAST_OCCURRENCES = 5
"""Values that must have a feature: a weight of fewer says nothing."""
LEAST_DOCUMENTS, LEAST_ERRORS = 20, 20
Bools = NDArray[np.bool_]
FactsByRecord = Mapping[tuple[str, int | None], Sequence[ValueFacts]]


@dataclass(frozen=True, eq=False)
class LabelledRecord:
    """A record whose values are known to be right or wrong."""

    source: str
    facts: tuple[ValueFacts, ...]
    rights: tuple[bool, ...]

    @property
    def kind(self) -> str:
        """Kind of its pages."""
        return str(self.facts[0].kind)


class HeldOutScores(TypedDict):
    """How well confidence tells right from wrong in documents that the calibration has not seen."""

    documents: int
    values: int
    errors: int
    auroc: float | None
    auroc_tokens: float | None
    """Of the sum of a value's log-probabilities alone."""
    ece: float | None
    brier: float | None
    wrong_of_surest: float | None
    """Share of wrong values among the surest 90 %."""


class CalibrationResult(TypedDict):
    """What `pipeline eval --calibrate` prints."""

    file: str
    documents: int
    values: int
    errors: int
    held_out: HeldOutScores
    """Of the one half of the documents, with a fit on the other."""
    kinds: dict[str, HeldOutScores]


def calibrate_output(records: RecordTable, facts: FactsByRecord, truth: Path, tolerance: Tolerance, file: Path) -> CalibrationResult:
    """Fit a calibration on an output and its truth, write it, and return how it does. Raises JobError."""
    labelled = label_records(records, facts, truth, tolerance)
    measured = measure_half(labelled)
    fitted = fit_calibration(labelled)
    model = records.job["job"]["model"]
    fitted = replace(
        fitted, schema_digest=compute_schema_digest(records.plan.schema), model=str(model["name"]), engine=str(model["engine"])
    )
    members: dict[str, list[tuple[LabelledRecord, Floats]]] = {}
    for record, confidences in measured:
        members.setdefault(record.kind, []).append((record, confidences))
    result: CalibrationResult = {
        "file": str(file),
        "documents": len(labelled),
        "values": sum(len(record.facts) for record in labelled),
        "errors": sum(record.rights.count(False) for record in labelled),
        "held_out": score_measured(measured),
        "kinds": {kind: score_measured(some) for kind, some in sorted(members.items())},
    }
    write_calibration(fitted, result, file)
    return result


def write_calibration(fitted: Calibration, result: CalibrationResult, file: Path) -> None:
    """Write a calibration with the figures of its fit. Raises JobError."""
    content = dump_calibration(fitted) | {"fit": {name: value for name, value in result.items() if name != "file"}}
    try:
        file.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise JobError(f"cannot write {file}: {error.strerror}", file, OPTION) from None


def label_records(records: RecordTable, facts: FactsByRecord, truth: Path, tolerance: Tolerance) -> list[LabelledRecord]:
    """Return the records that the truth has, with what of them is right. Raises JobError where they are too few."""
    found = []
    compared = compare_output(RecordSet(records), truth, tolerance)
    for document in compared.documents:
        key = compared.records.keys[document.index]
        rights = {cell.path: cell.is_exact for cell in document.cells}
        known = [one for one in facts.get(key, ()) if one.path in rights] if not document.has_failed else []
        if known:
            found.append(LabelledRecord(key[0], tuple(known), tuple(rights[one.path] for one in known)))
    errors = sum(record.rights.count(False) for record in found)
    if len(found) < LEAST_DOCUMENTS or errors < LEAST_ERRORS:
        raise JobError(
            f"{truth} and {records.place} have {len(found)} documents with log-probabilities in common, and {errors} wrong values: a "
            f"calibration needs at least {LEAST_DOCUMENTS} and {LEAST_ERRORS}, and is good with 50 documents of each kind of page",
            truth,
            OPTION,
        )
    return found


def measure_half(labelled: Sequence[LabelledRecord]) -> list[tuple[LabelledRecord, Floats]]:
    """Return the records of every second document of each kind with the confidences that a fit on the others gives them.

    All records of a document are in one half. Which one depends on its file's name, and not on the folder, so that figures can be repeated.
    """
    kinds: dict[str, str] = {}
    for record in labelled:
        kinds.setdefault(record.source, record.kind)
    order = sorted(kinds, key=lambda source: (kinds[source], hashlib.sha256(source.rpartition("/")[2].encode()).digest(), source))
    taught = {*order[::2]}
    fitted = fit_calibration([record for record in labelled if record.source in taught])
    return [(record, np.array(fitted.rate_values(record.facts))) for record in labelled if record.source not in taught]


def score_measured(measured: Sequence[tuple[LabelledRecord, Floats]]) -> HeldOutScores:
    """Return how well the confidences of some records tell right from wrong."""
    rights = np.array([right for record, _ in measured for right in record.rights], bool)
    confidences = np.concatenate([found for _, found in measured]) if measured else np.zeros(0)
    tokens = np.array([one.score.total for record, _ in measured for one in record.facts])
    return {
        "documents": len({record.source for record, _ in measured}),
        "values": len(rights),
        "errors": int((~rights).sum()),
        "auroc": compute_auroc(confidences, rights),
        "auroc_tokens": compute_auroc(tokens, rights),
        "ece": compute_ece(confidences, rights),
        "brier": compute_brier(confidences, rights),
        "wrong_of_surest": compute_surest_error(confidences, rights),
    }


def fit_calibration(labelled: Sequence[LabelledRecord]) -> Calibration:
    """Return the calibration of labelled records, without its schema, model and engine. Raises JobError where not one value is wrong."""
    rows = [row for record in labelled for row in list_features(record.facts)]
    rights = np.array([right for record in labelled for right in record.rights], bool)
    if rights.all() or not rights.any():
        raise JobError("a calibration needs right and wrong values in each half of the documents: label more documents", key=OPTION)
    counts: dict[str, int] = {}
    for row in rows:
        for name in row:
            counts[name] = counts.get(name, 0) + 1
    names = tuple(sorted(name for name, count in counts.items() if count >= LEAST_OCCURRENCES))
    given = np.array([[row.get(name, 0.0) for name in names] for row in rows])
    means, scales = given.mean(0), given.std(0)
    scales[scales < 1e-9] = 1.0
    scaled = (given - means) / scales
    weights = fit_logistic(scaled, rights, np.zeros(len(names) + 1), np.append(np.full(len(names), 1 / INVERSE_PENALTY), 0.0))
    kinds = np.array([one.kind for record in labelled for one in record.facts])
    unseen = score_unseen(scaled, rights, fold_documents(labelled))
    lines = {}
    for kind in sorted({*kinds.tolist()}):
        here = kinds == kind
        line = fit_logistic(unseen[here, None], rights[here], np.array([1.0, 0.0]), np.full(2, LINE_PENALTY))
        lines[str(kind)] = (max(float(line[0]), 0.1), float(line[1]))
    return Calibration("", "", "", names, means, scales, weights[:-1], float(weights[-1]), lines)


def fold_documents(labelled: Sequence[LabelledRecord]) -> NDArray[np.int64]:
    """Return the fold of each value; all values of a document are in one."""
    folds = {source: number % FOLDS for number, source in enumerate(sorted({record.source for record in labelled}))}
    return np.array([folds[record.source] for record in labelled for _ in record.facts])


def score_unseen(scaled: Floats, rights: Bools, folds: NDArray[np.int64]) -> Floats:
    """Return for each value the score by a regression on the other folds."""
    penalties, found = np.append(np.full(scaled.shape[1], 1 / INVERSE_PENALTY), 0.0), np.zeros(len(rights))
    for fold in range(FOLDS):
        here = folds == fold
        weights = fit_logistic(scaled[~here], rights[~here], np.zeros(scaled.shape[1] + 1), penalties)
        found[here] = scaled[here] @ weights[:-1] + weights[-1]
    return found


def fit_logistic(given: Floats, rights: Bools, start: Floats, penalties: Floats) -> Floats:
    """Return weights and, last, the intercept of a logistic regression of what is right on rows of features (values, features).

    Minimises the sum of the log losses and half of penalty * (weight - start)² (L-BFGS); `start` and `penalties` have the intercept's last.
    """
    full, targets = np.column_stack([given, np.ones(len(given))]), rights.astype(float)

    def measure_loss(weights: Floats) -> tuple[float, Floats]:
        scores = full @ weights
        loss = np.logaddexp(0.0, scores).sum() - targets @ scores
        gradient = full.T @ (0.5 * (1 + np.tanh(scores / 2)) - targets)
        away = weights - start
        return float(loss + 0.5 * (penalties * away) @ away), gradient + penalties * away

    found: Floats = minimize(measure_loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    return found
