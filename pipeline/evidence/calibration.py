"""Calibrated confidence: what is known of a value and a calibration file in, the probability that the value is right out.

    z = intercept + sum of weight * (feature - mean) / scale        a logistic model of all values
    confidence = 1 / (1 + exp(-slope * z - offset))                 slope and offset of the kind of page (Platt, 1999)

A calibration is fitted on labelled documents (`score.calibration`) and is of one schema. Applying it needs numpy alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import JobError
from pipeline.evidence.match import UNWITNESSED, Evidence, Match, Witness
from pipeline.records import PageRow, WordMark
from pipeline.schema.certainty import TokenScore

KEY = "extract.calibration"
FORMAT = "pipeline calibration 1"
PHOTO_UNEVENNESS = 0.06
"""From here on the light falls unevenly on a page image: a photograph."""
LEAST_PROBABILITY = 1e-4
MAX_MARGIN = 12.0
"""Nats beyond which a margin says nothing more."""
NO_MARGIN = 6.0
"""Stands for the margin where the engine gives none."""
MAX_SCORE = 30.0


class PageKind(StrEnum):
    """What the pages of a record are."""

    DIGITAL = "digital"
    """They have a text layer that is drawn."""
    SCAN = "scan"
    PHOTO = "photo"
    """Images on which the light falls unevenly."""


@dataclass(frozen=True, eq=False)
class ValueFacts:
    """What is known of a value beside the value."""

    path: str
    field: str
    """The path without the numbers of items: `line_items.amount`."""
    value: Any
    type: str
    """`text`, `number`, `date`, `choice`."""
    score: TokenScore
    evidence: Evidence | None
    is_disputed: bool
    rules: Mapping[str, bool]
    """The rules that concern it and were judged, by name: whether they hold; of its own item, where they concern items alone."""
    kind: PageKind
    quality: tuple[float, float, float, float] | None
    """The worst of the record's pages: contrast, sharpness, noise, unevenness; None in an older ledger."""


def decide_page_kind(pages: Sequence[PageRow]) -> PageKind:
    """Return the kind of a record's pages; the worst of them counts."""
    if all(has_printed_words(page) for page in pages):
        return PageKind.DIGITAL
    images = [quality for page in pages if not has_printed_words(page) and (quality := page.get("quality"))]
    return PageKind.PHOTO if any(quality["unevenness"] >= PHOTO_UNEVENNESS for quality in images) else PageKind.SCAN


def has_printed_words(page: PageRow) -> bool:
    """Say whether a page has words that are drawn, and not a layer that OCR software has added to a scan."""
    layer = page.get("text_layer")
    return layer is not None and (layer["marks"] is None or WordMark.PRINTED in layer["marks"])


def find_worst_quality(pages: Sequence[PageRow]) -> tuple[float, float, float, float] | None:
    """Return the worst measures among pages; None where they were not measured."""
    found = [quality for page in pages if (quality := page.get("quality"))]
    if not found or len(found) < len(pages):
        return None
    least = (min(quality["contrast"] for quality in found), min(quality["sharpness"] for quality in found))
    return *least, max(quality["noise"] for quality in found), max(quality["unevenness"] for quality in found)


def compute_logit(logprob: float) -> float:
    """Return the log-odds of a log-probability, within ± 9.2."""
    p = min(max(math.exp(min(logprob, 0.0)), LEAST_PROBABILITY), 1 - LEAST_PROBABILITY)
    return math.log(p / (1 - p))


