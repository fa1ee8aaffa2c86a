"""Pending work: the job's sources as found now and the ledger's state come in, the documents with unanswered requests go out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import sources
from pipeline.errors import SourceError
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.ledger import LedgerState
from pipeline.output.sources import SOURCE_SCHEMA, read_sources
from pipeline.records import SourceRow
from pipeline.sources import local
from pipeline.stages.requests import compute_document_keys


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
    known = {
        (row["source"], row["size_bytes"], row["version"]): row for row in read_sources(output).select(SOURCE_SCHEMA.names).to_pylist()
    }
    keys = zip(*(listing[name].to_pylist() for name in ("source", "size_bytes", "version")), strict=True)
    found = [known.get(key, {}) for key in keys]
    for field in (SOURCE_SCHEMA.field("doc_id"), SOURCE_SCHEMA.field("page_count")):
        listing = listing.append_column(field, pa.array([row.get(field.name) for row in found], field.type))
    return listing


def forget_unopened(job: Job, documents: pa.Table, state: LedgerState) -> pa.Table:
    """Return the documents; those that could not be opened and are tried once more have no page count."""
    rows = documents.select(SOURCE_SCHEMA.names).to_pylist()
    again = [row["page_count"] == 0 and not state.done.issuperset(list_document_keys(job, row)) for row in rows]
    counts = [None if unopened else row["page_count"] for unopened, row in zip(again, rows, strict=True)]
    place = documents.schema.get_field_index("page_count")
    return documents.set_column(place, SOURCE_SCHEMA.field("page_count"), pa.array(counts, pa.int32()))


def select_unanswered(job: Job, documents: pa.Table, state: LedgerState) -> pa.Table:
    """Return the documents with a request to ask: one that the ledger does not have, or that is retried."""
    rows = documents.select(SOURCE_SCHEMA.names).to_pylist()
    return documents.filter(
        pa.array([row["page_count"] is None or not state.done.issuperset(list_document_keys(job, row)) for row in rows], pa.bool_())
    )


def list_document_keys(job: Job, document: SourceRow) -> Iterable[str]:
    """Return the keys of a document's requests under this job."""
    return compute_document_keys(document, job.pages_per_request, job.fingerprint)
