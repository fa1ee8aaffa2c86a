"""OCR pass: documents whose answers are in the ledger come in, rows of the ledger of OCR go out, written by the tasks that read the pages.

    listing, records, ledger of OCR -> the pages that `evidence.ocr` wants and no run has read -> tasks of one CPU -> shards of `words/`

It follows the first settling, which says what is doubtful, and precedes the second, which looks for the values in what was read. No engine
has a part in it, and nothing that goes wrong in it costs an answer or a record.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import cluster
from pipeline.errors import DamagedShard, PipelineError
from pipeline.events import emit_event
from pipeline.flow.connection import connect_for_job
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.ledger import RetryFilter
from pipeline.output.shards import mark_first, read_each_shard
from pipeline.output.words import FAILED, NOT_NEEDED, READ, read_word_keys, write_words
from pipeline.records import OcrRow, Stage, Status
from pipeline.report import Phase, ProgressTracker
from pipeline.stages.ocr import OcrStage, OcrTaskRow, UnreadRow
from pipeline.stages.render import RenderPlan

LISTED_COLUMNS = ["source", "size_bytes", "version", "full_url", "doc_id", "page_count"]
DOUBT_COLUMNS = ["_doc_id", "_status", "_unwitnessed", "_least_confidence", "_rules", "_disagreements", "_alerts"]
LOW_CONFIDENCE = 0.8
"""A record with a value of less is doubtful."""
SAMPLED_PAGES = 4
"""Pages of a document that are read although their text layer is usable, where the layer lacks a value."""
MIN_TASK_PAGES, MAX_TASK_PAGES = 4, 256
"""Pages of a task: a quarter of a minute to a quarter of an hour."""
TASKS_PER_CPU = 4
FLUSH_S = 60.0
"""How often a task writes what it has read."""
MAX_TASK_RETRIES = 2
"""How often a task is repeated whose process died; what it had not written is left to another run."""
DOCUMENTS_AT_ONCE = 5_000
"""Documents whose pages are Python numbers at the same time."""


@dataclass
class OcrCounts:
    """What became of the pages of a task."""

    documents: int = 0
    pages: int = 0
    """Looked at, those that failed included."""
    read: int = 0
    failed: int = 0
    why: str | None = None
    """What the first failure says."""

    def add(self, row: OcrRow | UnreadRow) -> None:
        """Count a page, or the pages of a document that cannot be read."""
        pages = cast(int, row.get("pages", 1))
        self.pages += pages
        self.read += row.get("status") == READ
        if failure := row["failure"]:
            self.failed += pages
            self.why = self.why or "{stage}/{kind}: {message}".format(**failure)


@dataclass(frozen=True)
class OcrTask:
    """What the tasks of a pass share."""

    plan: RenderPlan
    output: Output

    def read_documents(self, documents: list[OcrTaskRow]) -> OcrCounts:
        """Read the pages of some documents, and write what is read once a minute."""
        stage, rows, counts = OcrStage(self.plan), list[OcrRow](), OcrCounts(len(documents))
        written_s = time.monotonic()
        try:
            for row in stage.read_documents(documents):
                counts.add(row)
                if "doc_id" in row:
                    rows.append(cast(OcrRow, row))
                if time.monotonic() > written_s + FLUSH_S:
                    write_words(self.output, rows)
                    rows, written_s = [], time.monotonic()
        finally:
            stage.close()
            write_words(self.output, rows)
        return counts


@dataclass(frozen=True)
class OcrPass:
    """Which pages of an output are read, and their reading."""

    job: Job
    output: Output
    tracker: ProgressTracker
    records: pa.Schema
    """The columns of the output's records."""
    retry: RetryFilter | None = None
    """Pages whose reading failed so are tried again."""

    def read_pages(self, documents: pa.Table) -> Iterator[None]:
        """Have all pages of the output read that `evidence.ocr` wants and that were not read yet; yield after each task.

        Pages that fail are counted in the report. Raises DamagedShard, and RunError where Ray does not start.
        """
        wanted = self.select_pages(documents)
        if not wanted.num_rows:
            return
        if not cluster.is_ray_connected():
            self.tracker.change_phase(Phase.STARTING_RAY)
            connect_for_job(self.job)
        self.output.words.create()
        self.tracker.enter_phase(Phase.READING, wanted.num_rows)
        report, left = self.tracker.report, count_wanted_pages(wanted)
        for counts in self.run_tasks(wanted):
            report.ocr_pages += counts.read
            report.ocr_failed += counts.failed
            report.ocr_problem = report.ocr_problem or counts.why or ""
            left -= counts.pages
            self.tracker.add_settled(counts.documents)
            yield
        report.ocr_failed += left
        emit_event("pages_read", read=report.ocr_pages, failed=report.ocr_failed, problem=report.ocr_problem)

    def run_tasks(self, wanted: pa.Table) -> Iterator[OcrCounts]:
        """Yield the counts of each task but those whose process died again and again."""
        import ray
        from ray.exceptions import RayError

        cpus = int(ray.cluster_resources().get("CPU", 1))
        blocks, running = iter(cut_tasks(wanted, cpus)), list[Any]()
        remote: Any = ray.remote(num_cpus=1, max_retries=MAX_TASK_RETRIES)(run_ocr_task)
        task = ray.put(OcrTask(RenderPlan.of_job(self.job), self.output))
        try:
            while True:
                running += [remote.remote(block, task) for block in islice(blocks, TASKS_PER_CPU * cpus - len(running))]
                if not running:
                    return
                (ended, *_), running = ray.wait(running)
                try:
                    yield ray.get(ended)
                except RayError as error:
                    problem = str(cluster.convert_worker_error(error, "OCR stopped: {}"))
                    self.tracker.report.ocr_problem = self.tracker.report.ocr_problem or problem
        finally:
            for left in running:
                ray.cancel(left, force=True)

    def select_pages(self, documents: pa.Table) -> pa.Table:
        """Return the documents of a listing with pages to read, each with these and whether they are read whatever their layer is."""
        mode = self.job.sections.evidence.ocr
        documents = documents.select(LISTED_COLUMNS).filter(pc.greater(pc.fill_null(documents["page_count"], 0), 0)).sort_by("doc_id")
        documents = documents.filter(mark_first(documents["doc_id"]))
        keys = read_word_keys(self.output)
        if self.retry and self.retry.covers_stage(Stage.OCR):
            keys = keys.filter(pc.not_equal(keys["status"], FAILED))
        read = keys.filter(pc.not_equal(keys["status"], NOT_NEEDED))
        if mode == "all":
            return list_pages(documents, read, must_read=True)
        if mode == "doubtful":
            return list_pages(self.select_doubtful(documents, any_doubt=True), read, must_read=True)
        doubtful = list_pages(self.select_doubtful(documents, any_doubt=False), read, must_read=True, most=SAMPLED_PAGES)
        others = documents.filter(pc.invert(pc.is_in(documents["doc_id"], doubtful["doc_id"].combine_chunks())))
        return pa.concat_tables([list_pages(others, keys, must_read=False), doubtful])

    def select_doubtful(self, documents: pa.Table, any_doubt: bool) -> pa.Table:
        """Return the documents with a doubtful record; without `any_doubt` those whose text layer lacks a value."""
        found = read_each_shard(self.output.records, DOUBT_COLUMNS, self.records, convert=lambda table: find_doubtful(table, any_doubt))
        ids = [shard for shard in found if not isinstance(shard, DamagedShard)]  # its ranges are settled again by another run
        wanted = pa.concat_arrays(ids) if ids else pa.array([], pa.string())
        return documents.filter(pc.is_in(documents["doc_id"], wanted))


