"""The two passes of a run on Ray Data: a job comes in, its output folder is filled and a `Report` goes out.

    ask      documents -> requests -> engine actors -> rows of the ledger, written as they come
    settle   ledger and listing -> typed records, without a model

Where `evidence.ocr` is not off, pages are read by OCR after that (`ocr_pass`), and what has changed is settled once more.

A run prepares the job once (`preparation`) and hands what it found on to both passes. Ray is imported and started when there is something
to ask, or more to settle than this process does alone.

A round asks what is listed by then and unanswered. A short listing is complete before the first; a longer one goes on meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, cast

import pyarrow as pa

from pipeline import cluster, engines
from pipeline.errors import DamagedShard, JobError
from pipeline.events import emit_answer_event, emit_event
from pipeline.flow.capacity import ClusterShrunk, Reservations, compute_reservations
from pipeline.flow.connection import connect_for_job
from pipeline.flow.pending import (
    DocumentListing,
    forget_unopened,
    identify_documents,
    identify_first_documents,
    limit_documents,
    record_listing,
    select_unanswered,
)
from pipeline.flow.preparation import PreparedRun, check_same_job, connect_run, describe_run, note_engine, prepare_run
from pipeline.flow.settle_pass import settle_output
from pipeline.job import Job, find_differences
from pipeline.output import Output
from pipeline.output.compaction import compact_shards
from pipeline.output.lease import Lease, is_output_leased
from pipeline.output.ledger import LedgerState, RetryFilter, read_ledger_state
from pipeline.output.shards import read_intact, set_aside_shard
from pipeline.output.sources import read_sources, replace_sources, select_extra_columns
from pipeline.report import Canary, CircuitBreaker, OnProgress, Phase, ProgressTracker, Report
from pipeline.review.report_page import write_report_page
from pipeline.sources import PROGRESS_S
from pipeline.stages.record_plan import RecordPlan
from pipeline.stages.settle import SettleStage

if TYPE_CHECKING:
    from pipeline.flow.ask_pass import AskPass

MAX_ROUNDS = 8
"""One round asks everything. Another asks what was lost with a machine, where Ray does not bring all of it back."""


def run(
    job: Job,
    limit: int | None = None,
    on_progress: OnProgress | None = None,
    on_demo: Callable[[str], None] | None = None,
    retry: str | None = None,
    on_engine: Callable[[str], None] | None = None,
) -> Report:
    """Ask what has not been answered yet, settle everything, and return the report.

    `limit` takes the first so many documents of the listing; `retry`, "failed" or "failed:KIND", asks failed requests of that kind
    once more; `on_demo` is called with the model's name when the demonstration model takes its place, `on_engine` with one line on the
    engine that was chosen for another model. Raises JobError before anything is started, or while documents are asked where a long
    listing fails, and RunError when the run cannot go on; running it again resumes it.
    """
    started_s = time.monotonic()
    retry_filter = RetryFilter.parse(retry) if retry else None
    report = Report(job.sections.name, str(job.output), job.sections.model.name, job.uses_demo)
    tracker = ProgressTracker(report, on_progress or (lambda _: None))
    output = Output(job.output)
    with prepare_run(job, output, tracker, is_whole=limit is not None or retry is not None) as prepared:
        if prepared.job.uses_demo and not job.uses_demo and on_demo:
            on_demo(job.sections.model.name)
        elif job.sections.model.engine == "auto" and not job.uses_demo and on_engine:
            on_engine(f"engine: {report.engine} ({report.engine_reason})")
        report.model, report.demonstration = prepared.job.sections.model.name, prepared.job.uses_demo
        check_same_job(prepared.job, output)
        output.create()
        with Lease(output.root) as lease:
            output.remove_leftovers()
            output.write_job(described := describe_run(prepared.job))
            emit_event("run_started", **described)
            if limit is not None:
                listed = prepared.listing.make_table()
                table = read_intact(output, report.damaged, lambda: limit_documents(listed, limit, output))
                prepared = replace(prepared, listing=DocumentListing(prepared.job, table))
            with record_listing(prepared.job, prepared.listing.table, limit, output) as note_complete:
                Run(prepared, output, tracker, lease, note_complete).execute(retry_filter)
            tracker.finish()
            report.elapsed_s = round(time.monotonic() - started_s, 3)
            write_reports(output, report)
    emit_event("run_ended", **report.as_dict())
    return report


def settle(job: Job, on_progress: OnProgress | None = None) -> Report:
    """Write the records again from the ledger, with the job's schema as it is now; asks nothing. Raises JobError, RunError."""
    report = Report(job.sections.name, str(job.output), job.sections.model.name, job.uses_demo)
    tracker = ProgressTracker(report, on_progress or (lambda _: None))
    output = Output(job.output)
    before = output.read_job()
    if before is None:
        raise JobError(f"there is nothing to settle in {job.output}: run the job first", job.file, "output.path")
    given, job = job, job.with_resolved_model(before["job"]["model"])
    if set(changed := find_differences(before["asked"], job.decisive_keys)) - {"extract.absent", "extract.schema", "prompt"}:
        raise JobError(f"{job.file} has changed since {job.output} was asked: {', '.join(changed)}", job.file)
    report.model, report.demonstration = job.sections.model.name, job.uses_demo
    note_engine(report, given, job, None)
    output.create()
    if not is_output_leased(output.root):
        output.remove_leftovers()
        compact_shards(output)
    documents = read_sources(output)
    plan = RecordPlan(job).with_extras(select_extra_columns(documents))
    settle_output(documents, SettleStage(plan, job.pages_per_request, before["fingerprint"]), output, tracker, job)
    write_reports(output, report)
    return report


