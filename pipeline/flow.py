"""A job -> its output folder, in two passes over Ray Data.

    ask      sources -> requests -> engine actors -> rows of the ledger, written while they come
    settle   ledger and sources -> typed records, without a model

Knows what follows what; each step's work is done in another room.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.exceptions import RayError

from pipeline import cluster, engines, sink, source
from pipeline.budget import RenderSettings
from pipeline.errors import JobError, RunError, SourceError
from pipeline.job import Job, differences
from pipeline.report import Counted, OnProgress, Report
from pipeline.settle import SettleStage
from pipeline.sink import IDENTITY, LEDGER, Ledger, Output
from pipeline.stages import AskStage, RenderStage, Row, document_keys, render_settings

RENDERED = pa.schema(
    [
        *IDENTITY,
        *(LEDGER.field(n) for n in ("key", "first_page", "last_page", "status", "failure", "pages")),
        ("pixels", pa.list_(pa.binary())),
    ]
)
ANSWERED = pa.schema([*IDENTITY, *(field for field in LEDGER if field.name not in IDENTITY.names)])
DOCUMENTS_PER_TASK = 16
DOCUMENTS_PER_SHARD = 1000
BLOCK_BYTES = 32 * 2**20
"""How much a task gathers before the next step sees it: three full requests, so that the first answers come soon."""
BATCHES_IN_FLIGHT = 8
RAISED = re.compile(r"^((?:\w+\.)*)([A-Z]\w*): (.+)$", re.MULTILINE)
"""The line of a traceback that says what was raised."""
LIBRARIES = ("pipeline", "ray", "torch", "transformers", "pymupdf", "pyarrow", "llguidance", "jsonschema")


def run(job: Job, limit: int | None = None, on_progress: OnProgress | None = None, on_demo: Callable[[str], None] | None = None) -> Report:
    """Ask what has not been asked yet, settle everything, and return what became of it.

    `limit` takes the first so many documents of the listing; `on_demo` is told the model's name when the demonstration
    model takes its place. Raises JobError before anything has started, RunError when the run cannot go on; running it
    again resumes it.
    """
    started = time.monotonic()
    listing = found(job)
    render_settings(job)  # these three refuse a missing password, clashing columns or an impossible schema before Ray starts
    SettleStage(job, extras_of(listing))
    engines.check(job)
    resources = connect()
    wanted, job = job, engines.choose(job, resources.gpus)
    check_room(job, resources)
    if job.uses_demo and not wanted.uses_demo and on_demo:
        on_demo(wanted.sections.model.name)
    output = Output(job.output)
    begin(job, output)
    documents = identify(output, listing if limit is None else first(listing, limit, output))
    sink.replace_sources(output, documents)
    to_ask = unasked(job, output, documents)
    report = Report(job.sections.name, str(job.output), job.sections.model.name, job.uses_demo)
    if to_ask.num_rows:
        ask(job, output, to_ask, resources, report, on_progress or (lambda _: None))
        sink.replace_sources(output, identify(output, documents.drop(["doc_id", "page_count"])))
    settle_into(job, output, report)
    report.elapsed_s = round(time.monotonic() - started, 3)
    output.write_report(report.as_dict())
    return report


def settle(job: Job) -> Report:
    """Write the records again from the ledger, with the job's schema as it is now; asks nothing."""
    output = Output(job.output)
    before = output.read_job()
    if before is None:
        raise JobError(f"there is nothing to settle in {job.output}: run the job first")
    connect()
    job = job.with_demo() if before["job"]["model"]["name"] == "demo" else job
    if set(changed := differences(before["asked"], job.asked)) - {"extract.schema", "prompt"}:
        raise JobError(f"{job.file} has changed since {job.output} was asked: {', '.join(changed)}")
    output.prepare()
    report = Report(job.sections.name, str(job.output), job.sections.model.name, job.uses_demo)
    settle_into(job, output, report, before["fingerprint"])
    output.write_report(report.as_dict())
    return report


def connect() -> cluster.Resources:
    """Connect to Ray and keep Ray Data from talking over the command line's own words."""
    resources = cluster.connect()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return resources


def begin(job: Job, output: Output) -> None:
    """Make the folder ready; refuse one that was asked something else."""
    before = output.read_job()
    if before is not None and before["fingerprint"] != job.fingerprint:
        changed = ", ".join(differences(before["asked"], job.asked))
        raise JobError(
            f"{job.output} holds answers to another job: {changed} changed since; restore that, or choose another output with --output"
        )
    output.prepare()
    versions = {name: version(name) for name in LIBRARIES}
    output.write_job({"job": job.resolved(), "fingerprint": job.fingerprint, "asked": job.asked, "versions": versions})


