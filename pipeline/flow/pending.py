"""Pending work: the job's sources as found now and the ledger's state come in, the documents with unanswered requests go out."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
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
from pipeline.output.shards import read_shards
from pipeline.output.sources import SOURCE_SCHEMA, read_sources, select_extra_columns, write_sources
from pipeline.records import SourceRow
from pipeline.sources import local
from pipeline.stages.requests import compute_document_keys
from pipeline.storage.location import STORE_PACKAGES

NAMES_AT_ONCE = 100_000
"""Names of a listing that are Python strings at the same time."""

GRACE_S = 2.0
"""A listing that takes no longer is complete before its first documents are asked."""
DOCUMENTS_AT_ONCE = 5_000
"""Documents whose keys are computed together."""


class DocumentListing:
    """The documents of a job: known, or found by threads that go on while the first ones are asked."""

    def __init__(self, job: Job, table: pa.Table | None = None) -> None:
        """Begin to list, unless the documents are given. Raises JobError, and SourceError when a path cannot be read."""
        self.job, self.table = job, table
        self.search: sources.DocumentSearch | None = None
        if table is None:
            source = job.sections.source
            options = {"allow_outside": source.allow_outside, "keep_query": source.keep_query}
            with self.name_job():
                self.search = sources.DocumentSearch(
                    source.paths, job.file.parent, **options, known=recall_objects(job, Output(job.output))
                )

    @classmethod
    def begin(cls, job: Job) -> DocumentListing:
        """Return the listing that the job's output has, if that shall be taken, or begin a new one. Raises JobError and SourceError."""
        return cls(job, recall_listing(job, Output(job.output)))

    @property
    def is_complete(self) -> bool:
        """Whether `wait` has found that all documents are there."""
        return self.table is not None

    @property
    def count(self) -> int:
        """Documents found so far; an estimate until the listing is complete, because some may be named twice."""
        return self.table.num_rows if self.table is not None else self.search.count if self.search else 0

    def wait(self, timeout_s: float) -> bool:
        """Say whether the listing is complete; wait for that no longer than this.

        Raises SourceError when a path cannot be listed, or when there is no document at all.
        """
        if self.table is None and self.search:
            with self.name_job():
                if self.search.wait(timeout_s):
                    self.table = self.find_inputs(self.search.make_table())
                    self.close()
                    if not self.table.num_rows:
                        only = f"source.paths names nothing but the output folder {self.job.output}"
                        raise SourceError(f"{self.job.file}: {only}", self.job.file, "source.paths")
        return self.is_complete

    def make_table(self) -> pa.Table:
        """Return the documents found so far, sorted by `source`, without files that a run wrote into an output folder among them."""
        if self.table is not None or self.search is None:
            return self.table
        with self.name_job():
            return self.find_inputs(self.search.make_table())

    def find_inputs(self, table: pa.Table) -> pa.Table:
        """Return a listing without the files of the job's output."""
        own = f"{self.job.output}/"
        if isinstance(self.job.output, Path):
            own = local.format_source(os.path.realpath(self.job.output), os.path.realpath(self.job.file.parent)) + "/"
        is_own = pc.starts_with(table["source"], own)
        return table.filter(pc.invert(is_own)) if pc.any(is_own).as_py() else table

    @contextmanager
    def name_job(self) -> Iterator[None]:
        """Have a SourceError name the job's key, unless it names a file."""
        try:
            yield
        except SourceError as error:
            raise SourceError(str(error), error.file or self.job.file, "source.paths") from None

    def close(self) -> None:
        """End the threads that list."""
        if self.search:
            self.search.close()
            self.search = None


def list_documents(job: Job, on_found: sources.OnFound = lambda _: None) -> pa.Table:
    """Return the job's documents, all of them.

    `on_found` is called with the number of documents so far. Raises JobError, and SourceError when there is no document at all.
    """
    with closing(DocumentListing.begin(job)) as listing:
        await_documents(listing, None, on_found)
        table = listing.make_table()
    on_found(table.num_rows)
    return table


