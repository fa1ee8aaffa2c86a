"""Requests of a document: how its pages are divided, and the keys under which the ledger holds them.

A row's journey, for a document of 5 pages and requests of up to 4:

    {source: "a.pdf", size_bytes: …, version: …}
      -> {…, doc_id: "9f…", page_count: 5, key: "c1…", first_page: 1, last_page: 4, pages: [4 sizes], pixels: [4 images]}
         {…, doc_id: "9f…", page_count: 5, key: "07…", first_page: 5, last_page: 5, pages: [1 size], pixels: [image]}
      -> {…, key: "c1…", status: "extracted", answer: '{"total":…', tokens: […], …}
         {…, key: "07…", status: "failed", failure: {stage: "generate", kind: "length", …}, …}
"""

from __future__ import annotations

import hashlib
import logging

from pipeline.errors import DocumentError, PipelineError
from pipeline.records import FailureRow, LedgerRow, SourceRow, Stage, Status

LOG = logging.getLogger(__name__)


def compute_request_key(identity: str, first_page: int, last_page: int, fingerprint: str) -> str:
    """Return a request's key: 32 hex digits of its document, pages and job."""
    return hashlib.sha256(f"{identity}\n{first_page}-{last_page}\n{fingerprint}".encode()).hexdigest()[:32]


def split_pages(page_count: int, per_request: int) -> list[tuple[int, int]]:
    """Return the first and last page of each of a document's requests: (1, 4), (5, 8), (9, 9)."""
    return [(first, min(first + per_request - 1, page_count)) for first in range(1, page_count + 1, per_request)]


def compute_document_keys(document: SourceRow, per_request: int, fingerprint: str) -> dict[str, tuple[int, int]]:
    """Return the requests of a document: key -> first and last page.

    A document that could not be opened is one request for the pages 0 to 0. Its key is made of its bytes, or of its path and version
    where these could not be read either: a URL that was signed again is asked again.
    """
    doc_id, page_count = document["doc_id"], document["page_count"]
    if not page_count:
        identity = doc_id or f"{document.get('full_url') or document['source']}\n{document['size_bytes']}\n{document['version']}"
        return {compute_request_key(identity, 0, 0, fingerprint): (0, 0)}
    return {compute_request_key(str(doc_id), *pages, fingerprint): pages for pages in split_pages(page_count, per_request)}


def compute_rule_key(key: str, rule: str) -> str:
    """Return the key of the request that asks again for the fields of a rule, given that of the request whose answer broke it."""
    return hashlib.sha256(f"{key}\n{rule}".encode()).hexdigest()[:32]


def make_failed_row(stage: Stage, error: Exception) -> LedgerRow:
    """Return the ledger's columns for an exception that costs one document or request.

    A DocumentError says what failed. Any other exception is the kind `internal`, with its traceback in the log: one document must not stop
    a run. This package's errors that do stop a run (JobError, RunError) are raised again.
    """
    if isinstance(error, DocumentError):
        failure: FailureRow = {"stage": str(stage), "kind": error.kind, "message": error.message}
    elif isinstance(error, PipelineError):
        raise error
    else:
        LOG.error("%s/internal", stage, exc_info=error)
        reason = " ".join(str(error).encode("utf-8", "replace").decode().split())[:300]
        failure = {"stage": str(stage), "kind": "internal", "message": f"{type(error).__name__}: {reason}".removesuffix(": ")}
    return {"status": str(Status.FAILED), "failure": failure}