def found(job: Job) -> pa.Table:
    """Return the job's documents; what an earlier run wrote into an output folder among them is none.

    Raises JobError, and SourceError when there is none at all.
    """
    listing = source.find(job.sections.source.paths, job.file.parent, allow_outside=job.sections.source.allow_outside)
    own = source.name_of(os.path.realpath(job.output), os.path.realpath(job.file.parent)) + "/"
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


def unasked(job: Job, output: Output, documents: pa.Table) -> pa.Table:
    """Return the documents that have a request the ledger does not know."""
    done = set(sink.read_shards(output.requests, ["key"], LEDGER)["key"].to_pylist())
    rows = documents.select(IDENTITY.names).to_pylist()
    keep = [row["page_count"] is None or not done.issuperset(document_keys(row, job.pages_per_request, job.fingerprint)) for row in rows]
    return documents.filter(pa.array(keep, pa.bool_()))


@ray.remote(num_cpus=0)
class Claims:
    """Who asks what: a request that is done is not asked again, and of two files of the same bytes only one is asked."""

    def __init__(self, done: list[str]) -> None:
        self.done, self.owners = set(done), dict[str, str]()

    def claim(self, identity: str, source: str, keys: list[str]) -> list[str]:
        if self.owners.setdefault(identity, source) != source:
            return []
        return [key for key in keys if key not in self.done]


@dataclass(frozen=True)
class Rendering:
    """What a render task needs to know; equal ones share a renderer within a worker process."""

    settings: RenderSettings
    root: Path
    per_request: int
    fingerprint: str


@lru_cache(maxsize=1)
def renderer(rendering: Rendering, claims: Any) -> RenderStage:
    """Return this worker's renderer, so that its sandbox outlives a task."""

    def claim(identity: str, source: str, keys: list[str]) -> list[str]:
        wanted: list[str] = ray.get(claims.claim.remote(identity, source, keys))
        return wanted

    return RenderStage(rendering.settings, rendering.root, rendering.per_request, rendering.fingerprint, claim)


def render_documents(batch: pa.Table, rendering: Rendering, claims: Any) -> Iterator[pa.Table]:
    """The render task: documents -> requests, streamed one by one."""
    stage = renderer(rendering, claims)
    for document in batch.to_pylist():
        for row in stage(document):
            yield pa.Table.from_pylist([row], RENDERED)


class Asker:
    """The engine actor: loads the model once, answers requests as they come."""

    def __init__(self, job: Job, threads: int) -> None:
        self.stage = AskStage(job, engines.load(job, threads))

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        async for row in self.stage(batch.to_pylist()):
            yield pa.Table.from_pylist([row], ANSWERED)


def ask(job: Job, output: Output, documents: pa.Table, resources: cluster.Resources, report: Report, on_progress: OnProgress) -> None:
    """Ask every request of these documents, write the answers to the ledger as they come, and count them in the report."""
    done = sink.read_shards(output.requests, ["key"], LEDGER)["key"].to_pylist()
    claims = Claims.remote(done)  # type: ignore[attr-defined]
    rendering = Rendering(render_settings(job), job.file.parent, job.pages_per_request, job.fingerprint)
    counted = Counted(documents.num_rows, report, on_progress)
    try:
        with Ledger(output) as ledger:
            for row in rows_of(answers(job, requests(rendering, claims, documents, resources), resources)):
                ledger.add(row)
                counted.add(row)
    except BaseException as error:
        ray.shutdown()  # with it go the actors, for whose CPUs the next run in this process would wait
        if isinstance(error, RayError):
            raise stopped(error, "the run stopped: {}; run the same command again to resume it") from error
        raise


def requests(rendering: Rendering, claims: Any, documents: pa.Table, resources: cluster.Resources) -> ray.data.Dataset:
    """Return the documents' requests, rendered in tasks of their own.

    Half a CPU each where the engine shares the processor with them: unlike the engine's, so that Ray does not fuse the two
    steps and a renderer that dies takes no model with it.
    """
    listed = documents.select(["source", "size_bytes", "version"])
    blocks = [listed.slice(start, DOCUMENTS_PER_TASK).combine_chunks() for start in range(0, listed.num_rows, DOCUMENTS_PER_TASK)]
    step: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "num_cpus": renderer_cpus(resources)}
    return ray.data.from_arrow(blocks).map_batches(cast(Any, render_documents), fn_args=(rendering, claims), **step)


