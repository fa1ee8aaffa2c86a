"""Facts of a record's values: what tokens, witnesses, parts, rules and pages say of each, by which its confidence is rated."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline import schema
from pipeline.evidence.calibration import ValueFacts, decide_page_kind, find_worst_quality
from pipeline.evidence.confidence import compute_confidence
from pipeline.evidence.match import Evidence
from pipeline.output.corrections import find_column_name
from pipeline.records import LedgerRow
from pipeline.schema.arrow_values import Column
from pipeline.schema.merge import MergeResult
from pipeline.schema.rules import RuleVerdict

NUMBERS = re.compile(r"\[\d+\]")
"""The items in a path."""


def collect_facts(
    types: Mapping[str, str],
    merged: MergeResult,
    evidence: Sequence[Evidence],
    verdicts: Sequence[RuleVerdict],
    requests: Sequence[LedgerRow],
    corrected: Container[str],
) -> list[ValueFacts]:
    """Return what is known of each scalar of a record whose tokens are known; `types` are those of `classify_fields`.

    The columns that a person has corrected are left out: their tokens would be those of another value.
    """
    pages = [page for request in requests for page in request.get("pages") or []]
    kind, quality = decide_page_kind(pages), find_worst_quality(pages)
    witnessed = {found.path: found for found in evidence}
    disputed = {disagreement.path for disagreement in merged.disagreements}
    found = []
    for path, value in list_scalar_values(merged.value):
        if (score := merged.find_score(path)) and not (corrected and find_column_name(path) in corrected):
            field = NUMBERS.sub("", path).removeprefix("$").removeprefix(".")
            holds = {one.rule: one.holds for one in verdicts if one.concerns(path, field)}
            about = (types.get(field, "text"), score, witnessed.get(path), path in disputed, holds, kind, quality)
            found.append(ValueFacts(path, field, value, *about))
    return found


def rate_raw(facts: Sequence[ValueFacts]) -> list[float]:
    """Return the raw confidence of values."""
    return [compute_confidence(one.score.total, one.evidence, one.is_disputed) for one in facts]


def classify_fields(part: Column, field: str = "") -> dict[str, str]:
    """Return the type of each scalar field of a schema, `text`, `number`, `date` or `choice`, by its dotted name without items."""
    found = dict[str, str]()
    for name, inner in part.fields.items():
        found |= classify_fields(inner, f"{field}.{name}".strip("."))
    if part.convert:
        kinds = {
            "choice": (pa.types.is_boolean, pa.types.is_dictionary),
            "number": (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal),
            "date": (pa.types.is_date, pa.types.is_timestamp),
        }
        found[field] = next((kind for kind, tests in kinds.items() if any(test(part.type) for test in tests)), "text")
    return found


def list_scalar_values(value: Any, path: str = "$") -> Iterator[tuple[str, Any]]:
    """Yield the paths and values of the scalars in a JSON value, nulls included."""
    if isinstance(value, dict | list):
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from list_scalar_values(inner, schema.join_path(path, step))
    else:
        yield path, value
