"""Answers as rows of the ledger: a completion in, columns out; and requests beside that of a record, each a row of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import cast

from pipeline.engines import Engine
from pipeline.job import Job
from pipeline.records import Completion, FailureRow, FinishReason, LedgerRow, Request, RequestRow, Stage, Status, TokenRow
from pipeline.stages.requests import compute_rule_key, make_failed_row


async def ask_beside(
    job: Job,
    engine: Engine,
    row: RequestRow,
    rule: str,
    name: str,
    build: Callable[[str], Request],
    list_errors: Callable[[str], list[str]],
) -> LedgerRow:
    """Return the row of a request that follows the answer to `row`, asked once: it fails alone, and that answer stays as it is.

    `rule` is the ledger's column, `name` what tells the request from others beside the same row. `build` returns the request by its key;
    what it raises is the row's failure, too.
    """
    found, started_s = make_row_beside(job, engine, row, rule, name), time.monotonic()
    try:
        completion = await engine.complete(build(str(found["key"])))
        found |= {"asks": 1, **count_tokens(completion)}
        found |= make_answer_row(completion, list_errors(completion.text))
    except Exception as error:  # any: what an answer makes the parser or the validator raise has no common class
        found |= make_failed_row(Stage.GENERATE, error)
    return {**found, "elapsed_s": time.monotonic() - started_s}


def make_row_beside(job: Job, engine: Engine, row: RequestRow, rule: str, name: str) -> LedgerRow:
    """Return the columns of such a request that are known before it is asked."""
    kept = {name: found for name, found in row.items() if name not in ("pixels", "pages", "page_failures")}
    kept |= {"key": compute_rule_key(str(row["key"]), name), "rule": rule, "started_at": datetime.now(UTC), "elapsed_s": 0.0}
    kept |= {"model": engine.model, "engine": engine.name, "fingerprint": job.fingerprint}
    return cast(LedgerRow, {**kept, "asks": 0, "prompt_tokens": 0, "completion_tokens": 0})


def count_tokens(completion: Completion) -> LedgerRow:
    """Return the ledger's columns for what an answer took."""
    return {"prompt_tokens": completion.usage.prompt_tokens, "completion_tokens": completion.usage.completion_tokens}


def make_page_ids(row: RequestRow) -> list[str]:
    """Return what tells the page images of a run apart: bytes of the document, number, size and renderer. Empty for a document without."""
    doc_id, pages = row.get("doc_id"), row["pages"] or []
    return [f"{doc_id}/{p['page_no']}/{p['width_px']}x{p['height_px']}/{p.get('renderer') or ''}" for p in pages] if doc_id else []


def make_storable(text: str) -> str:
    """Return text that UTF-8 and so Arrow can hold: a lone surrogate, which a server's JSON can bring, as its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def make_answer_row(completion: Completion, errors: list[str]) -> LedgerRow:
    """Return the ledger's columns for the last answer."""
    failure: FailureRow | None = {"stage": "validate", "kind": "invalid", "message": errors[0]} if errors else None
    status = Status.INVALID if errors else Status.EXTRACTED
    if completion.finish_reason is FinishReason.LENGTH:
        limit = (
            f"the answer was cut after {completion.usage.completion_tokens} tokens; raise sampling.max_tokens or lower pages.per_request"
        )
        failure, status = {"stage": "generate", "kind": "length", "message": limit}, Status.FAILED
    tokens = [TokenRow(text=make_storable(token.text), logprob=token.logprob, margin=token.margin) for token in completion.tokens]
    return {
        "answer": make_storable(completion.text),
        "finish_reason": str(completion.finish_reason),
        "errors": errors,
        "tokens": tokens,
        "status": str(status),
        "failure": failure,
    }
