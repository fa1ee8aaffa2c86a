"""Records as a person reviews them: rows of an output in, what the page shows of each out, the most doubtful first.

Columns that an output does not have (`_confidence`, `_evidence`, `_rules`, `_alerts`) are left out.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, TypedDict

from pipeline.evidence.match import UNWITNESSED
from pipeline.output.records import RecordTable
from pipeline.records import Status
from pipeline.schema.arrow_values import make_json_value

SIGNS = ("_confidence", "_evidence", "_rules", "_alerts")
"""Columns that say how far a value can be trusted, where there are any."""


class ReviewDocument(TypedDict):
    """One record on the page. Numbers are texts, so that no digit is lost in a browser."""

    source: str
    page: int | None
    doc_id: str | None
    pages: int
    status: str
    failure: str | None
    errors: list[str]
    disagreements: list[dict[str, Any]]
    corrected: list[str]
    least: float | None
    """Least confidence of its values, 0 to 1."""
    confidence: dict[str, float]
    """By path."""
    evidence: list[dict[str, Any]]
    """Path, match, page, box in points, words, witness, reading of the model."""
    rules: list[dict[str, Any]]
    alerts: list[str]
    values: dict[str, Any]


def list_review_documents(records: RecordTable) -> list[ReviewDocument]:
    """Return all records, those first that a look is most likely to change."""
    found = [make_review_document(row, records) for batch in records.table.to_batches(max_chunksize=1000) for row in batch.to_pylist()]
    return sorted(found, key=rank_doubt)


def make_review_document(row: dict[str, Any], records: RecordTable) -> ReviewDocument:
    """Return a record's row as the page shows it."""
    fields = records.plan.root.fields
    confidence = {one["path"]: one["confidence"] for one in row.get("_confidence") or [] if one["confidence"] is not None}
    failure = row["_failure"] if row.get("_failure") else None
    readings = {one["path"]: one["reading"] for one in row.get("_reread") or [] if one["reading"] and not one["agrees"]}
    return {
        "source": row["_source"],
        "page": row.get("_page"),
        "doc_id": row.get("_doc_id"),
        "pages": row.get("_pages") or 0,
        "status": row["_status"],
        "failure": f"{failure['stage']}/{failure['kind']}: {failure['message']}" if failure else None,
        "errors": row.get("_errors") or [],
        "disagreements": row.get("_disagreements") or [],
        "corrected": row.get("_corrected") or [],
        "least": min(confidence.values()) if confidence else None,
        "confidence": confidence,
        "evidence": [make_evidence_box(one, readings.get(one["path"])) for one in row.get("_evidence") or []],
        "rules": row.get("_rules") or [],
        "alerts": [describe_alert(one) for one in row.get("_alerts") or []],
        "values": {name: make_form_value(make_json_value(part, row[name])) for name, part in fields.items()},
    }


def make_evidence_box(row: dict[str, Any], reading: str | None = None) -> dict[str, Any]:
    """Return where a value stands, with its box in points or null, and what else the model read again of one that no witness shows."""
    corners = [row.get(name) for name in ("x0", "y0", "x1", "y1")]
    kept = {name: row.get(name) for name in ("path", "match", "page", "words", "witness")}
    return {**kept, "box": None if None in corners else corners, "reading": reading if row.get("match") in UNWITNESSED else None}


def describe_alert(alert: Any) -> str:
    """Return an alert as a sentence."""
    if isinstance(alert, dict):
        page = [f"page {alert['page']}"] if alert.get("page") else []
        return ": ".join([*page, *(str(alert[name]) for name in ("kind", "reason", "message", "path", "text") if alert.get(name))])
    return str(alert)


def make_form_value(value: Any) -> Any:
    """Return a JSON value with its numbers as texts."""
    match value:
        case dict():
            return {name: make_form_value(inner) for name, inner in value.items()}
        case list():
            return [make_form_value(inner) for inner in value]
        case bool() | None | str():
            return value
        case Decimal():
            return f"{value:f}".removesuffix(".0")
    return str(value)


def rank_doubt(found: ReviewDocument) -> tuple[float, str, int]:
    """Return what documents are sorted by: alerts, then what is invalid or breaks rules, then the least certain; failed ones are last."""
    broken = sum(rule["result"] in ("broken", "error") for rule in found["rules"])
    doubt = 2 * bool(found["alerts"]) + (found["status"] == Status.INVALID) + min(0.9, 0.3 * broken)
    doubt += 0 if found["least"] is None else 1 - found["least"]
    return (1.0 if found["status"] == Status.FAILED else -doubt), found["source"], found["page"] or 0
