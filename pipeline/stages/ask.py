"""Ask stage: requests with their page images -> answered rows of the ledger."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pipeline import schema
from pipeline.engines import Engine
from pipeline.errors import DocumentError
from pipeline.evidence.text_layer import unpack_words
from pipeline.job import Job
from pipeline.records import Completion, FinishReason, LedgerRow, Pixels, Request, RequestRow, Stage, Status
from pipeline.schema.arrow import ArrowPlan
from pipeline.schema.prompt import build_correction, build_messages, build_rule_question
from pipeline.schema.rules import RuleSet
from pipeline.schema.validate import Validator
from pipeline.stages.answers import ask_beside, make_answer_row, make_page_ids, make_storable
from pipeline.stages.re_ask import RecordJudge, RuleQuestion, crop_evidence, make_rule_questions, pick_fields
from pipeline.stages.requests import make_failed_row
from pipeline.stages.reread import Rereader


class AskStage:
    """Requests -> answers. Owns one engine; hundreds of requests are under way at once, and the engine batches them."""

    def __init__(self, job: Job, engine: Engine) -> None:
        self.job, self.engine = job, engine
        self.columns, self.validator = ArrowPlan(job.schema), Validator(job.schema)
        self.part_validator = Validator(schema.parse_json(job.part_schema))
        has_questions = any(rule.asks_again for rule in job.rules)
        self.judge = RecordJudge(self.columns, self.validator, RuleSet(job.rules, self.columns.root)) if has_questions else None
        self.questions = make_rule_questions(job, self.judge) if self.judge else []
        self.rereader = Rereader(job, engine) if job.sections.evidence.model == "on" else None

    async def answer_rows(self, row: RequestRow) -> list[LedgerRow]:
        """Return a row with its answer, one for each rule that the answer breaks and that asks again, at most once each, and those of the
        requests that look for values which no witness shows (`evidence.model`).

        Rules are of whole records: an answer about a part of a document breaks none.
        """
        answered = await self.answer_row(row)
        rows = [answered]
        if answered["status"] != Status.EXTRACTED or not (self.judge or self.rereader):
            return rows
        value = schema.parse_json(answered["answer"] or "")
        for question in self.questions if self.is_whole(row) else ():
            if self.judge and self.judge.breaks(value, question.rule):
                rows.append(await self.ask_fields(row, value, question))
                taken = self.judge.take_fields(value, rows[-1], question.rule)
                value = value if taken is None else taken
        return rows + (await self.rereader.reread_values(row, value) if self.rereader else [])

    def is_whole(self, row: RequestRow) -> bool:
        """Say whether the pages of a request are a whole record."""
        return len(row["pages"] or []) == row["page_count"] or self.job.sections.extract.per == "page"

    async def ask_fields(self, row: RequestRow, value: Any, question: RuleQuestion) -> LedgerRow:
        """Return the row of a request for the fields of a rule that a record breaks."""
        rule, pages, pixels = question.rule, row["pages"] or [], row.get("pixels") or []

        def build(key: str) -> Request:
            words = [unpack_words(page["page_no"], layer) for page in pages if (layer := page.get("text_layer"))]
            crop = crop_evidence(self.job, value, rule, words, pages, pixels)
            page_ids = make_page_ids(row)
            page_ids += [f"{row['doc_id']}/{crop.name}"] if crop and page_ids else []
            values = schema.dump_json(pick_fields(value, rule.paths))
            first = build_messages(self.job.system_message, pixels)
            messages = build_rule_question(first, crop.pixels if crop else None, rule.rule.message, values)
            return Request(key, messages, question.schema_text, self.job.sampling, tuple(page_ids))

        return await ask_beside(self.job, self.engine, row, rule.rule.name, rule.rule.name, build, question.list_errors)

    async def answer_row(self, row: RequestRow) -> LedgerRow:
        """Return a row with its answer and without its pixels. A row that failed before it was asked keeps its failure."""
        kept: LedgerRow = {name: value for name, value in row.items() if name != "pixels"}  # type: ignore[assignment]
        kept |= {"model": self.engine.model, "engine": self.engine.name, "fingerprint": self.job.fingerprint}
        if row.get("failure"):
            return kept
        shown = [page["page_no"] for page in row["pages"] or []]
        page_nos, page_ids = [] if self.is_whole(row) else shown, make_page_ids(row)
        kept |= await self.ask_pages(str(row["key"]), row.get("pixels") or [], page_nos, row["page_count"], page_ids)
        return kept

    async def ask_pages(
        self, key: str, pages: Sequence[Pixels], page_nos: Sequence[int], page_count: int, page_ids: Sequence[str] = ()
    ) -> LedgerRow:
        """Ask about these pages, check the answer, and ask again with its errors as often as the job allows.

        `page_nos` are their numbers in a document of which they are a part, empty for a whole one: the answer for a part follows a schema
        of its own, because other pages may have what these lack. Returns the ledger's columns from `status` to `elapsed_s`.
        """
        whole = not page_nos
        schema_text = self.job.request_schema if whole else self.job.part_schema
        started_at, started_s = datetime.now(UTC), time.monotonic()
        messages = build_messages(self.job.system_message, pages, page_nos, page_count)
        asks = prompt_tokens = completion_tokens = 0
        answer: LedgerRow | None = None
        while True:
            try:
                completion = await self.engine.complete(Request(key, messages, schema_text, self.job.sampling, tuple(page_ids)))
            except DocumentError as error:
                if answer is None or error.kind != "too_long":  # too long with the errors in it: the answer stays as it was
                    answer = make_failed_row(Stage.GENERATE, error)
                break
            asks += 1
            prompt_tokens += completion.usage.prompt_tokens
            completion_tokens += completion.usage.completion_tokens
            try:
                errors = self.list_errors(completion, whole)
                answer = make_answer_row(completion, errors)
            except Exception as error:  # any: what an answer makes the parser or the validator raise has no common class
                answer = {"answer": make_storable(completion.text), "finish_reason": str(completion.finish_reason)}
                answer |= make_failed_row(Stage.VALIDATE, error)
                break
            if not errors or completion.finish_reason is FinishReason.LENGTH or asks > self.job.sections.extract.re_asks:
                break
            messages = build_correction(messages, make_storable(completion.text), errors)
        spent: LedgerRow = {"asks": asks, "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        return {**spent, **answer, "started_at": started_at, "elapsed_s": time.monotonic() - started_s}

    def list_errors(self, completion: Completion, whole: bool) -> list[str]:
        """Return why an answer is not a valid record, or part of one; nothing if it is."""
        try:
            value = schema.parse_json(completion.text)
        except ValueError as error:
            return [make_storable(str(error))]
        violations = self.validator.find_violations(value) if whole else self.part_validator.find_violations(value)
        errors = [str(violation) for violation in violations if whole or violation.keyword != "required"]
        return errors or self.columns.build_row(value)[1]
