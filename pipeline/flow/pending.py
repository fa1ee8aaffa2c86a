"""Pending work: the job's sources as found now and the ledger's state come in, the documents with unanswered requests go out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import sources
from pipeline.errors import SourceError
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.ledger import LedgerState
from pipeline.output.sources import SOURCE_SCHEMA, read_sources
from pipeline.records import SourceRow
from pipeline.sources import local
from pipeline.stages.requests import compute_document_keys

DOCUMENTS_AT_ONCE = 5_000
"""Documents whose keys are computed together."""


def list_documents(job: Job) -> pa.Table:
    """Return the job's documents, without files that an earlier run wrote into an output folder among them.

    Raises JobError, and SourceError when there is no document at all.
    """
    source = job.sections.source
    try:
        listing = sources.find_documents(source.paths, job.file.parent, allow_outside=source.allow_outside, keep_query=source.keep_query)
    except SourceError as error:
        raise SourceError(str(error), error.file or job.file, "source.paths") from None
    own = f"{job.output}/"
    if isinstance(job.output, Path):
        own = local.format_source(os.path.realpath(job.output), os.path.realpath(job.file.parent)) + "/"
    listing = listing.filter(pc.invert(pc.starts_with(listing["source"], own)))
    if not listing.num_rows:
        raise SourceError(f"{job.file}: source.paths names nothing but the output folder {job.output}", job.file, "source.paths")
    return listing


def limit_documents(listing: pa.Table, limit: int, output: Output) -> pa.Table:
    """Return the first `limit` documents, and those that an earlier run has listed already."""
    known = set(read_sources(output)["source"].to_pylist())
    keep = [index < limit or name in known for index, name in enumerate(listing["source"].to_pylist())]
    return listing.filter(pa.array(keep, pa.bool_()))


def identify_documents(output: Output, listing: pa.Table) -> pa.Table:
    """Return the listing with the doc_ids and page counts that earlier runs found for sources that have not changed since."""
    known = read_sources(output).select(SOURCE_SCHEMA.names)
    rows = pc.index_in(listing["source"], known["source"].combine_chunks())
    same = pc.is_valid(rows)
    for name in ("size_bytes", "version"):
        here, there = listing[name], known[name].take(rows)
        is_equal = pc.or_kleene(pc.equal(here, there), pc.and_(pc.is_null(here), pc.is_null(there)))
        same = pc.and_(same, pc.fill_null(is_equal, False))
    rows = pc.if_else(same, rows, pa.scalar(None, pa.int32()))
    found = known.select(["doc_id", "page_count"])
    del known
    for name in found.column_names:
        listing = listing.append_column(SOURCE_SCHEMA.field(name), found[name].take(rows))
    return listing


def forget_unopened(job: Job, documents: pa.Table, state: LedgerState) -> pa.Table:
    """Return the documents; those that could not be opened and are tried once more have no page count."""
    is_unopened = pc.fill_null(pc.equal(documents["page_count"], 0), False)
    rows = documents.select(SOURCE_SCHEMA.names).filter(is_unopened).to_pylist()
    if not rows:
        return documents
    forgotten = is_unopened.to_numpy().copy()
    forgotten[forgotten] = [not state.done.find(list(list_document_keys(job, row))).all() for row in rows]
    counts = pc.if_else(pa.array(forgotten), pa.scalar(None, pa.int32()), documents["page_count"])
    place = documents.schema.get_field_index("page_count")
    return documents.set_column(place, SOURCE_SCHEMA.field("page_count"), counts)


def select_unanswered(job: Job, documents: pa.Table, state: LedgerState) -> pa.Table:
    """Return the documents with a request to ask: one that the ledger does not have, or that is retried."""
    wanted = [
        find_unanswered(job, documents.select(SOURCE_SCHEMA.names).slice(start, DOCUMENTS_AT_ONCE).to_pylist(), state)
        for start in range(0, documents.num_rows, DOCUMENTS_AT_ONCE)
    ]
    return documents.filter(pa.array(np.concatenate(wanted))) if wanted else documents


def find_unanswered(job: Job, rows: list[SourceRow], state: LedgerState) -> NDArray[np.bool_]:
    """Return for each document whether it has a request to ask, or was not opened yet."""
    opened = [index for index, row in enumerate(rows) if row["page_count"] is not None]
    keys = [list(list_document_keys(job, rows[index])) for index in opened]
    is_done = state.done.find([key for some in keys for key in some])
    wanted, first = np.ones(len(rows), np.bool_), 0
    for index, some in zip(opened, keys, strict=True):
        wanted[index] = not is_done[first : first + len(some)].all()
        first += len(some)
    return wanted


def list_document_keys(job: Job, document: SourceRow) -> Iterable[str]:
    """Return the keys of a document's requests under this job."""
    return compute_document_keys(document, job.pages_per_request, job.fingerprint)
