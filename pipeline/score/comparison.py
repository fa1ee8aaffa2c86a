"""Comparison of two outputs of one schema: two folders in, what changed field by field and the worst documents first out.

With a truth also which of the two is right more often, and whether the second has dropped too far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from pipeline.errors import JobError
from pipeline.output.records import read_record_table
from pipeline.schema import dump_json
from pipeline.score.cells import Cell, Outcome, RecordComparer, Tolerance
from pipeline.score.evaluation import ScoredDocument, compare_records
from pipeline.score.outputs import RecordKey, RecordSet, TruthMatch
from pipeline.score.statistics import Interval, bootstrap_difference, compute_wilson
from pipeline.score.truth import SourceIndex, load_truth

CHANGES = {Outcome.WRONG: "changed", Outcome.MISSING: "became_null", Outcome.INVENTED: "became_value"}
"""What the outcomes mean where the first output takes the place of the truth; the others are `same`."""


class ValueChange(TypedDict):
    """A value that two outputs do not have in common; `a` and `b` are JSON texts."""

    path: str
    """In B; `$.line_items[-].amount` is of an item that only A has."""
    change: str
    a: str
    b: str


class ChangedDocument(TypedDict):
    """A document whose records differ."""

    source: str
    page: int | None
    status_a: str
    status_b: str
    changes: list[ValueChange]


class StatusCount(TypedDict):
    """How many documents have these statuses."""

    a: str
    b: str
    documents: int


class AccuracyDrop(TypedDict):
    """How many cells of both outputs are right, over the documents that both and the truth have."""

    documents: int
    a: Interval
    b: Interval
    difference_points: float
    """Of B from A, in percentage points, with its 95 % interval."""
    low_points: float
    high_points: float
    max_drop_points: float
    has_dropped: bool


class ComparisonResult(TypedDict):
    """What `pipeline compare` prints."""

    a: str
    b: str
    documents: int
    """That both have."""
    changed: int
    only_in_a: list[str]
    only_in_b: list[str]
    statuses: list[StatusCount]
    fields: dict[str, dict[str, int]]
    """Cells of each field: same, changed, became_null, became_value."""
    worst: list[ChangedDocument]
    """All documents that differ, those with most changes first."""
    truth: AccuracyDrop | None


def compare_outputs(a: str, b: str, truth_place: Path | None, tolerance: Tolerance, max_drop_points: float) -> ComparisonResult:
    """Return what differs between two outputs. Raises JobError, also where their columns differ, and RunError."""
    one, other = RecordSet(read_record_table(a)), RecordSet(read_record_table(b))
    if one.plan.schema != other.plan.schema or one.per_page != other.per_page:
        raise JobError(f"{a} and {b} have records of different columns: compare outputs of one schema", b)
    pairs = pair_records(one.keys, other.keys)
    rows = zip(one.read_rows(list(pairs)), other.read_rows(list(pairs.values())), strict=True)
    comparer = RecordComparer(one.plan.root, Tolerance())
    compared = {pair: comparer.compare_rows(*both) for pair, both in zip(pairs.items(), rows, strict=True)}
    fields: dict[str, Counter[str]] = {field: Counter() for field in comparer.fields}
    for cells in compared.values():
        for cell in cells:
            fields[cell.field][CHANGES.get(cell.outcome, "same")] += 1
    worst = [describe_document(one, other, *pair, cells) for pair, cells in compared.items()]
    worst = sorted((found for found in worst if found["changes"] or found["status_a"] != found["status_b"]), key=rank_document)
    in_both = {*pairs.values()}
    statuses = Counter((one.statuses[i], other.statuses[j]) for i, j in pairs.items())
    return {
        "a": a,
        "b": b,
        "documents": len(pairs),
        "changed": len(worst),
        "only_in_a": [format_key(key) for i, key in enumerate(one.keys) if i not in pairs],
        "only_in_b": [format_key(key) for j, key in enumerate(other.keys) if j not in in_both],
        "statuses": [{"a": before, "b": after, "documents": count} for (before, after), count in sorted(statuses.items())],
        "fields": {field: {name: counts[name] for name in ("same", *CHANGES.values())} for field, counts in fields.items()},
        "worst": worst,
        "truth": compare_accuracies(one, other, pairs, truth_place, tolerance, max_drop_points) if truth_place else None,
    }


def pair_records(one: Sequence[RecordKey], other: Sequence[RecordKey]) -> dict[int, int]:
    """Return which record of the second output is about the same document as one of the first.

    Its source is the same or, where no other claims it, has the same end. Raises JobError if there is none.
    """
    index, places = SourceIndex(source for source, _ in other), {key: at for at, key in enumerate(other)}
    pairs = {i: places[key] for i, key in enumerate(one) if key in places}
    claims: dict[int, list[int]] = {}
    for i, (source, page) in enumerate(one):
        found = index.find_sources(source)
        if i not in pairs and len(found) == 1 and (found[0], page) in places:
            claims.setdefault(places[found[0], page], []).append(i)
    taken = {*pairs.values()}
    pairs |= {claiming[0]: j for j, claiming in claims.items() if len(claiming) == 1 and j not in taken}
    if not pairs:
        raise JobError(f"the outputs have no document in common: the first of A is {one[0][0]}, that of B is {other[0][0]}")
    return dict(sorted(pairs.items()))


def describe_document(one: RecordSet, other: RecordSet, i: int, j: int, cells: Sequence[Cell]) -> ChangedDocument:
    """Return what differs in one document."""
    source, page = one.keys[i]
    changes: list[ValueChange] = [
        {"path": cell.path, "change": CHANGES[cell.outcome], "a": dump_value(cell.truth), "b": dump_value(cell.found)}
        for cell in cells
        if cell.outcome in CHANGES
    ]
    return {"source": source, "page": page, "status_a": one.statuses[i], "status_b": other.statuses[j], "changes": changes}


def rank_document(found: ChangedDocument) -> tuple[int, str, int]:
    """Return the sort key by which the documents with most changes come first."""
    return -len(found["changes"]), found["source"], found["page"] or 0


def format_key(key: RecordKey) -> str:
    source, page = key
    return source if page is None else f"{source} page {page}"


def dump_value(value: Any) -> str:
    """Return a value of a record as JSON."""
    return dump_json(value.isoformat() if isinstance(value, date) else value)


def compare_accuracies(
    one: RecordSet, other: RecordSet, pairs: Mapping[int, int], place: Path, tolerance: Tolerance, max_drop_points: float
) -> AccuracyDrop:
    """Return the shares of right cells of both outputs, over the documents that all three have, and their difference."""
    truth = load_truth(place, one.plan, one.per_page)
    comparer = RecordComparer(one.plan.root, tolerance, truth.labelled)
    matches = [TruthMatch(records, truth, place).pairs for records in (one, other)]
    shared = [(i, j) for i, j in pairs.items() if i in matches[0] and matches[0][i] == matches[1].get(j)]
    if not shared:
        raise JobError(f"{place} is about no document that both outputs have", place, "--truth")
    sides = [
        compare_records(one, truth, {i: matches[0][i] for i, _ in shared}, comparer),
        compare_records(other, truth, {j: matches[1][j] for _, j in shared}, comparer),
    ]
    rights = [np.array([sum(cell.is_exact for cell in document.cells) for document in side], float) for side in sides]
    wholes = [np.array([len(document.cells) for document in side], float) for side in sides]
    shares = [measure_accuracy(side) for side in sides]
    found = bootstrap_difference((rights[0], rights[1]), (wholes[0], wholes[1]))
    points = [100 * (found[name] or 0.0) for name in ("value", "low", "high")]
    return {
        "documents": len(shared),
        "a": shares[0],
        "b": shares[1],
        "difference_points": points[0],
        "low_points": points[1],
        "high_points": points[2],
        "max_drop_points": max_drop_points,
        "has_dropped": points[0] < -max_drop_points - 1e-9,
    }


def measure_accuracy(documents: Sequence[ScoredDocument]) -> Interval:
    """Return the share of cells that are right or null on both sides."""
    cells = [cell for document in documents for cell in document.cells]
    return compute_wilson(sum(cell.is_exact for cell in cells), len(cells))
