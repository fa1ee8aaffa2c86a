"""Settle stage: a document's rows of the ledger -> its typed record rows. The same ledger always gives the same rows, without a model.

For each document that was listed there is one row, or one for each of its pages, whatever became of it:

    extracted   every request was answered, and the merged record satisfies the schema: all columns filled; `_partial` if pages could
                not be drawn and the others were asked without them
    invalid     answered, but a value breaks the schema, or no column holds it: this cell is null or as it was read, all others are
                filled, `_errors` says why
    failed      not read, not drawn, not answered or not asked yet: `_failure` says where and why, the schema's columns are null

A record holds no time and nothing else that differs between two runs over the same answers. (MuPDF's warnings about a page depend on
the pages drawn before it: they stay in the ledger.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import pyarrow as pa

from pipeline import schema
from pipeline.evidence.alerts import list_alerts
from pipeline.evidence.calibration import ValueFacts, decide_page_kind
from pipeline.evidence.layers import order_witnesses
from pipeline.evidence.match import UNWITNESSED, Evidence, make_evidence_row, match_values
from pipeline.evidence.readings import Reading, confirm_values
from pipeline.evidence.text_layer import PageWords, unpack_words
from pipeline.output.corrections import Correction
from pipeline.output.ledger import select_newest_attempt
from pipeline.output.words import DocumentWords
from pipeline.records import REREAD, FailureRow, LedgerRow, PageFailureRow, SourceRow, Stage, Status
from pipeline.schema.certainty import TokenScore, score_tokens
from pipeline.schema.merge import MergeResult, Part, merge_parts
from pipeline.stages.re_ask import find_fields, is_inside
from pipeline.stages.record_plan import AskedAgainRow, DisagreementRow, ProvenanceRow, RecordPlan
from pipeline.stages.requests import compute_document_keys, compute_request_key, make_failed_row
from pipeline.stages.reread import collect_readings
from pipeline.stages.value_facts import classify_fields, collect_facts, list_scalar_values, rate_raw


class ScoredRow(LedgerRow, total=False):
    """A request with the scores of its values in place of its tokens, of which a document has thousands, and with what OCR has read."""

    scores: dict[str, TokenScore]
    seconds: list[LedgerRow]
    """The requests that asked again for the fields of rules that this one's answer broke, and for values that no witness shows."""
    readings: dict[str, Reading]
    """What the model read again of its values, by their paths in its answer."""
    asked_again: list[AskedAgainRow]
    ocr: DocumentWords
    """Of the document."""


PENDING_ROW: ScoredRow = {
    "status": str(Status.FAILED),
    "attempt": 0,
    "failure": {"stage": "settle", "kind": "pending", "message": "not asked yet: run the job again"},
}
"""Stands for a request that is not in the ledger."""


