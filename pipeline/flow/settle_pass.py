"""Settle pass: ledger and listing come in, shards of records go out. It needs no model and can be repeated.

ranges of doc_ids -> those whose part of ledger or listing has changed -> settle tasks, each of which reads its part of the ledger and
writes one shard -> what is in it

A few tasks run in this process, more of them as a Ray Dataset. Which ranges have changed, `settled.json` of the output tells.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import cluster, schema
from pipeline.errors import DamagedShard
from pipeline.flow.connection import connect_for_job
from pipeline.job import Job
from pipeline.output import SHARD_SUFFIX, Output
from pipeline.output.ledger import IDENTITY_COLUMNS, iterate_requests, read_identities, read_requests
from pipeline.output.shards import encode_shard, name_shard
from pipeline.output.words import WORD_KEYS, WORDS_SCHEMA, group_words, read_ocr_words, read_word_keys
from pipeline.report import Phase, ProgressTracker
from pipeline.stages.record_plan import check_calibrated_model
from pipeline.stages.settle import SettleStage
from pipeline.storage.store import map_concurrently
from pipeline.version import __version__

DOCUMENTS_PER_SHARD = 1000
MAX_RANGES_HERE = 5
"""Up to so many ranges are settled in this process, some seconds each; Ray takes longer to start …"""
MAX_RANGES_BESIDE_RAY = 1
"""… unless it runs already."""
COUNTS_TYPE = pa.map_(pa.string(), pa.int64())
SETTLED_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("file", "sha256", "digest", "damaged", "why")),
        *((name, COUNTS_TYPE) for name in ("statuses", "failures")),
        ("documents", pa.int64()),
        ("partial", pa.int64()),
        ("disagreements", pa.int64()),
        ("unwitnessed", pa.int64()),
        ("alerts", pa.int64()),
        ("missing", pa.list_(pa.string())),
    ]
)
NO_WORDS = WORDS_SCHEMA.empty_table()
Counts = list[tuple[str, int]]


class SettledRow(TypedDict):
    """What a settle task returns: the shard that it wrote, or the shard of the ledger that it could not read."""

    file: str | None
    sha256: str | None
    """Of the shard's bytes."""
    digest: str | None
    """Of everything from which the shard was made."""
    damaged: str | None
    why: str | None
    statuses: Counts | None
    failures: Counts | None
    """Records without a valid result, by `stage/kind`."""
    documents: int | None
    """Documents with a record."""
    partial: int | None
    """Records that lack pages."""
    disagreements: int | None
    """Records whose requests read different values."""
    unwitnessed: int | None
    """Records with values that no witness shows."""
    alerts: int | None
    """Records with alerts."""
    missing: list[str] | None
    """Sources without a record."""


@dataclass(frozen=True)
class SettleTask:
    """What settle tasks share."""

    stage: SettleStage
    output: Output
    settings: str
    """All that decides a record beside its documents and their requests."""
    listed: dict[str, int]
    """The ledger's shards and their sizes."""

    def settle_range(self, documents: pa.Table) -> SettledRow:
        """Write the records of one range of documents as one shard. A damaged shard of the ledger is a row."""
        try:
            requests = read_requests(self.output, documents["doc_id"], with_tokens=True, listed=self.listed)
            words = read_ocr_words(self.output, documents["doc_id"]) if self.stage.plan.uses_ocr else NO_WORDS
        except DamagedShard as damage:
            return make_settled_row(damaged=damage.file, why=damage.reason)
        records = self.stage.build_table(documents.to_pylist(), iterate_requests(requests), group_words(words.to_pylist()))
        sources = records["_source"].to_pylist()
        file, content = name_shard(f"{name}/{row}" for row, name in enumerate(sources)), encode_shard(records)
        self.output.records.put(file, content)
        failures = (f"{f['stage']}/{f['kind']}" for f in records["_failure"].to_pylist() if f)
        return make_settled_row(
            file=file,
            sha256=hashlib.sha256(content).hexdigest(),
            digest=compute_range_digest(self.settings, documents, requests, words),
            statuses=count_sorted(records["_status"].to_pylist()),
            failures=count_sorted(failures),
            documents=len({*sources}),
            partial=sum(1 for is_partial in records["_partial"].to_pylist() if is_partial),
            disagreements=sum(1 for disagreements in records["_disagreements"].to_pylist() if disagreements),
            unwitnessed=sum(1 for count in records["_unwitnessed"].to_pylist() if count),
            alerts=sum(1 for alerts in records["_alerts"].to_pylist() if alerts),
            missing=sorted({*documents["source"].to_pylist()} - {*sources}),
        )

    def find_settled(self, documents: pa.Table, before: dict[str, SettledRow]) -> SettledRow | None:
        """Return the row of an earlier pass that made the records of this range from the same, if its shard is as it was written."""
        try:
            words = read_word_keys(self.output, documents["doc_id"]) if self.stage.plan.uses_ocr else NO_WORDS
            identities = read_identities(self.output, documents["doc_id"], self.listed)
            digest = compute_range_digest(self.settings, documents, identities, words)
            row = before.get(digest)
            content = self.output.records.read(str(row["file"])) if row else b""
        except (DamagedShard, OSError):
            return None  # settling it again says what is wrong, or puts it right
        return row if row and hashlib.sha256(content).hexdigest() == row["sha256"] else None


