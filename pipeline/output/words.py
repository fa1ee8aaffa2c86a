"""Ledger of OCR (`words/` of the output folder): one row per page that OCR has looked at, by digest of the document and page.

It is apart from the ledger of requests, so that `evidence.ocr` can be switched on, and changed, for an output that was asked without it. A
page that was `not_needed` under `scans`, or `failed`, may be `read` later: it has two rows then, of which that counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import pyarrow as pa

from pipeline.output import Output
from pipeline.output.ledger import FAILURE_TYPE, TEXT_LAYER_TYPE, select_documents
from pipeline.output.shards import read_shards, write_shard
from pipeline.records import OcrRow

WORDS_SCHEMA = pa.schema(
    [
        ("doc_id", pa.string()),
        ("page", pa.int32()),
        ("status", pa.string()),
        ("layer", pa.string()),
        ("words", TEXT_LAYER_TYPE),
        ("failure", FAILURE_TYPE),
        ("reader", pa.string()),
    ]
)
WORD_KEYS = ["doc_id", "page", "status"]
READ, NOT_NEEDED, FAILED = "read", "not_needed", "failed"

DocumentWords = Mapping[int, OcrRow]
"""What OCR read in one document, by page."""


def write_words(output: Output, rows: Sequence[OcrRow]) -> None:
    """Add a shard with these rows, if there are any."""
    if rows:
        keys = [f"{row['doc_id']}/{row['page']}/{row['status']}" for row in rows]
        write_shard(output.words, pa.Table.from_pylist(cast(Any, rows), WORDS_SCHEMA), keys)


def read_word_keys(output: Output, doc_ids: pa.ChunkedArray | None = None) -> pa.Table:
    """Return which pages of these documents OCR has looked at, of all without them. Raises DamagedShard and RunError."""
    return read_shards(output.words, WORD_KEYS, WORDS_SCHEMA, select_documents(doc_ids, None) if doc_ids is not None else None)


def read_ocr_words(output: Output, doc_ids: pa.ChunkedArray) -> pa.Table:
    """Return the rows of these documents. Raises DamagedShard and RunError."""
    return read_shards(output.words, WORDS_SCHEMA.names, WORDS_SCHEMA, select_documents(doc_ids, None))


def group_words(rows: Iterable[OcrRow]) -> dict[str, DocumentWords]:
    """Return rows of this ledger by doc_id and page; of two of a page the one that was read."""
    found: dict[str, dict[int, OcrRow]] = {}
    for row in rows:
        pages = found.setdefault(row["doc_id"], {})
        if row["page"] not in pages or row["status"] == READ:
            pages[row["page"]] = row
    return {**found}