def write_reports(output: Output, report: Report) -> None:
    """Write what a run or a settling has come to, for programs and for people. Raises RunError."""
    report.keep_last_asked(output.read_report())
    output.write_report(report.as_dict())
    write_report_page(output, report)


@dataclass
class Run:
    """The two passes over an output whose lease is held."""

    prepared: PreparedRun
    output: Output
    tracker: ProgressTracker
    lease: Lease
    note_complete: Callable[[pa.Table], None]
    """Called with the listing when it is complete, if it was not when the run began."""
    canary: Canary | None = None
    """Judges the first documents; None once they are judged, or where no trial is made."""
    gcs_address: str = ""
    """Of the cluster, once it is connected to."""
    found: int = 0
    """Documents that were listed when the tracker's total was last computed."""

    def execute(self, retry: RetryFilter | None) -> None:
        """Ask what is unanswered and write the records; again, if settling finds a damaged shard."""
        while True:
            documents = self.ask_unanswered(retry)
            job = self.prepared.job
            try:
                stage = SettleStage(self.prepared.records, job.pages_per_request, job.fingerprint)
                for is_read in (False, True):
                    compact_shards(self.output)
                    settle_output(documents, stage, self.output, self.tracker, job)
                    if is_read or not self.read_by_ocr(documents, retry):
                        return
            except DamagedShard as damage:
                self.tracker.report.damaged.append(set_aside_shard(self.output, damage))
                retry = None

    def read_by_ocr(self, documents: pa.Table, retry: RetryFilter | None) -> bool:
        """Have the pages read by OCR that the job wants; say whether there were any."""
        job, is_read = self.prepared.job, False
        if job.sections.evidence.ocr != "off":
            from pipeline.flow.ocr_pass import OcrPass

            for _ in OcrPass(job, self.output, self.tracker, self.prepared.records.schema, retry).read_pages(documents):
                self.lease.check()
                is_read = True
        return is_read

    def ask_unanswered(self, retry: RetryFilter | None) -> pa.Table:
        """Ask every request that the ledger does not have or that is retried, and return the list of sources.

        The engines are loaded once for all rounds: those that ask what is listed so far, the one that asks what is left when all is listed,
        and those after machines have gone.
        """
        asking: AskPass | None = None
        listing, rounds = self.prepared.listing, 0
        try:
            while rounds < MAX_ROUNDS:
                is_whole, found = listing.is_complete, listing.count
                state = self.read_state(retry)
                documents = self.update_sources(state, is_whole)
                to_ask = select_unanswered(self.prepared.job, documents, state)
                if is_whole and not to_ask.num_rows:
                    return documents
                if to_ask.num_rows:
                    asking, self.found = asking or self.open_ask_pass(), found
                    try:
                        self.ask(asking, to_ask, state)
                        retry = None
                    except ClusterShrunk as error:
                        emit_event("machines_gone", message=str(error))
                        asking = None
                        self.reconnect()
                if not is_whole:
                    self.await_more(found if to_ask.num_rows else 2 * found)
                rounds += is_whole
            return self.update_sources(self.read_state(None), is_whole=True)
        finally:
            if asking:
                asking.close()

    def await_more(self, enough: int) -> None:
        """Wait until more documents than these are listed, or all. Raises SourceError."""
        listing, tracker = self.prepared.listing, self.tracker
        while not self.check_run(PROGRESS_S) and listing.count <= enough:
            if tracker.phase is Phase.LISTING:
                tracker.count_found(listing.count)
            else:
                tracker.notify()
        if tracker.phase is Phase.LISTING and listing.is_complete:
            tracker.set_documents(listing.count)

    def check_run(self, timeout_s: float = 0.0) -> bool:
        """Say whether the listing is complete, and wait for that no longer than this; raise what shall end the run.

        Notes when it is complete, and until then how many documents there are.
        """
        self.lease.check()
        listing, tracker = self.prepared.listing, self.tracker
        if listing.is_complete:
            return True
        if listing.wait(timeout_s):
            self.note_complete(listing.make_table())
        tracker.is_listing = not listing.is_complete
        if tracker.documents is not None:
            tracker.documents, self.found = tracker.documents + listing.count - self.found, listing.count
        return listing.is_complete

    def read_state(self, retry: RetryFilter | None) -> LedgerState:
        """Return what the ledger says is done; a shard whose keys cannot be read is set aside."""
        return read_intact(self.output, self.tracker.report.damaged, lambda: read_ledger_state(self.output, retry))

    def update_sources(self, state: LedgerState, is_whole: bool) -> pa.Table:
        """Return the documents with what is known of them, and bring the list of sources up to date."""
        listing, identify = self.prepared.listing.make_table(), identify_documents if is_whole else identify_first_documents
        documents = read_intact(self.output, self.tracker.report.damaged, lambda: identify(self.output, listing))
        documents = forget_unopened(self.prepared.job, documents, state)
        if is_whole:
            replace_sources(self.output, documents)
        pa.default_memory_pool().release_unused()
        return documents

    def reconnect(self) -> None:
        """Connect again to the cluster that this run was connected to, and reserve what has room on its machines now."""
        job = self.prepared.job
        reservations = compute_reservations(job, connect_for_job(job, self.gcs_address))
        self.prepared = replace(self.prepared, reservations=reservations)

    def open_ask_pass(self) -> AskPass:
        """Connect to Ray, unless that was done, and start the engines."""
        from pipeline.flow.ask_pass import AskPass, Setup

        reservations = self.prepared.reservations or self.connect()
        self.gcs_address = cluster.read_gcs_address()
        judging = self.has_passed_trial, self.judge_trial
        setup = Setup(self.prepared.job, self.prepared.render, reservations, self.check_run, self.notice_loaded, *judging)
        return AskPass(setup, self.output)

    def connect(self) -> Reservations:
        """Connect to Ray for a run that had not needed it so far, and return what it reserves. Raises JobError, RunError."""
        engines.check_engine(self.prepared.given)
        self.prepared = connect_run(self.prepared, self.output, self.tracker)
        check_same_job(self.prepared.job, self.output)
        return cast(Reservations, self.prepared.reservations)

    @cached_property
    def breaker(self) -> CircuitBreaker:
        limits = self.prepared.job.sections.limits
        return CircuitBreaker(limits.max_failure_ratio, limits.min_requests)

    def ask(self, asking: AskPass, documents: pa.Table, state: LedgerState) -> None:
        """Ask what of these documents is unanswered. Whatever ends this early, the answers that have come are in the ledger."""
        limits = self.prepared.job.sections.limits
        if asking.is_loaded and self.tracker.phase is Phase.ASKING:
            self.tracker.extend_phase(documents.num_rows)
        else:
            self.tracker.enter_phase(Phase.ASKING if asking.is_loaded else Phase.LOADING_MODEL, documents.num_rows)
        is_new = not len(state.done) and not state.attempts
        trial = limits.canary if is_new and limits.canary < documents.num_rows else 0
        self.canary = Canary(limits.canary_failures) if trial else None
        with closing(asking.ask_documents(documents, state, trial)) as receipts:
            for receipt in receipts:
                emit_answer_event(receipt)
                self.tracker.add(receipt)
                if not receipt.get("rule"):  # a second answer that fails leaves the first as it is
                    self.breaker.add(receipt)
                    if self.canary:
                        self.canary.add(receipt)

    def has_passed_trial(self, documents: int) -> bool:
        """Say whether enough of the first documents of a new output are good, whatever comes of the others."""
        return self.canary is not None and self.canary.has_passed(documents)

    def judge_trial(self) -> None:
        """Raise RunError where the first documents of a new output have failed or are invalid."""
        if self.canary:
            self.canary.check(str(self.output.root))
        self.canary = None

    def notice_loaded(self) -> None:
        """Report that an engine has loaded its model."""
        if self.tracker.phase is Phase.LOADING_MODEL:
            self.tracker.change_phase(Phase.ASKING)
