"""A document's rows of the ledger -> its typed record rows. Needs no model; the same ledger always gives the same rows.

For each document that was listed there is one row, or one for each of its pages, whatever became of it:

    extracted   every request was answered, and the merged record satisfies the schema: all columns filled
    invalid     answered, but the record breaks the schema or its columns: filled as far as they can hold it, `_errors` says why
    failed      not read, not drawn, not answered or not asked yet: `_failure` says where and why, the schema's columns are null

Knows neither Ray nor Parquet files, and no time: a record holds nothing that differs between two runs over the same answers.
(MuPDF's warnings about a page, which depend on the pages drawn before it, stay in the ledger with the times.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa

from pipeline import schema
from pipeline.errors import JobError
from pipeline.job import Job
from pipeline.output.ledger import FAILURE_TYPE, select_newest_attempt
from pipeline.records import Status
from pipeline.schema.arrow import ArrowPlan
from pipeline.schema.merge import MergeResult, Part, merge_parts
from pipeline.schema.validate import Validator
from pipeline.stages.requests import Row, compute_document_keys

DISAGREEMENT_TYPE = pa.struct(
    [("path", pa.string()), ("kept", pa.string()), ("kept_page", pa.int32()), ("other", pa.string()), ("other_page", pa.int32())]
)
PROVENANCE_COLUMNS = {
    "_source": (pa.string(), "The file, as listed."),
    "_doc_id": (pa.string(), "sha256 of its bytes; null if it could not be read."),
    "_page": (
        pa.int32(),
        "The page of this row, from 1; only where the job says `per: page`, and null for a document that was not opened.",
    ),
    "_status": (pa.string(), "`extracted`, `invalid` or `failed`."),
    "_failure": (FAILURE_TYPE, "Why there is no valid record: stage, kind, message."),
    "_errors": (pa.list_(pa.string()), "What breaks the schema, each with its path."),
    "_disagreements": (
        pa.list_(DISAGREEMENT_TYPE),
        "Where two requests of one document read different values: the one kept, the other, their pages.",
    ),
    "_answer": (pa.string(), "The merged answer as JSON, where it is invalid."),
    "_pages": (pa.int32(), "Pages of the document."),
    "_requests": (pa.int32(), "Requests it took."),
    "_visual_tokens": (pa.int64(), "Visual tokens of these pages."),
    "_prompt_tokens": (pa.int64(), "Tokens read by the model, visual ones and re-asks included."),
    "_completion_tokens": (pa.int64(), "Tokens written by the model."),
    "_model": (pa.string(), "The checkpoint that answered."),
    "_engine": (pa.string(), "The engine that ran it."),
}
"""Every record's columns after the schema's own, each with its meaning."""
PENDING_ROW: Row = {
    "status": str(Status.FAILED),
    "attempt": 0,
    "failure": {"stage": "settle", "kind": "pending", "message": "not asked yet: run the job again"},
}
"""What stands for a request that is not in the ledger."""


class SettleStage:
    """Settles documents of one job."""

    def __init__(self, job: Job, extras: pa.Schema, fingerprint: str | None = None) -> None:
        """Take the manifest's own columns as `extras`, and the fingerprint under which the ledger was asked.

        Raises JobError when one of them has the name of another column.
        """
        self.per_page = job.sections.extract.per == "page"
        self.per_request, self.fingerprint = job.pages_per_request, fingerprint or job.fingerprint
        self.given, self.extras = job.schema, extras.names
        self.plan, self.validator = ArrowPlan(job.schema), Validator(job.schema)
        own = [*self.plan.schema.names, *PROVENANCE_COLUMNS]
        if twice := [name for name in extras.names if name in own]:
            raise JobError(f"the manifest's column {twice[0]!r} has the name of a column of the records: rename it")
        about = [(name, kind) for name, (kind, _) in PROVENANCE_COLUMNS.items() if name != "_page" or self.per_page]
        self.schema = pa.schema([*self.plan.schema, *extras, *about])

    def table(self, documents: Iterable[Row], requests: Iterable[Row]) -> pa.Table:
        """Return the record rows of these documents, sorted by source and page."""
        ledger: dict[str, list[Row]] = {}
        for request in requests:
            ledger.setdefault(request["key"], []).append(request)
        rows = [row for document in documents for row in self.rows(document, ledger)]
        rows.sort(key=lambda row: (row["_source"], row["_page"] or 0))
        return pa.Table.from_pylist(rows, self.schema)

    def rows(self, document: Row, ledger: dict[str, list[Row]]) -> Iterator[Row]:
        """Yield a document's rows."""
        keys = compute_document_keys(document, self.per_request, self.fingerprint)
        asked = [
            {**select_newest_attempt(ledger.get(key, [PENDING_ROW])), "first_page": pages[0], "last_page": pages[1]}
            for key, pages in keys.items()
        ]
        about = {"_source": document["source"], "_doc_id": document["doc_id"], "_pages": document["page_count"] or None}
        about |= {name: document[name] for name in self.extras}
        if self.per_page and document["page_count"]:
            for request in asked:
                yield {**about, "_page": request["first_page"], **self.record([request])}
        else:
            yield {**about, "_page": None, **self.record(asked)}

    def record(self, asked: list[Row]) -> Row:
        """Return the columns that come from a record's requests, in page order."""
        row = sum_provenance(asked)
        failures = [request for request in asked if request["status"] == Status.FAILED]
        if failures:
            return row | {"_status": str(Status.FAILED), "_failure": failures[0]["failure"]}
        try:
            parts = [Part(request["first_page"], request["last_page"], schema.parse_json(request["answer"])) for request in asked]
        except ValueError:
            wrong = next(request for request in asked if request["errors"])
            return row | make_invalid_columns(wrong["errors"]) | {"_answer": wrong["answer"]}
        merged = merge_parts(self.given, parts)
        errors = [str(violation) for violation in self.validator.find_violations(merged.value)]
        try:
            row |= self.plan.build_row(merged.value)
        except ValueError as error:
            errors = errors or [str(error)]
        row |= {"_disagreements": list_disagreements(merged), "_status": str(Status.EXTRACTED)}
        return row | make_invalid_columns(errors) | {"_answer": schema.dump_json(merged.value)} if errors else row