def find_doubtful(records: pa.Table, any_doubt: bool) -> pa.Array:
    """Return the doc_ids of doubtful records. A failed one is none: it has no value that a witness could show."""
    is_doubtful = pc.fill_null(pc.greater(records["_unwitnessed"], 0), False)
    if any_doubt:
        broken = [any(rule["result"] == "broken" for rule in rules or ()) for rules in records["_rules"].to_pylist()]
        for doubt in (
            pc.equal(records["_status"], str(Status.INVALID)),
            pc.less(records["_least_confidence"], LOW_CONFIDENCE),
            *(pc.greater(pc.list_value_length(records[name]), 0) for name in ("_disagreements", "_alerts")),
            pa.chunked_array([pa.array(broken, pa.bool_())]),
        ):
            is_doubtful = pc.or_(is_doubtful, pc.fill_null(doubt, False))
    is_asked = pc.not_equal(records["_status"], str(Status.FAILED))
    return records["_doc_id"].filter(pc.and_(is_doubtful, is_asked)).combine_chunks().cast(pa.string())


def list_pages(documents: pa.Table, done: pa.Table, must_read: bool, most: int | None = None) -> pa.Table:
    """Return the documents with pages that are not done, of each the first `most` or all, with their numbers in `pages`."""
    done = done.filter(pc.is_in(done["doc_id"], documents["doc_id"].combine_chunks()))
    pages_done: dict[str, set[int]] = {}
    for doc_id, page in zip(done["doc_id"].to_pylist(), done["page"].to_pylist(), strict=True):
        pages_done.setdefault(doc_id, set()).add(page)
    parts = []
    for start in range(0, max(1, documents.num_rows), DOCUMENTS_AT_ONCE):
        some = documents.slice(start, DOCUMENTS_AT_ONCE)
        ids, counts = some["doc_id"].to_pylist(), some["page_count"].to_pylist()
        pages = [
            [page for page in range(1, min(count, most or count) + 1) if page not in pages_done.get(doc_id, ())]
            for doc_id, count in zip(ids, counts, strict=True)
        ]
        some = some.append_column("pages", pa.array(pages, pa.list_(pa.int32())))
        parts.append(some.append_column("must_read", pa.array([must_read] * some.num_rows, pa.bool_())))
    table = pa.concat_tables(parts)
    return table.filter(pc.greater(pc.list_value_length(table["pages"]), 0))


def count_wanted_pages(wanted: pa.Table) -> int:
    """Return the number of pages that are wanted of these documents."""
    return int(pc.sum(pc.list_value_length(wanted["pages"])).as_py() or 0)


def cut_tasks(wanted: pa.Table, cpus: int) -> list[pa.Table]:
    """Return the documents in blocks of about as many pages each, a few blocks for each CPU; a document is in one."""
    per_task = min(max(count_wanted_pages(wanted) // (TASKS_PER_CPU * max(1, cpus)), MIN_TASK_PAGES), MAX_TASK_PAGES)
    before = np.concatenate([[0], np.cumsum(pc.list_value_length(wanted["pages"]).to_numpy())[:-1]])
    starts = [*np.flatnonzero(np.diff(before // per_task, prepend=-1)).tolist(), wanted.num_rows]
    return [wanted.slice(start, end - start).combine_chunks() for start, end in pairwise(starts)]


def run_ocr_task(documents: pa.Table, task: OcrTask) -> OcrCounts:
    """OCR task of Ray: documents with the pages wanted -> what became of these. A missing package is a reason, too."""
    try:
        return task.read_documents(cast(list[OcrTaskRow], documents.to_pylist()))
    except PipelineError as error:
        pages = count_wanted_pages(documents)
        return OcrCounts(documents.num_rows, pages, 0, pages, str(error))