def answers(job: Job, asked: ray.data.Dataset, resources: cluster.Resources) -> ray.data.Dataset:
    """Return the requests' answers; an actor takes the next batches while the engine works on the last."""
    cpus = actor_cpus(job, resources)
    pool = ray.data.ActorPoolStrategy(
        size=job.sections.ray.actors,
        max_tasks_in_flight_per_actor=BATCHES_IN_FLIGHT,
        max_concurrent_calls_per_actor=BATCHES_IN_FLIGHT,
    )
    return asked.map_batches(
        cast(Any, Asker),
        batch_size=job.sections.model.batch_size,
        batch_format="pyarrow",
        fn_constructor_args=(job, max(1, int(cpus))),
        num_cpus=cpus,
        num_gpus=job.sections.ray.gpus_per_actor if resources.gpus else 0,
        compute=pool,
    )


def rows_of(dataset: ray.data.Dataset) -> Iterator[Row]:
    """Yield a dataset's rows as they come."""
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from cast(pa.Table, block).to_pylist()


def actor_cpus(job: Job, resources: cluster.Resources) -> float:
    """Return the CPUs of an engine actor: one beside a GPU; without one, all but what rendering needs, shared out."""
    if job.sections.ray.cpus_per_actor:
        return job.sections.ray.cpus_per_actor
    spare = resources.cpus - max(1.0, resources.cpus / 8) if resources.cpus > 1 else resources.cpus / 2
    share = spare / job.sections.ray.actors
    return 1.0 if resources.gpus else share // 1 or share


def check_room(job: Job, resources: cluster.Resources) -> None:
    """Raise JobError when the engine's actors and one renderer do not fit: Ray would wait for room without end."""
    actors, gpus = job.sections.ray.actors, job.sections.ray.gpus_per_actor if resources.gpus else 0
    cpus = actor_cpus(job, resources)
    if actors * gpus > resources.gpus or actors * cpus + renderer_cpus(resources) > resources.cpus:
        raise JobError(
            f"{job.file}: ray.actors is {actors}, each with {cpus:g} CPUs and {gpus:g} GPUs, beside {renderer_cpus(resources):g} CPUs "
            f"for rendering; there are {resources.cpus:g} CPUs and {resources.gpus:g} GPUs"
        )


def renderer_cpus(resources: cluster.Resources) -> float:
    return 1.0 if resources.gpus else 0.5


def stopped(error: RayError, sentence: str) -> RunError:
    """Return what a worker raised as the end of this run: its message, or a sentence about it with its traceback as the cause.

    Of a worker's exception only the text comes over from its process.
    """
    text = str(error).partition("\nThe above exception was the direct cause")[0].strip()
    module, name, message = (RAISED.findall(text) or [("", "", text.partition("\n")[0])])[-1]
    if module == "pipeline.errors.":
        return RunError(message)
    broken = RunError(sentence.format(f"{name}: {message}".removeprefix(": ")[:300]))
    broken.__cause__ = RayError(text)
    return broken


SETTLED = pa.schema(
    [("file", pa.string()), ("sources", pa.list_(pa.string())), ("statuses", pa.list_(pa.string())), ("failures", pa.list_(pa.string()))]
)


def settle_into(job: Job, output: Output, report: Report, fingerprint: str | None = None) -> None:
    """Write the records of every source listed, shard by shard, and count them in the report.

    A shard holds the documents of one range of doc_ids, so that its task reads a range of a sorted ledger.
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
        raise stopped(error, "settling stopped: {}; nothing asked is lost: run pipeline settle") from None
    output.keep_records({row["file"] for row in rows})
    report.settled([s for row in rows for s in row["statuses"]], [f for row in rows for f in row["failures"]])
    seen = {name for row in rows for name in row["sources"]}
    report.documents = documents.num_rows
    report.missing = sorted(set(documents["source"].to_pylist()) - seen)


def settle_shard(documents: pa.Table, stage: SettleStage, output: Output) -> pa.Table:
    """The settle task: the documents of one range -> one shard of records."""
    requests = sink.read_requests(output, documents["doc_id"])
    records = stage.table(documents.to_pylist(), requests.to_pylist())
    sources = records["_source"].to_pylist()
    file = sink.write_shard(output.records, records, [f"{name}/{row}" for row, name in enumerate(sources)])
    failures = [f"{f['stage']}/{f['kind']}" for f in records["_failure"].to_pylist() if f]
    row = {"file": file.name, "sources": sources, "statuses": records["_status"].to_pylist(), "failures": failures}
    return pa.Table.from_pylist([row], SETTLED)