def list_record_columns(job: Job) -> Row:
    """Return the names and types of a job's record columns, and what was decided about some of them."""
    stage = SettleStage(job, pa.schema([]))
    return {"columns": {field.name: str(field.type) for field in stage.schema}, "notes": stage.plan.notes}


def make_invalid_columns(errors: list[str]) -> Row:
    return {
        "_status": str(Status.INVALID),
        "_failure": {"stage": "validate", "kind": "invalid", "message": errors[0]},
        "_errors": errors,
    }


def sum_provenance(asked: list[Row]) -> Row:
    """Return what a record's requests cost and who answered them."""
    pages = [page for request in asked for page in request.get("pages") or []]

    def total(name: str) -> int:
        return sum(request.get(name) or 0 for request in asked)

    return {
        "_requests": sum(1 for request in asked if request.get("asks")),
        "_visual_tokens": sum(page["visual_tokens"] for page in pages),
        "_prompt_tokens": total("prompt_tokens"),
        "_completion_tokens": total("completion_tokens"),
        "_errors": [],
        "_disagreements": [],
        "_model": asked[0].get("model"),
        "_engine": asked[0].get("engine"),
    }


def list_disagreements(merged: MergeResult) -> list[Row]:
    return [
        {
            "path": d.path,
            "kept": schema.dump_json(d.kept),
            "kept_page": d.kept_page,
            "other": schema.dump_json(d.other),
            "other_page": d.other_page,
        }
        for d in merged.disagreements
    ]