def settle_output(documents: pa.Table, stage: SettleStage, output: Output, tracker: ProgressTracker, job: Job) -> None:
    """Write the records of every document, shard by shard, and count them in the tracker's report.

    A shard holds the documents of one range of doc_ids, so that its task reads a range of a sorted ledger; one whose documents and
    requests are as they were stays. Raises DamagedShard where the ledger cannot be read, RunError where settling fails.
    """
    check_calibrated_model(stage.plan.calibration, job)
    tracker.enter_phase(Phase.SETTLING, documents.num_rows)
    documents = documents.combine_chunks()  # `take` would do so again for each range
    order = pc.sort_indices(documents, sort_keys=[("doc_id", "ascending"), ("source", "ascending")])
    ranges = [order.slice(start, DOCUMENTS_PER_SHARD) for start in range(0, documents.num_rows, DOCUMENTS_PER_SHARD)]
    task = SettleTask(stage, output, describe_settings(job, stage), output.requests.list_names(SHARD_SUFFIX))
    before = {str(row.get("digest")): cast(SettledRow, row) for row in output.read_settled()}
    found = map_concurrently(lambda some: task.find_settled(documents.take(some), before), ranges) if before else [None] * len(ranges)
    rows = [row for row in found if row]
    changed = [documents.take(some) for some, row in zip(ranges, found, strict=True) if row is None]
    tracker.add_settled(documents.num_rows - sum(some.num_rows for some in changed))
    most_here = MAX_RANGES_BESIDE_RAY if cluster.is_ray_connected() else MAX_RANGES_HERE
    settle_all = settle_here if len(changed) <= most_here else settle_on_ray
    for row in settle_all(changed, task, job, tracker):
        rows.append(row)
        tracker.add_settled(row["documents"] or 0)
    for row in rows:
        if row["damaged"]:
            raise DamagedShard(row["damaged"], row["why"] or "")
    output.remove_other_records({row["file"] for row in rows if row["file"]})
    output.write_settled(cast(list[dict[str, Any]], sorted(rows, key=lambda row: str(row["file"]))))
    report = tracker.report
    report.count_records(*(sum_counts(row[name] for row in rows).elements() for name in ("statuses", "failures")))
    report.partial = sum(row["partial"] or 0 for row in rows)
    report.disagreements = sum(row["disagreements"] or 0 for row in rows)
    report.unwitnessed = sum(row["unwitnessed"] or 0 for row in rows)
    report.alerts = sum(row["alerts"] or 0 for row in rows)
    report.documents = documents.num_rows
    report.missing = sorted(name for row in rows for name in row["missing"] or [])


def settle_here(ranges: list[pa.Table], task: SettleTask, job: Job, tracker: ProgressTracker) -> Iterator[SettledRow]:
    """Yield what settling each range in this process gives."""
    yield from map(task.settle_range, ranges)


def settle_on_ray(ranges: list[pa.Table], task: SettleTask, job: Job, tracker: ProgressTracker) -> Iterator[SettledRow]:
    """Yield what settling each range in a task of Ray gives. Connects to Ray, unless that was done. Raises RunError."""
    if not cluster.is_ray_connected():
        phase = tracker.phase, tracker.documents, tracker.documents_done
        tracker.change_phase(Phase.STARTING_RAY)
        connect_for_job(job)
        tracker.enter_phase(*phase[:2])
        tracker.add_settled(phase[2])
    import ray.data
    from ray.exceptions import RayError

    settled = ray.data.from_blocks(ranges).map_batches(cast(Any, run_settle_task), batch_size=None, batch_format="pyarrow", fn_args=(task,))
    try:
        for block in settled.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from cast(list[SettledRow], cast(pa.Table, block).to_pylist())
    except RayError as error:
        raise cluster.convert_worker_error(error, "settling stopped: {}; nothing asked is lost: run pipeline settle") from None


def run_settle_task(documents: pa.Table, task: SettleTask) -> pa.Table:
    """Settle task of Ray: the documents of one range -> what its shard has."""
    return pa.Table.from_pylist([task.settle_range(documents)], SETTLED_SCHEMA)


def describe_settings(job: Job, stage: SettleStage) -> str:
    """Return all that decides a record beside its documents and their requests."""
    sections = job.sections.model_dump(mode="json", include={"extract", "evidence", "limits", "pages"})
    versions = [__version__, pa.__version__, stage.plan.calibration.digest if stage.plan.calibration else ""]
    return schema.dump_json([versions, sections, job.schema, str(stage.plan.schema), stage.per_request, stage.fingerprint])


def compute_range_digest(settings: str, documents: pa.Table, requests: pa.Table, words: pa.Table) -> str:
    """Return the SHA-256 of all that a range's records are made of; a row that a ledger has twice counts once."""
    identities = requests.select(IDENTITY_COLUMNS).to_pylist() + words.select(WORD_KEYS).to_pylist()
    parts = [settings, str(documents.schema), str(documents.to_pylist()), *sorted({str(row) for row in identities})]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def make_settled_row(**found: Any) -> SettledRow:
    """Return a row in which the fields not given are null."""
    return cast(SettledRow, dict.fromkeys(SETTLED_SCHEMA.names) | found)


def count_sorted(values: Iterable[str]) -> Counts:
    """Return how often each value occurs, in the order of the values."""
    return sorted(Counter(values).items())


def sum_counts(found: Iterable[Counts | None]) -> Counter[str]:
    """Return the sums of counts."""
    total: Counter[str] = Counter()
    for counts in found:
        total.update(dict(counts or []))
    return total