def list_features(facts: Sequence[ValueFacts]) -> list[dict[str, float]]:
    """Return the features of each value of one record by their names, those that are 0 left out."""
    totals = [compute_logit(one.score.total) for one in facts]
    worst = sorted(totals)[: max(1, len(totals) // 10)]
    groups: dict[str, list[tuple[float, Evidence | None]]] = {}
    for one, total in zip(facts, totals, strict=True):
        groups.setdefault(one.path.rpartition("]")[0], []).append((total, one.evidence))
    rows = []
    for one, total in zip(facts, totals, strict=True):
        row = describe_tokens(one, total) | {"document": sum(worst) / len(worst)}
        row |= describe_beside(groups[one.path.rpartition("]")[0]], is_in_list="]" in one.path)
        row |= {f"type {one.type}": 1.0, f"field {one.field}": 1.0, f"kind {one.kind}": 1.0, f"kind {one.kind} sum": total}
        row |= {"null": 1.0} if one.value is None else {}
        row |= describe_evidence(one)
        row |= {"disputed": float(one.is_disputed)}
        row |= {f"rule {name} {'passed' if holds else 'broken'}": 1.0 for name, holds in one.rules.items()}
        if one.quality:
            row |= dict(zip(("contrast", "sharpness", "noise", "unevenness"), one.quality, strict=True))
        rows.append(row)
    return rows


def describe_tokens(one: ValueFacts, total: float) -> dict[str, float]:
    """Return the features of a value's tokens."""
    score = one.score
    margin = NO_MARGIN if score.margin is None else min(max(score.margin, -MAX_MARGIN), MAX_MARGIN)
    return {
        "sum": total,
        "sure": float(score.total > -1e-3),
        "mean": compute_logit(score.mean),
        "least": compute_logit(score.least),
        "first": compute_logit(score.first),
        "margin": margin,
        "count": math.log1p(score.count),
    }


def describe_beside(group: Sequence[tuple[float, Evidence | None]], is_in_list: bool) -> dict[str, float]:
    """Return the features that the values of an item of a list, or those outside of lists, have in common."""
    totals, found = [total for total, _ in group], [evidence for _, evidence in group if evidence]
    row = {"beside": sum(totals) / len(totals), "least beside": min(totals)}
    if found:
        row |= {"unwitnessed beside": sum(one.match in UNWITNESSED for one in found) / len(found)}
    if found and is_in_list:
        row |= {"most rivals": max(one.rivals for one in found)}
        row |= {"least item": min((one.item_fit for one in found if one.item_fit is not None), default=1.0)}
    return row


def describe_evidence(one: ValueFacts) -> dict[str, float]:
    """Return the features of a value's evidence; none where there was nothing to look in or for.

    What was only read again is absent, too, as it is to a calibration that was fitted without such values.
    """
    found = one.evidence
    if found is None:
        return {}
    matches = [Match.ABSENT, Match.REREAD] if found.match == Match.REREAD else [found.match]
    row = {name: 1.0 for match in matches for name in (f"match {match}", f"{one.type} {match}")}
    if found.distance is not None:
        row |= {"edits": found.distance / max(1, len(found.value))}
    if found.places:
        row |= {"rivals": math.log1p(found.rivals), "misplaced": float(found.is_misplaced)}
        row |= {f"{one.type} after words": float(found.has_words_before), f"{one.type} before words": float(found.has_words_after)}
        row |= {f"label of {one.field}": found.label_fit}
        row |= {"item": found.item_fit, "in item": 1.0} if found.item_fit is not None else {}
    if found.match not in (Match.EXACT, Match.NORMALIZED):
        return row
    name = "witnessed" if found.witness in (None, Witness.TEXT) else "witnessed by OCR"
    row |= {name: 1.0, f"{name} sum": compute_logit(one.score.total)}
    if found.places > 1:
        row |= {"places": math.log(found.places), "label": found.label_fit, "several": 1.0}
    if found.siblings_pt is not None:
        row |= {"distance": math.log1p(found.siblings_pt)}
    return row


@dataclass(frozen=True, eq=False)
class Calibration:
    """A fitted calibration."""

    schema_digest: str
    model: str
    engine: str
    features: tuple[str, ...]
    means: NDArray[np.float64]
    scales: NDArray[np.float64]
    weights: NDArray[np.float64]
    intercept: float
    kinds: dict[str, tuple[float, float]]
    """Slope and offset by kind of page; 1 and 0 for one that it does not have."""
    digest: str = ""
    """SHA-256 of the file."""

    def compute_scores(self, rows: Sequence[dict[str, float]]) -> NDArray[np.float64]:
        """Return z of each row of features."""
        given = np.array([[row.get(name, 0.0) for name in self.features] for row in rows]).reshape(len(rows), len(self.features))
        scores: NDArray[np.float64] = (given - self.means) / self.scales @ self.weights + self.intercept
        return scores

    def convert_scores(self, scores: NDArray[np.float64], kinds: Sequence[str]) -> NDArray[np.float64]:
        """Return the confidence at each z."""
        slopes, offsets = np.array([self.kinds.get(kind, (1.0, 0.0)) for kind in kinds]).reshape(-1, 2).T
        found: NDArray[np.float64] = 1 / (1 + np.exp(-(slopes * scores + offsets).clip(-MAX_SCORE, MAX_SCORE)))
        return found

    def rate_values(self, facts: Sequence[ValueFacts]) -> list[float]:
        """Return the confidence of each value of one record."""
        if not facts:
            return []
        rated: list[float] = self.convert_scores(self.compute_scores(list_features(facts)), [one.kind for one in facts]).tolist()
        return rated


def compute_schema_digest(columns: object) -> str:
    """Return what tells the columns of a schema (an Arrow schema) from others; descriptions do not count."""
    return hashlib.sha256(str(columns).encode()).hexdigest()[:16]


def dump_calibration(found: Calibration) -> dict[str, Any]:
    """Return a calibration as the JSON of its file."""
    return {
        "format": FORMAT,
        "schema": found.schema_digest,
        "model": found.model,
        "engine": found.engine,
        "features": list(found.features),
        **{name: [float(f"{number:.6g}") for number in getattr(found, name)] for name in ("means", "scales", "weights")},
        "intercept": found.intercept,
        "kinds": {kind: list(line) for kind, line in found.kinds.items()},
    }


def load_calibration(file: Path, schema_digest: str) -> Calibration:
    """Return the calibration in a file. Raises JobError for a file that is none, is damaged, or is of another schema."""
    try:
        text = file.read_bytes()
    except OSError as error:
        raise JobError(f"{KEY} names {file}, which cannot be read: {error.strerror}", file, KEY) from None
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise JobError(
            f"{KEY} names {file}, which is no calibration: name one that `pipeline eval --calibrate` of this version wrote", file, KEY
        )
    if content.get("schema") != schema_digest:
        raise JobError(f"{KEY} names {file}, which was fitted on records of another schema: fit one on an output of this job", file, KEY)
    try:
        return parse_calibration(content, hashlib.sha256(text).hexdigest())
    except (KeyError, TypeError, ValueError) as error:
        raise JobError(
            f"{KEY} names {file}, which is damaged ({error}): write it again by `pipeline eval --calibrate`", file, KEY
        ) from None


def parse_calibration(content: dict[str, Any], digest: str) -> Calibration:
    """Return a calibration of its JSON. Raises KeyError, TypeError or ValueError for one that does not fit together."""
    features = tuple(str(name) for name in content["features"])
    numbers = {name: np.array(content[name], float) for name in ("means", "scales", "weights")}
    kinds = {str(kind): (float(slope), float(offset)) for kind, (slope, offset) in content["kinds"].items()}
    for name, found in numbers.items():
        if found.shape != (len(features),) or not np.isfinite(found).all():
            raise ValueError(f"{name} must be {len(features)} numbers")
    if not (numbers["scales"] > 0).all():
        raise ValueError("scales must be above 0")
    if not np.isfinite([float(content["intercept"]), *(number for line in kinds.values() for number in line)]).all():
        raise ValueError("intercept and kinds must be finite numbers")
    if any(slope <= 0 for slope, _ in kinds.values()):
        raise ValueError("slopes must be above 0")
    return Calibration(
        str(content["schema"]),
        str(content["model"]),
        str(content["engine"]),
        features,
        **numbers,
        intercept=float(content["intercept"]),
        kinds=kinds,
        digest=digest,
    )
