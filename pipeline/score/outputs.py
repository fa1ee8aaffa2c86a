"""Outputs as they are scored: an output folder in; its records, typed and by document, and the certainty of their values out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema
from pipeline.errors import JobError
from pipeline.output.ledger import LEDGER_SCHEMA, select_newest_attempt
from pipeline.output.records import RecordTable
from pipeline.output.shards import Selection, read_shards
from pipeline.records import LedgerRow, Status
from pipeline.schema.certainty import score_values
from pipeline.score.truth import SourceIndex, Truth

CHUNK_ROWS = 1000
CONFIDENCE = "_confidence"
RecordKey = tuple[str, int | None]
"""Source and page of a record; the page is None where records are documents."""


class RecordSet:
    """The records of an output, sorted by source and page."""

    def __init__(self, read: RecordTable) -> None:
        self.place, self.output, self.plan, self.table, self.per_page = read.place, read.output, read.plan, read.table, read.per_page
        pages = self.table["_page"].to_pylist() if self.per_page else [None] * self.table.num_rows
        self.keys: list[RecordKey] = list(zip(self.table["_source"].to_pylist(), pages, strict=True))
        self.statuses: list[str] = self.table["_status"].to_pylist()

    def read_rows(self, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield the schema's columns of these records."""
        columns = self.table.select(self.plan.schema.names)
        for start in range(0, len(indices), CHUNK_ROWS):
            yield from columns.take(list(indices[start : start + CHUNK_ROWS])).to_pylist()

    def read_column(self, name: str) -> list[str]:
        """Return a column's values as texts, null as `null`. Raises JobError for a column that has no texts, numbers or the like."""
        allowed = [field.name for field in self.table.schema if not pa.types.is_nested(field.type)]
        if name not in allowed:
            raise JobError(
                f"the records in {self.place} have no column {name!r} to group by; allowed are {', '.join(allowed)}", self.place, "--by"
            )
        return ["null" if value is None else str(value) for value in self.table[name].to_pylist()]

    def read_confidences(self, indices: Sequence[int]) -> list[dict[str, float]]:
        """Return the confidence in each value by its path, for each of these records: that of the records, raw or calibrated.

        Where no record has any, as in an older output, it is the exponential of the mean log-probability.
        """
        if CONFIDENCE in self.table.column_names and self.table[CONFIDENCE].null_count < self.table.num_rows:
            rows = self.table[CONFIDENCE].take(pa.array(indices, pa.int64())).to_pylist()
            return [{one["path"]: one["confidence"] for one in row or ()} for row in rows]
        known = self.read_certainties(indices)
        return [{path: exp(min(mean, 0.0)) for path, mean in certainties.items()} for certainties in known]

    def read_certainties(self, indices: Sequence[int]) -> list[dict[str, float]]:
        """Return the mean log-probability of each value by its path, for each of these records.

        It is empty where the engine gave none, and for a document of several requests, whose merged values are not traced back.
        """
        names = ["key", "attempt", "doc_id", "status", "first_page", "answer", "tokens"]
        doc_ids = self.table["_doc_id"].to_pylist()
        wanted = {doc_ids[index] for index in indices} - {None}
        rows = pc.field("doc_id").isin(pa.array(sorted(wanted), pa.string()))
        ledger = read_shards(self.output.requests, names, LEDGER_SCHEMA, Selection(rows, lambda name: True))
        attempts: dict[str, list[LedgerRow]] = {}
        certainties: dict[tuple[str, int], dict[str, float]] = {}
        for batch in ledger.to_batches(max_chunksize=CHUNK_ROWS):
            for row in cast(list[LedgerRow], batch.to_pylist()):
                certainties[str(row["key"]), row["attempt"]] = score_answer(row)
                attempts.setdefault(str(row["key"]), []).append({**row, "tokens": None})
        found: dict[tuple[str | None, int | None], list[dict[str, float]]] = {}
        for key, rows in attempts.items():
            newest = select_newest_attempt(rows)
            page = newest["first_page"] if self.per_page else None
            found.setdefault((newest["doc_id"], page), []).append(certainties[key, newest["attempt"]])
        requests = [found.get((doc_ids[index], self.keys[index][1]), []) for index in indices]
        return [scored[0] if len(scored) == 1 else {} for scored in requests]


def score_answer(row: LedgerRow) -> dict[str, float]:
    """Return the certainty of each value of an answer; empty for one that failed, is not JSON or has no tokens."""
    if row["status"] == Status.FAILED or not row["tokens"]:
        return {}
    try:
        schema.parse_json(row["answer"] or "")
    except ValueError:
        return {}
    return score_values(row["answer"] or "", row["tokens"])


class TruthMatch:
    """Which record each row of a truth is about."""

    def __init__(self, records: RecordSet, truth: Truth, place: Path) -> None:
        """Raises JobError when two rows are about one record, or no row is about any. A whole source goes before the end of one."""
        places = {key: index for index, key in enumerate(records.keys)}
        index = SourceIndex(source for source, _ in records.keys)
        self.pairs: dict[int, int] = {}
        """The row of the truth by the record."""
        self.unmatched: list[str] = []
        for number, row in sorted(enumerate(truth.rows), key=lambda numbered: numbered[1].name not in index.whole):
            found = index.find_sources(row.name, row.is_stem)
            record = places.get((found[0], row.page)) if len(found) == 1 else None
            if record is None:
                why = f" ({len(found)} documents end so)" if len(found) > 1 else f" page {row.page}" if found else ""
                self.unmatched.append(row.name + why)
            elif record in self.pairs:
                other = truth.rows[self.pairs[record]]
                if other.name == found[0] != row.name:
                    self.unmatched.append(row.name)
                else:
                    raise JobError(f"{row.place} and {other.place} are both about {found[0]}: keep one", place, "--truth")
            else:
                self.pairs[record] = number
        self.pairs = dict(sorted(self.pairs.items()))
        if not self.pairs:
            named, have = truth.rows[0].name, records.keys[0][0]
            raise JobError(
                f"{place} is about none of the documents in {records.place}: it names {named}, the records have {have}", place, "--truth"
            )
