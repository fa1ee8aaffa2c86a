"""Evaluation of an output against a truth: a folder and a place in, scores by field, by group and of certainty out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from pipeline.output.records import read_record_table
from pipeline.records import Status
from pipeline.score.cells import Cell, Outcome, RecordComparer, Tolerance
from pipeline.score.outputs import RecordSet, TruthMatch
from pipeline.score.statistics import (
    Floats,
    Interval,
    ReviewRow,
    bootstrap_ratios,
    compute_auroc,
    compute_brier,
    compute_ece,
    compute_surest_error,
    compute_wilson,
    list_reviews,
)
from pipeline.score.truth import Truth, load_truth

KIND = "_page_kind"
"""The records' column with the kind of their pages."""
SUMS = (*map(str, Outcome), "normalized", "similarity", "true", "found")
"""What is summed over the cells of a field in a document: see `count_cells`."""


class FieldScores(TypedDict):
    """Scores of one field, or of all."""

    cells: int
    """Values compared, nulls included."""
    exact: Interval
    """Share of cells that are right or null on both sides."""
    normalized: Interval
    """The same, with texts normalised."""
    anls: Interval
    """Mean Levenshtein similarity of the cells."""
    precision: float | None
    """Right values / values in the records."""
    recall: float | None
    """Right values / values in the truth."""
    f1: Interval
    outcomes: dict[str, int]
    """Cells by `cells.Outcome`."""


class CertaintyScores(TypedDict):
    """How well the confidence in values tells right from wrong."""

    values: int
    """Cells with a confidence; nulls that the model wrote are among them."""
    errors: int
    """Those of them that are not right."""
    errors_without: int
    """Errors that no review of values finds: missing items, documents without a record or without certainties."""
    documents_without: int
    auroc: float | None
    ece: float | None
    brier: float | None
    wrong_of_surest: float | None
    """Share of wrong values among the surest 90 %."""
    review: list[ReviewRow]


class GroupScores(TypedDict):
    """Scores of all documents, or of those with one value of a column."""

    documents: int
    failed: int
    perfect: Interval
    """Share of documents without an error."""
    total: FieldScores
    fields: dict[str, FieldScores]
    certainty: CertaintyScores | None
    """None where no value has a certainty."""


class EvaluationResult(TypedDict):
    """What `pipeline eval` prints."""

    output: str
    truth: str
    number_tolerance: float
    date_tolerance_days: int
    without_record: list[str]
    """Documents of the truth that the output does not have, or has more than once."""
    without_truth: list[str]
    """Sources of the records that the truth does not have."""
    not_labelled: list[str]
    """Fields that the truth never has; they are not scored."""
    not_in_schema: list[str]
    """Keys of the truth that the schema does not have."""
    scores: GroupScores
    kinds: dict[str, CertaintyScores]
    """By kind of page, where the records have it."""
    by: str | None
    groups: dict[str, GroupScores]


@dataclass(frozen=True)
class ScoredDocument:
    """One record compared with its truth."""

    index: int
    """Its row in the record set."""
    cells: list[Cell]
    has_failed: bool

    @property
    def is_perfect(self) -> bool:
        return not self.has_failed and all(cell.is_exact for cell in self.cells)


@dataclass(frozen=True, eq=False)
class ComparedOutput:
    """An output and its truth, record by record."""

    records: RecordSet
    truth: Truth
    match: TruthMatch
    comparer: RecordComparer
    documents: list[ScoredDocument]

    def group_documents(self, values: Sequence[str]) -> dict[str, list[int]]:
        """Return the places of the documents by a value of their records, sorted by it."""
        members: dict[str, list[int]] = {}
        for at, document in enumerate(self.documents):
            members.setdefault(values[document.index], []).append(at)
        return {value: members[value] for value in sorted(members)}


def compare_output(records: RecordSet, truth_place: Path, tolerance: Tolerance) -> ComparedOutput:
    """Return the comparison of an output's records with a truth. Raises JobError for a truth that cannot be read, and RunError."""
    truth = load_truth(truth_place, records.plan, records.per_page)
    match = TruthMatch(records, truth, truth_place)
    comparer = RecordComparer(records.plan.root, tolerance, truth.labelled)
    return ComparedOutput(records, truth, match, comparer, compare_records(records, truth, match.pairs, comparer))


def evaluate_output(place: str, truth_place: Path, tolerance: Tolerance, by: str | None = None) -> EvaluationResult:
    """Return the scores of an output against a truth. Raises JobError for a place that cannot be read, and RunError."""
    records = RecordSet(read_record_table(place))
    groups = records.read_column(by) if by else []  # a wrong name is said before anything is compared
    compared = compare_output(records, truth_place, tolerance)
    truth, documents, match, comparer = compared.truth, compared.documents, compared.match, compared.comparer
    confidences = records.read_confidences([document.index for document in documents])

    def score(chosen: Sequence[int]) -> GroupScores:
        return score_group([documents[at] for at in chosen], [confidences[at] for at in chosen], comparer.fields)

    def score_kind(chosen: Sequence[int]) -> CertaintyScores | None:
        return score_certainty([documents[at].cells for at in chosen], [confidences[at] for at in chosen])

    kinds = compared.group_documents(records.read_column(KIND)) if KIND in records.table.column_names else {}
    rated = {kind: score_kind(chosen) for kind, chosen in kinds.items() if kind != "null"}
    members = compared.group_documents(groups) if by else {}
    return {
        "output": place,
        "truth": str(truth_place),
        "number_tolerance": float(tolerance.number),
        "date_tolerance_days": tolerance.date_days,
        "without_record": match.unmatched,
        "without_truth": [source for index, (source, _) in enumerate(records.keys) if index not in match.pairs],
        "not_labelled": [field for field in RecordComparer(records.plan.root, tolerance).fields if field not in truth.labelled],
        "not_in_schema": truth.unknown,
        "scores": score(range(len(documents))),
        "kinds": {kind: found for kind, found in rated.items() if found},
        "by": by,
        "groups": {value: score(chosen) for value, chosen in members.items()},
    }