class SettleStage:
    """Settles documents of one job."""

    def __init__(self, plan: RecordPlan, per_request: int, fingerprint: str) -> None:
        """`per_request` and `fingerprint` are those under which the ledger was asked."""
        self.plan, self.per_request, self.fingerprint = plan, per_request, fingerprint
        self.types = classify_fields(plan.columns.root)
        self.rate: Callable[[Sequence[ValueFacts]], list[float]] = plan.calibration.rate_values if plan.calibration else rate_raw
        """Facts of the values of one record -> the confidence of each. The raw one looks at no rules, which are not judged for it."""

    def build_table(
        self, documents: Iterable[SourceRow], requests: Iterable[LedgerRow], words: Mapping[str, DocumentWords] | None = None
    ) -> pa.Table:
        """Return the record rows of these documents, sorted by source and page; `words` is what OCR has read in them."""
        rows = list(self.settle_documents(documents, requests, words or {}))
        rows.sort(key=lambda row: (row["_source"], row["_page"] or 0))
        try:
            return pa.Table.from_pylist(rows, self.plan.schema)
        except Exception:  # any: Arrow raises several classes; the rows that it does not take are found one by one
            return pa.concat_tables([pa.Table.from_pylist([self.make_writable(row)], self.plan.schema) for row in rows])

    def make_writable(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a record row, as a failure without the schema's columns if Arrow does not take it."""
        try:
            pa.Table.from_pylist([row], self.plan.schema)
        except Exception as error:  # any, as in `build_table`
            kept = {name: row[name] for name in ("_source", "_doc_id", "_page", "_pages", *self.plan.extras)}
            return {**kept, "_status": str(Status.FAILED), "_failure": make_failed_row(Stage.VALIDATE, error)["failure"]}
        return row

    def settle_documents(
        self, documents: Iterable[SourceRow], requests: Iterable[LedgerRow], words: Mapping[str, DocumentWords]
    ) -> Iterator[dict[str, Any]]:
        """Yield the records of these documents."""
        ledger: dict[str, list[ScoredRow]] = {}
        for request in requests:
            key = str(request["key"])
            if request.get("rule"):
                pages = (request["first_page"], request["last_page"])
                key = f"rules of {compute_request_key(str(request['doc_id']), *pages, self.fingerprint)}"
            ledger.setdefault(key, []).append(score_request(request))
        for document in documents:
            yield from self.settle_document(document, ledger, words.get(document["doc_id"] or "", {}))

    def settle_document(self, document: SourceRow, ledger: dict[str, list[ScoredRow]], ocr: DocumentWords) -> Iterator[dict[str, Any]]:
        """Yield a document's records; their columns are those of the plan's schema."""
        requests: list[ScoredRow] = []
        for key, (first_page, last_page) in compute_document_keys(document, self.per_request, self.fingerprint).items():
            newest = cast(ScoredRow, select_newest_attempt(ledger.get(key, [PENDING_ROW])))
            seconds = {row["key"]: row for row in ledger.get(f"rules of {key}", []) if row["attempt"] == newest["attempt"]}
            request: ScoredRow = {**newest, "first_page": first_page, "last_page": last_page, "ocr": ocr, "seconds": [*seconds.values()]}
            request["readings"] = collect_readings(request["seconds"]) if self.plan.uses_model else {}
            requests.append(self.take_second_answers(request))
        page_count = document["page_count"] or None
        about: ProvenanceRow = {"_source": document["source"], "_doc_id": document["doc_id"], "_pages": page_count}
        extras = {name: cast(dict[str, Any], document)[name] for name in self.plan.extras}
        if self.plan.per_page and page_count:
            for request in requests:
                page = request["first_page"]
                yield {**extras, **about, "_page": page, **self.build_record([request], self.find_correction(document, page))}
        else:
            yield {**extras, **about, "_page": None, **self.build_record(requests, self.find_correction(document, None))}

    def take_second_answers(self, request: ScoredRow) -> ScoredRow:
        """Return a request whose answer has the fields that were asked again, where the rules hold with them, as asking decided it."""
        by_rule = {row["rule"]: cast(ScoredRow, row) for row in request["seconds"] if row["rule"] != REREAD}
        if not by_rule or request["status"] != Status.EXTRACTED:
            return request
        value, scores, about = schema.parse_json(request["answer"] or ""), request["scores"], list[AskedAgainRow]()
        for rule in self.plan.rules.programs:
            if (second := by_rule.get(rule.rule.name)) is None:
                continue
            taken = self.plan.judge.take_fields(value, second, rule) if self.plan.judge.breaks(value, rule) else None
            about.append({"rule": rule.rule.name, "fields": [".".join(path) for path in rule.paths], "taken": taken is not None})
            if taken is not None:
                places = {*find_fields(taken, rule.paths, in_lists=False)}
                kept = {path: score for path, score in scores.items() if not is_inside(path, places)}
                scores = kept | {path: score for path, score in second["scores"].items() if is_inside(path, places)}
                value = taken
        answer = schema.dump_json(value) if any(row["taken"] for row in about) else request["answer"]
        changed: dict[str, Any] = {"answer": answer, "scores": scores, "asked_again": about}
        return cast(ScoredRow, {**request, **changed})

    def find_correction(self, document: SourceRow, page: int | None) -> Correction | None:
        """Return what a person has put right in a record, if it was of the document's present bytes."""
        found = self.plan.corrections.get((document["source"], page))
        return found if found and found.doc_id in (None, document["doc_id"]) else None

    def build_record(self, requests: Sequence[ScoredRow], correction: Correction | None = None) -> dict[str, Any]:
        """Return the columns that come from a record's requests, which are in page order, and from a correction.

        A corrected record is valid or invalid as it is then, also where requests have failed.
        """
        about = sum_provenance(requests)
        words = self.collect_words(requests)
        if words:
            about["_alerts"] = list_alerts(words, [])
        asked = [request for request in requests if request["status"] != Status.FAILED]
        failed = [request for request in requests if request["status"] == Status.FAILED]
        is_partial = bool(about["_page_failures"] and asked) and all(is_undrawn(request) for request in failed)
        if is_partial and self.plan.refuses_partial and not correction:
            return {**about, "_status": str(Status.FAILED), "_failure": describe_page_failure(about["_page_failures"][0])}
        if failed and not is_partial and not correction:
            return {**about, "_status": str(Status.FAILED), "_failure": failed[0]["failure"]}
        about["_partial"] = is_partial and not self.plan.refuses_partial
        try:
            return {**about, **self.merge_requests(asked, words, correction)}
        except Exception as error:  # any: what an answer makes the parser, the merge or a column raise has no common class
            return {**about, "_status": str(Status.FAILED), "_failure": make_failed_row(Stage.VALIDATE, error)["failure"]}

    def collect_words(self, requests: Sequence[ScoredRow]) -> list[PageWords]:
        """Return the words of the pages of a record's requests, of the text layer and by OCR, as far as the job uses them."""
        found = []
        for request in requests:
            for page in request.get("pages") or []:
                number, layer = page["page_no"], page.get("text_layer") if self.plan.uses_text else None
                read = request["ocr"].get(number) if self.plan.uses_ocr else None
                by_ocr = read["words"] if read else None
                found += order_witnesses(
                    unpack_words(number, layer) if layer else None,
                    replace(unpack_words(number, by_ocr), is_ocr=True) if by_ocr else None,
                    read["layer"] if read else None,
                )
        return found

    def merge_requests(self, requests: Sequence[ScoredRow], words: Sequence[PageWords], correction: Correction | None) -> dict[str, Any]:
        """Return the columns that come from the answers to a record's requests, a correction, and the words of its pages."""
        try:
            parts = list(list_parts(requests)) if correction else [make_part(request) for request in requests]
        except ValueError:
            wrong = next(request for request in requests if request["errors"])
            errors = wrong["errors"] or []
            return {**make_invalid_columns("invalid", errors[0], errors, wrong["answer"])}
        merged = merge_parts(self.plan.job_schema, parts)
        value = correction.correct_value(merged.value) if correction else merged.value
        columns, misfits = self.plan.columns.build_row(value)
        about: ProvenanceRow = {"_disagreements": list_disagreements(merged), "_status": str(Status.EXTRACTED)}
        if errors := [*map(str, self.plan.validator.find_violations(value)), *misfits]:
            about |= make_invalid_columns("invalid", errors[0], errors, schema.dump_json(value))
        elif merged.disagreements and self.plan.refuses_disagreements and not correction:
            about |= make_invalid_columns("disagreement", describe_disagreement(merged), [], schema.dump_json(value))
        readings, evidence = find_readings(value, merged, requests), list[Evidence]()
        if readings:
            evidence, about["_reread"] = confirm_values(self.plan.job_schema, value, words, readings)
        elif words:
            evidence = match_values(self.plan.job_schema, value, words)
        about["_rules"] = self.plan.rules.judge_record(columns)
        verdicts = [] if self.rate is rate_raw else self.plan.rules.list_verdicts(about["_rules"], columns)
        facts = collect_facts(self.types, merged, evidence, verdicts, requests, correction.values if correction else ())
        if facts:
            rated = list(map(float, self.rate(facts)))
            about["_confidence"] = [{"path": one.path, "confidence": rating} for one, rating in zip(facts, rated, strict=True)]
            about["_least_confidence"] = min(rated)
        about |= make_evidence_columns(words, evidence) if words or readings else {}
        about["_corrected"] = list(correction.paths) if correction else []
        return {**columns, **about}


def score_request(request: LedgerRow) -> ScoredRow:
    """Return a request with the scores of its values, without its tokens; without scores where its answer is not JSON."""
    tokens, answer, scores = request.get("tokens") or [], request.get("answer") or "", dict[str, TokenScore]()
    if tokens:
        with suppress(ValueError):
            schema.parse_json(answer)
            scores = score_tokens(answer, tokens)
    return cast(ScoredRow, {**request, "tokens": None, "scores": scores, "ocr": {}})


def make_part(request: ScoredRow) -> Part:
    """Return a request's answer as a part of its document. Raises ValueError for an answer that is not JSON."""
    return Part(request["first_page"], request["last_page"], schema.parse_json(request["answer"] or ""), request.get("scores") or {})


def find_readings(value: Any, merged: MergeResult, requests: Sequence[ScoredRow]) -> dict[str, Reading]:
    """Return what the model read again of the values of a record, by their paths there."""
    by_page, found = {request["first_page"]: request.get("readings") or {} for request in requests}, dict[str, Reading]()
    if any(by_page.values()):
        for path, _ in list_scalar_values(value):
            origin = merged.find_origin(path)
            if origin and (reading := by_page.get(origin[0].first_page, {}).get(origin[1])):
                found[path] = reading
    return found


def make_evidence_columns(words: Sequence[PageWords], evidence: Sequence[Evidence]) -> ProvenanceRow:
    """Return the columns that say how the values of a record are witnessed by these words, and which the model read again."""
    return {
        "_evidence": [make_evidence_row(found) for found in evidence],
        "_unwitnessed": sum(found.match in UNWITNESSED for found in evidence),
        "_alerts": list_alerts(words, evidence) if words else None,
    }


def list_parts(requests: Sequence[ScoredRow]) -> Iterator[Part]:
    """Yield the parts of a document that were answered by JSON; an empty one if there are none."""
    found = []
    for request in requests:
        with suppress(ValueError):
            found.append(make_part(request))
    yield from found or [Part(1, 1, {})]


def is_undrawn(request: LedgerRow) -> bool:
    """Say whether a request failed because none of its pages could be drawn, in a document that was opened."""
    failure = request.get("failure")
    return failure is not None and failure["stage"] == Stage.RENDER and request["first_page"] > 0


def list_page_failures(request: LedgerRow) -> list[PageFailureRow]:
    """Return the pages of a request that could not be drawn. A ledger of 0.1.0 says so of the request as a whole."""
    failure = request.get("failure")
    if request.get("page_failures") or failure is None or not is_undrawn(request):
        return request.get("page_failures") or []
    pages = range(request["first_page"], request["last_page"] + 1)
    return [PageFailureRow(page=page, kind=failure["kind"], message=failure["message"]) for page in pages]


def describe_page_failure(failure: PageFailureRow) -> FailureRow:
    """Return the failure of a record that must not lack a page."""
    return {"stage": str(Stage.RENDER), "kind": failure["kind"], "message": f"page {failure['page']}: {failure['message']}"}


def describe_disagreement(merged: MergeResult) -> str:
    """Return the first disagreement as a sentence."""
    first, count = merged.disagreements[0], len(merged.disagreements)
    kept, other = schema.format_value(first.kept), schema.format_value(first.other)
    more = f"; {count - 1} more in _disagreements" if count > 1 else ""
    return f"{first.path} is {kept} from page {first.kept_page} on and {other} from page {first.other_page} on{more}"


def make_invalid_columns(kind: str, message: str, errors: list[str], answer: str | None) -> ProvenanceRow:
    """Return the columns of a record that breaks the schema, or whose parts disagree."""
    failure: FailureRow = {"stage": "validate", "kind": kind, "message": message}
    return {"_status": str(Status.INVALID), "_failure": failure, "_errors": errors, "_answer": answer}


def sum_provenance(requests: Sequence[ScoredRow]) -> ProvenanceRow:
    """Return what a record's requests cost, which engine and model answered them, and what drew their pages."""
    everything = [*requests, *(second for request in requests for second in request.get("seconds") or [])]
    pages = [page for request in requests for page in request.get("pages") or []]
    return {
        "_requests": sum(1 for request in everything if request.get("asks")),
        "_renderer": next((page["renderer"] for page in pages if page.get("renderer")), None),
        "_visual_tokens": sum(page["visual_tokens"] for page in pages),
        "_prompt_tokens": sum(request.get("prompt_tokens") or 0 for request in everything),
        "_completion_tokens": sum(request.get("completion_tokens") or 0 for request in everything),
        "_partial": False,
        "_page_failures": [failure for request in requests for failure in list_page_failures(request)],
        "_errors": [],
        "_disagreements": [],
        "_rules": [],
        "_asked_again": [row for request in requests for row in request.get("asked_again") or []],
        "_reread": [],
        "_corrected": [],
        "_page_kind": str(decide_page_kind(pages)) if pages else None,
        "_model": requests[0].get("model"),
        "_engine": requests[0].get("engine"),
    }


def list_disagreements(merged: MergeResult) -> list[DisagreementRow]:
    """Return what the parts of a document did not agree on."""
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
