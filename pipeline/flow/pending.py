"""Pending work: the job's sources as found now and the ledger's state come in, the documents with unanswered requests go out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import sources
from pipeline.errors import DamagedShard, RunError, SourceError
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.ledger import LedgerState
from pipeline.output.sources import SOURCE_SCHEMA, read_sources, select_extra_columns
from pipeline.records import SourceRow
from pipeline.sources import local
from pipeline.stages.requests import compute_document_keys
from pipeline.storage.location import STORE_PACKAGES

NAMES_AT_ONCE = 100_000
"""Names of a listing that are Python strings at the same time."""

DOCUMENTS_AT_ONCE = 5_000
"""Documents whose keys are computed together."""


def list_documents(job: Job, on_found: sources.OnFound = lambda _: None) -> pa.Table:
    """Return the job's documents, without files that an earlier run wrote into an output folder among them.

    `on_found` is called with the number of documents so far. Raises JobError, and SourceError when there is no document at all.
    """
    source, output = job.sections.source, Output(job.output)
    recalled = recall_listing(job, output)
    if recalled is not None:
        on_found(recalled.num_rows)
        return recalled
    try:
        listing = sources.find_documents(
            source.paths,
            job.file.parent,
            allow_outside=source.allow_outside,
            keep_query=source.keep_query,
            known=recall_objects(job, output),
            on_found=on_found,
        )
    except SourceError as error:
        raise SourceError(str(error), error.file or job.file, "source.paths") from None
    own = f"{job.output}/"
    if isinstance(job.output, Path):
        own = local.format_source(os.path.realpath(job.output), os.path.realpath(job.file.parent)) + "/"
    listing = listing.filter(pc.invert(pc.starts_with(listing["source"], own)))
    if not listing.num_rows:
        raise SourceError(f"{job.file}: source.paths names nothing but the output folder {job.output}", job.file, "source.paths")
    return listing


@contextmanager
def record_listing(job: Job, listing: pa.Table, limit: int | None, output: Output) -> Iterator[None]:
    """Note in the output what its listing is of, and after the block that its run has ended: also one that stops itself.

    A run that is killed or interrupted has not.
    """
    facts = describe_listing(job, listing, limit)
    output.write_listing(facts)
    try:
        yield
    except RunError:
        with suppress(RunError):
            output.write_listing(facts | {"has_ended": True})
        raise
    output.write_listing(facts | {"has_ended": True})


def describe_listing(job: Job, listing: pa.Table, limit: int | None) -> dict[str, Any]:
    """Return the content of `listing.json`: what decides a listing, a digest of its names, and whether its run has ended."""
    digest = hashlib.sha256()
    for start in range(0, listing.num_rows, NAMES_AT_ONCE):
        digest.update("".join(f"{name}\0" for name in listing["source"].slice(start, NAMES_AT_ONCE).to_pylist()).encode())
    return {"source": describe_source(job), "limit": limit, "names": digest.hexdigest(), "has_ended": False}


def describe_source(job: Job) -> dict[str, Any]:
    """Return the keys that decide what a listing has."""
    source = job.sections.source
    return {"paths": list(source.paths), "allow_outside": source.allow_outside, "keep_query": source.keep_query}


def recall_listing(job: Job, output: Output) -> pa.Table | None:
    """Return the listing that an output has, under `source.relist: never`; None where it has none of all that these paths name."""
    facts = output.read_listing() if job.sections.source.relist == "never" else {}
    if facts.get("source") != describe_source(job) or facts.get("limit") is not None:
        return None
    try:
        table = read_sources(output)
    except DamagedShard:
        return None
    listing = table.select([*sources.LISTING_COLUMNS.names, *select_extra_columns(table).names, sources.FULL_URL.name])
    return listing if describe_listing(job, listing, None)["names"] == facts.get("names") else None


def recall_objects(job: Job, output: Output) -> dict[str, tuple[int, str]]:
    """Return size and version of the objects that an interrupted run has read, under `source.relist: auto`.

    The same run, uninterrupted, would not have looked at them again.
    """
    facts = output.read_listing() if job.sections.source.relist == "auto" else {}
    if facts.get("source") != describe_source(job) or facts.get("has_ended", True):
        return {}
    try:
        table = read_sources(output)
    except DamagedShard:
        return {}
    is_object = pc.match_substring_regex(table["source"], f"^({'|'.join(STORE_PACKAGES)})://")
    table = table.filter(pc.and_(is_object, pc.is_valid(table["doc_id"])))
    names, sizes, versions = (table[name].to_pylist() for name in sources.LISTING_COLUMNS.names)
    return dict(zip(names, zip(sizes, versions, strict=True), strict=True))


def limit_documents(listing: pa.Table, limit: int, output: Output) -> pa.Table:
    """Return the first `limit` documents, and those that an earlier run has listed already."""
    known = set(read_sources(output)["source"].to_pylist())
    keep = [index < limit or name in known for index, name in enumerate(listing["source"].to_pylist())]
    return listing.filter(pa.array(keep, pa.bool_()))


def identify_documents(output: Output, listing: pa.Table) -> pa.Table:
    """Return the listing with the doc_ids and page counts that earlier runs found for sources that have not changed since."""
    known = read_sources(output).select(["source", "size_bytes", "version", "doc_id", "page_count"])
    if not known["source"].equals(listing["source"]):  # as a rule they are equal, and nothing is copied
        known = known.take(pc.index_in(listing["source"], known["source"].combine_chunks()))
    same = pc.is_valid(known["source"])
    for name in ("size_bytes", "version"):
        here, there = listing[name], known[name]
        is_equal = pc.or_kleene(pc.equal(here, there), pc.and_(pc.is_null(here), pc.is_null(there)))
        same = pc.and_(same, pc.fill_null(is_equal, False))
    is_all_same = pc.all(same).as_py()
    for name in ("doc_id", "page_count"):
        field = SOURCE_SCHEMA.field(name)
        column = known[name] if is_all_same else pc.if_else(same, known[name], pa.scalar(None, field.type))
        listing = listing.append_column(field, column)
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