def compare_records(records: RecordSet, truth: Truth, pairs: dict[int, int], comparer: RecordComparer) -> list[ScoredDocument]:
    """Return the comparison of each matched record, in the order of `pairs`: the row of the truth by the record."""
    documents = []
    for (index, number), row in zip(pairs.items(), records.read_rows(list(pairs)), strict=True):
        has_failed = records.statuses[index] == Status.FAILED
        cells = comparer.mark_unread(truth.typed[number]) if has_failed else comparer.compare_rows(truth.typed[number], row)
        documents.append(ScoredDocument(index, cells, has_failed))
    return documents


def score_group(documents: Sequence[ScoredDocument], confidences: Sequence[dict[str, float]], fields: Sequence[str]) -> GroupScores:
    """Return the scores of some documents."""
    counts = count_cells([document.cells for document in documents], fields)
    total, *by_field = score_counts(np.concatenate([counts.sum(1, keepdims=True), counts], 1))
    return {
        "documents": len(documents),
        "failed": sum(document.has_failed for document in documents),
        "perfect": compute_wilson(sum(document.is_perfect for document in documents), len(documents)),
        "total": total,
        "fields": dict(zip(fields, by_field, strict=True)),
        "certainty": score_certainty([document.cells for document in documents], confidences),
    }


def count_cells(documents: Sequence[Sequence[Cell]], fields: Sequence[str]) -> Floats:
    """Return the sums over the cells of each field: (documents, fields, `SUMS`). `true` and `found` count values that are not null."""
    counts, places = np.zeros((len(documents), len(fields), len(SUMS))), {field: at for at, field in enumerate(fields)}
    columns = {outcome: SUMS.index(outcome) for outcome in Outcome}
    for at, cells in enumerate(documents):
        for cell in cells:
            sums = counts[at, places[cell.field]]
            sums[columns[cell.outcome]] += 1
            sums[len(columns) :] += (cell.is_normalized, cell.similarity, cell.truth is not None, cell.found is not None)
    return counts


def score_counts(counts: Floats) -> list[FieldScores]:
    """Return the scores of each field from what `count_cells` returns."""
    by_name = {name: counts[:, :, column] for column, name in enumerate(SUMS)}
    cells = counts[:, :, : len(Outcome)].sum(2)
    anls = bootstrap_ratios(by_name["similarity"], cells)
    f1 = bootstrap_ratios(2 * by_name[Outcome.RIGHT], by_name["true"] + by_name["found"])
    scores = []
    for field in range(counts.shape[1]):
        sums = {name: int(column[:, field].sum()) for name, column in by_name.items()}
        whole = int(cells[:, field].sum())
        scores.append(
            FieldScores(
                cells=whole,
                exact=compute_wilson(sums[Outcome.RIGHT] + sums[Outcome.BOTH_NULL], whole),
                normalized=compute_wilson(sums["normalized"], whole),
                anls=anls[field],
                precision=sums[Outcome.RIGHT] / sums["found"] if sums["found"] else None,
                recall=sums[Outcome.RIGHT] / sums["true"] if sums["true"] else None,
                f1=f1[field],
                outcomes={str(outcome): sums[outcome] for outcome in Outcome},
            )
        )
    return scores


def score_certainty(documents: Sequence[Sequence[Cell]], confidences: Sequence[dict[str, float]]) -> CertaintyScores | None:
    """Return how well the confidence in values, by their paths in each document, tells right values from wrong ones."""
    known: list[tuple[float, bool]] = []
    errors = 0
    for cells, confidence in zip(documents, confidences, strict=True):
        errors += sum(not cell.is_exact for cell in cells)
        answers = [cell for cell in cells if cell.outcome is not Outcome.UNREAD and cell.path in confidence]
        known += [(confidence[cell.path], cell.is_exact) for cell in answers]
    if not known:
        return None
    scores, rights = np.array([score for score, _ in known]), np.array([is_right for _, is_right in known])
    wrong = int((~rights).sum())
    return {
        "values": len(known),
        "errors": wrong,
        "errors_without": errors - wrong,
        "documents_without": sum(not confidence for confidence in confidences),
        "auroc": compute_auroc(scores, rights),
        "ece": compute_ece(scores, rights),
        "brier": compute_brier(scores, rights),
        "wrong_of_surest": compute_surest_error(scores, rights),
        "review": list_reviews(scores, rights),
    }
