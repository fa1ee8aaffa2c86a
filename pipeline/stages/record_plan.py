"""Record plan: what columns the records of a job have, and what settling needs to fill them, decided once."""

from __future__ import annotations

from copy import copy
from typing import Any, TypedDict

import pyarrow as pa

from pipeline.errors import JobError
from pipeline.evidence.alerts import AlertRow
from pipeline.evidence.calibration import KEY, Calibration, compute_schema_digest, load_calibration
from pipeline.evidence.confidence import ConfidenceRow
from pipeline.evidence.match import EvidenceRow
from pipeline.evidence.readings import ReadingRow
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.corrections import Correction, compute_corrections_digest, read_corrections
from pipeline.output.ledger import (
    ALERT_TYPE,
    CONFIDENCE_TYPE,
    DISAGREEMENT_TYPE,
    EVIDENCE_TYPE,
    FAILURE_TYPE,
    PAGE_FAILURES_TYPE,
    PLACED_VALUE_TYPE,
)
from pipeline.records import FailureRow, PageFailureRow
from pipeline.schema.arrow import ArrowPlan
from pipeline.schema.rules import RULE_TYPE, RuleRow, RuleSet, check_rules
from pipeline.schema.validate import Validator
from pipeline.stages.re_ask import RecordJudge

ASKED_AGAIN_TYPE = pa.struct([("rule", pa.string()), ("fields", pa.list_(pa.string())), ("taken", pa.bool_())])
READING_TYPE = pa.struct([*PLACED_VALUE_TYPE, ("reading", pa.string()), ("agrees", pa.bool_())])
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
        "Where two requests of one document read different values: the one kept, which is the one with the likeliest tokens, the other, "
        "their pages.",
    ),
    "_rules": (
        pa.list_(RULE_TYPE),
        "What each rule says of the record: name, result (`passed`, `broken`, `unknown`, `error`), and where it is broken or an error, "
        "message and fields. Empty where the record failed.",
    ),
    "_asked_again": (
        pa.list_(ASKED_AGAIN_TYPE),
        "The rules with `re_ask: true` that the first answer broke: name, the fields that were asked again, and whether the second answer "
        "was taken, because the rules hold with it.",
    ),
    "_reread": (
        pa.list_(READING_TYPE),
        "With `evidence.model`, what the model read again of each value that it was asked about ([below](#reading-again)): path, value, "
        "the place that it named, what it reads there, and whether that agrees.",
    ),
    "_corrected": (pa.list_(pa.string()), "The paths of the values that a person has put right (`pipeline settle --corrections`)."),
    "_partial": (pa.bool_(), "Whether pages of this document are missing in it, because they could not be drawn."),
    "_page_failures": (PAGE_FAILURES_TYPE, "The pages that could not be drawn: page, kind, message."),
    "_evidence": (
        pa.list_(EVIDENCE_TYPE),
        "How each value is witnessed by the text layer or by OCR ([below](#evidence)); null where there are no words to look in.",
    ),
    "_unwitnessed": (
        pa.int32(),
        "How many values no witness shows: `absent`, `hidden`, or only `similar`; null where there are no words to look in.",
    ),
    "_confidence": (
        pa.list_(CONFIDENCE_TYPE),
        "How sure each value is, from 0 to 1 ([below](#confidence)): raw, or calibrated with `extract.calibration`; null where the engine "
        "gave no log-probabilities.",
    ),
    "_least_confidence": (pa.float32(), "The least of these."),
    "_alerts": (
        pa.list_(ALERT_TYPE),
        "Text that a reader cannot see, or that differs from what is drawn ([below](#alerts)); null where there are no words to look in.",
    ),
    "_answer": (pa.string(), "The merged answer as JSON, where it is invalid."),
    "_pages": (pa.int32(), "Pages of the document."),
    "_page_kind": (
        pa.string(),
        "`digital` where every page has a text layer that is drawn; else `photo` where light falls unevenly on a page, or `scan`.",
    ),
    "_requests": (pa.int32(), "Requests it took."),
    "_renderer": (
        pa.string(),
        "`pdfium` or `tifffile` where one of the pages was drawn by this second renderer, because the first, MuPDF or Pillow, could not.",
    ),
    "_visual_tokens": (pa.int64(), "Visual tokens of these pages."),
    "_prompt_tokens": (pa.int64(), "Tokens read by the model, visual ones and re-asks included."),
    "_completion_tokens": (pa.int64(), "Tokens written by the model."),
    "_model": (pa.string(), "The checkpoint that answered."),
    "_engine": (pa.string(), "The engine that ran it."),
}
"""Every record's columns after the schema's own and the manifest's, each with its meaning."""


class DisagreementRow(TypedDict):
    """A `Disagreement` as a record holds it, its values as JSON."""

    path: str
    kept: str
    kept_page: int
    other: str
    other_page: int


