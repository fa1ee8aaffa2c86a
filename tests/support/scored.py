"""Output folders made from given values: records by the schema's plan, and a ledger whose tokens have given log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.output import Output
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.shards import write_shard
from pipeline.schema import check_schema, parse_json
from pipeline.schema.arrow import ArrowPlan
from pipeline.schema.certainty import find_values

TEXT, AMOUNT = {"type": ["string", "null"]}, {"type": ["number", "null"], "multipleOf": 0.01}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "day": {"type": ["string", "null"], "format": "date"},
        "total": AMOUNT,
        "items": {
            "type": "array",
            "items": {"type": "object", "properties": {"what": TEXT, "price": AMOUNT}, "additionalProperties": False},
        },
    },
    "additionalProperties": False,
}
Values = Mapping[str, Any]


def make_plan(found: Mapping[str, Any] = SCHEMA) -> ArrowPlan:
    return ArrowPlan(check_schema(parse_json(json.dumps(found))))


def write_output(
    folder: Path,
    documents: Mapping[str, Values | None],
    certainty: Mapping[str, Mapping[str, float]] | None = None,
    tiers: Mapping[str, str] | None = None,
    schema: Mapping[str, Any] = SCHEMA,
) -> Path:
    """Write the output of a run: one record for each source, `failed` where it has no values, and return its folder.

    `certainty` has the log-probability of each value's tokens by source and path, 0 where it says nothing; without it no tokens are kept.
    """
    output, plan = Output(folder), make_plan(schema)
    output.create()
    output.write_job({"job": {"name": "scored"}, "fingerprint": "f", "asked": {"extract": {"schema": schema, "per": "document"}}})
    records, ledger = [], []
    for source, values in documents.items():
        columns, misfits = plan.build_row(parse(values or {}))
        assert not misfits, misfits
        status = "failed" if values is None else "extracted"
        records.append({**columns, "tier": (tiers or {}).get(source), "_source": source, "_doc_id": source, "_status": status})
        answer = json.dumps(values)
        tokens = make_tokens(answer, certainty.get(source, {})) if certainty is not None else None
        whole = {"key": source, "attempt": 1, "source": source, "doc_id": source, "first_page": 1, "last_page": 1, "page_count": 1}
        ledger.append({**whole, "status": status, "answer": None if values is None else answer, "tokens": tokens})
    about = [(name, pa.string()) for name in ("tier", "_source", "_doc_id", "_status")]
    write_shard(output.records, pa.Table.from_pylist(records, pa.schema([*plan.schema, *about])), list(documents))
    write_shard(output.requests, pa.Table.from_pylist(ledger, LEDGER_SCHEMA), list(documents))
    return folder


def write_truth(file: Path, documents: Mapping[str, Values]) -> Path:
    """Write values as JSON lines and return the file."""
    file.write_text("".join(json.dumps({"source": source, **values}) + "\n" for source, values in documents.items()))
    return file


def make_tokens(answer: str, certainty: Mapping[str, float]) -> Sequence[dict[str, Any]]:
    """Return an answer in tokens: each value is one, and so is the text between two."""
    tokens, at = [], 0
    for path, start, end in find_values(answer):
        tokens += [{"text": answer[at:start], "logprob": 0.0}, {"text": answer[start:end], "logprob": certainty.get(path, 0.0)}]
        at = end
    return [*tokens, {"text": answer[at:], "logprob": 0.0}]


def parse(values: Values) -> Any:
    return parse_json(json.dumps(values))