def await_documents(listing: DocumentListing, enough: int | None, on_found: sources.OnFound) -> None:
    """Wait until a listing is complete, or until it has lasted `GRACE_S` and has found more documents than are `enough`.

    Raises SourceError.
    """
    grace_s = time.monotonic() + GRACE_S
    while not listing.wait(sources.PROGRESS_S):
        on_found(listing.count)
        if enough is not None and listing.count > enough and time.monotonic() > grace_s:
            return


@contextmanager
def record_listing(job: Job, listing: pa.Table | None, limit: int | None, output: Output) -> Iterator[Callable[[pa.Table], None]]:
    """Note in the output what its listing is of, and after the block that its run has ended: also one that stops itself.

    A run that is killed or interrupted has not. Where the listing is not complete yet, the block is given what notes it when it is.
    """
    facts = describe_listing(job, listing, limit)
    output.write_listing(facts)

    def note_complete(listing: pa.Table) -> None:
        facts.update(describe_listing(job, listing, limit))
        output.write_listing(facts)

    try:
        yield note_complete
    except RunError:
        with suppress(RunError):
            output.write_listing(facts | {"has_ended": True})
        raise
    output.write_listing(facts | {"has_ended": True})


def describe_listing(job: Job, listing: pa.Table | None, limit: int | None) -> dict[str, Any]:
    """Return the content of `listing.json`: what decides a listing, a digest of its names, and whether its run has ended.

    The digest of a listing that is not complete is null.
    """
    return {
        "source": describe_source(job),
        "limit": limit,
        "names": None if listing is None else compute_names_digest(listing["source"]),
        "has_ended": False,
    }


def compute_names_digest(names: pa.ChunkedArray) -> str:
    """Return the sha256 of names, each of which a zero byte ends."""
    digest = hashlib.sha256()
    for start in range(0, len(names), NAMES_AT_ONCE):
        digest.update("".join(f"{name}\0" for name in names.slice(start, NAMES_AT_ONCE).to_pylist()).encode())
    return digest.hexdigest()


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
    return listing if compute_names_digest(listing["source"]) == facts.get("names") else None


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
    """Return the listing with the doc_ids and page counts that earlier runs found for sources that have not changed since.

    Raises DamagedShard.
    """
    return compare_known(output, listing)[0]


def identify_first_documents(output: Output, listing: pa.Table) -> pa.Table:
    """Return what `identify_documents` does, of a listing that is not complete, and add its new sources to the output's list.

    Without sources that have changed: their old rows are in the list until the whole list is replaced. Raises DamagedShard.
    """
    documents, is_known, is_same = compare_known(output, listing)
    write_sources(output, documents.filter(pc.invert(is_known)))
    return documents.filter(pc.or_(is_same, pc.invert(is_known)))


def compare_known(output: Output, listing: pa.Table) -> tuple[pa.Table, pa.ChunkedArray, pa.ChunkedArray]:
    """Return the listing with what is known of its documents, and for each whether its source is known, and has not changed since."""
    names = read_shards(output.sources, ["source"], SOURCE_SCHEMA)["source"]
    if names.equals(listing["source"]):  # as a rule: nothing is looked up, and few columns are in memory at a time
        known, is_known = None, pc.is_valid(names)
    else:
        known = read_sources(output).select(["source", "size_bytes", "version", "doc_id", "page_count"])
        known = known.take(pc.index_in(listing["source"], known["source"].combine_chunks()))
        is_known = pc.is_valid(known["source"])
    del names
    is_same = is_known
    for name in ("size_bytes", "version"):
        here, there = listing[name], read_known(output, known, name)
        is_equal = pc.or_kleene(pc.equal(here, there), pc.and_(pc.is_null(here), pc.is_null(there)))
        is_same = pc.and_(is_same, pc.fill_null(is_equal, False))
    is_all_same = pc.all(is_same).as_py()
    for name in ("doc_id", "page_count"):
        field, there = SOURCE_SCHEMA.field(name), read_known(output, known, name)
        listing = listing.append_column(field, there if is_all_same else pc.if_else(is_same, there, pa.scalar(None, field.type)))
    return listing, is_known, is_same


def read_known(output: Output, known: pa.Table | None, name: str) -> pa.ChunkedArray:
    """Return a column of what is known, or of the list of sources itself."""
    return known[name] if known is not None else read_shards(output.sources, [name], SOURCE_SCHEMA)[name]


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