class AskedAgainRow(TypedDict):
    """A rule that the first answer broke, and what became of the second one for its fields."""

    rule: str
    fields: list[str]
    taken: bool


class ProvenanceRow(TypedDict, total=False):
    """A record's columns that are not the schema's or the manifest's. Its fields are those of `PROVENANCE_COLUMNS`."""

    _source: str
    _doc_id: str | None
    _page: int | None
    _status: str
    _failure: FailureRow | None
    _errors: list[str]
    _disagreements: list[DisagreementRow]
    _rules: list[RuleRow]
    _asked_again: list[AskedAgainRow]
    _reread: list[ReadingRow]
    _corrected: list[str]
    _partial: bool
    _page_failures: list[PageFailureRow]
    _evidence: list[EvidenceRow] | None
    _unwitnessed: int | None
    _confidence: list[ConfidenceRow] | None
    _least_confidence: float | None
    _alerts: list[AlertRow] | None
    _answer: str | None
    _pages: int | None
    _page_kind: str | None
    _requests: int
    _renderer: str | None
    _visual_tokens: int
    _prompt_tokens: int
    _completion_tokens: int
    _model: str | None
    _engine: str | None


class RecordPlan:
    """The columns of a job's records, decided once: the schema's, the manifest's, and the provenance."""

    def __init__(self, job: Job) -> None:
        """Plan the records of a job whose sources have no manifest with columns of its own. Raises JobError for a wrong rule."""
        self.job_schema, self.per_page = job.schema, job.sections.extract.per == "page"
        self.columns, self.validator = ArrowPlan(job.schema), Validator(job.schema)
        self.rules = RuleSet(job.rules, self.columns.root)
        check_rules(self.rules)
        self.judge = RecordJudge(self.columns, self.validator, self.rules)
        self.calibration = load_job_calibration(job, self.columns)
        self.provenance = [(name, kind) for name, (kind, _) in PROVENANCE_COLUMNS.items() if name != "_page" or self.per_page]
        self.refuses_disagreements = job.sections.limits.disagreements == "invalid"
        self.uses_text, self.uses_ocr = job.sections.evidence.text == "on", job.sections.evidence.ocr != "off"
        self.uses_model = job.sections.evidence.model == "on"
        self.refuses_partial = job.sections.limits.partial == "fail"
        self.extras: list[str] = []
        self.output, self.corrections = job.output, dict[Any, Correction]()
        self.schema = pa.schema([*self.columns.schema, *self.provenance])

    def with_extras(self, extras: pa.Schema) -> RecordPlan:
        """Return the plan with a manifest's own columns and the output's corrections.

        Raises JobError when a column has the name of another one, or the corrections cannot be read.
        """
        own = {*self.columns.schema.names, *PROVENANCE_COLUMNS}
        if clashes := [name for name in extras.names if name in own]:
            raise JobError(f"the manifest's column {clashes[0]!r} has the name of a column of the records: rename it")
        plan = copy(self)
        plan.extras, plan.schema = extras.names, pa.schema([*self.columns.schema, *extras, *self.provenance])
        plan.corrections = dict(read_corrections(Output(self.output)))
        if plan.corrections:  # in the schema, which is part of what decides whether records are settled again
            plan.schema = plan.schema.with_metadata({"corrections": compute_corrections_digest(plan.corrections)})
        return plan


class RecordColumns(TypedDict):
    """What `check` shows of a job's records."""

    columns: dict[str, str]
    """The Arrow type of each column, by its name."""
    notes: list[str]
    """What was decided about columns that hold JSON text or were narrowed."""


def list_record_columns(job: Job) -> RecordColumns:
    """Return the columns of a job's records, the manifest's left out."""
    plan = RecordPlan(job)
    return {"columns": {field.name: str(field.type) for field in plan.schema}, "notes": list(plan.columns.notes)}


def load_job_calibration(job: Job, columns: ArrowPlan) -> Calibration | None:
    """Return the calibration that a job names, or None. Raises JobError for a file that is none, or is of another schema."""
    name = job.sections.extract.calibration
    return load_calibration(job.resolve_local_path(name), compute_schema_digest(columns.schema)) if name else None


def check_calibrated_model(calibration: Calibration | None, job: Job) -> None:
    """Raise JobError where a calibration was fitted on answers of another model or engine than a resolved job's."""
    model = job.sections.model
    if calibration and (calibration.model, calibration.engine) != (model.name, model.engine):
        raise JobError(
            f"{job.file}: {KEY} was fitted on answers of {calibration.model} by {calibration.engine}, and this job's are of {model.name} "
            f"by {model.engine}: fit one on an output of this job (`pipeline eval --calibrate`)",
            job.file,
            KEY,
        )
