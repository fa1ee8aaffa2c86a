"""Batch-shaped steps of the ask pass: documents -> requests with their pages, requests -> answers.

The only place where an exception becomes a `Failure` in a row: one document that cannot be read, one page that cannot be
drawn, one request that cannot be answered costs itself and nothing else. Knows neither Ray nor Parquet.

A row's journey, for a document of 5 pages and requests of up to 4:

    {source: "a.pdf", size_bytes: …, version: …}
      -> {…, doc_id: "9f…", page_count: 5, key: "c1…", first_page: 1, last_page: 4, pages: [4 sizes], pixels: [4 × bytes]}
         {…, doc_id: "9f…", page_count: 5, key: "07…", first_page: 5, last_page: 5, pages: [1 size], pixels: [bytes]}
      -> {…, key: "c1…", status: "extracted", answer: '{"total":…', tokens: […], …}
         {…, key: "07…", status: "failed", failure: {stage: "generate", kind: "length", …}, …}
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

from pipeline.errors import DocumentError
from pipeline.records import Failure, Stage, Status

Row = dict[str, Any]


def compute_request_key(identity: str, first_page: int, last_page: int, fingerprint: str) -> str:
    """Return a request's name: 32 hex digits of its document, pages and job."""
    return hashlib.sha256(f"{identity}\n{first_page}-{last_page}\n{fingerprint}".encode()).hexdigest()[:32]


def split_pages(page_count: int, per_request: int) -> list[tuple[int, int]]:
    """Return the first and last page of each of a document's requests: (1, 4), (5, 8), (9, 9)."""
    return [(first, min(first + per_request - 1, page_count)) for first in range(1, page_count + 1, per_request)]


def compute_document_keys(row: Row, per_request: int, fingerprint: str) -> dict[str, tuple[int, int]]:
    """Return the requests of a document of known page count: key -> pages.

    A document that could not be opened is one request for the pages 0 to 0, named from its bytes, or from its place and
    version where not even these could be read.
    """
    if not row["page_count"]:
        identity = row["doc_id"] or f"{row['source']}\n{row['size_bytes']}\n{row['version']}"
        return {compute_request_key(identity, 0, 0, fingerprint): (0, 0)}
    return {compute_request_key(row["doc_id"], *pages, fingerprint): pages for pages in split_pages(row["page_count"], per_request)}


def make_failed_row(stage: Stage, error: DocumentError) -> Row:
    return {"status": str(Status.FAILED), "failure": asdict(Failure(stage, error.kind, error.message))}
