"""Summary of an output for people: its shards in, counts, histograms, a time line and examples out.

Each shard is reduced to a few kilobytes as it is read: time is linear in the output, memory hardly grows with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import DamagedShard
from pipeline.evidence.match import UNWITNESSED
from pipeline.output import Output
from pipeline.output.ledger import ALERT_TYPE, CONFIDENCE_TYPE, DISAGREEMENT_TYPE, EVIDENCE_TYPE, FAILURE_TYPE, LEDGER_SCHEMA
from pipeline.output.shards import read_each_shard
from pipeline.output.sources import read_sources
from pipeline.records import REREAD, Status
from pipeline.schema.rules import RULE_TYPE, RuleResult

SUMMARY_SCHEMA = pa.schema(
    [
        ("_source", pa.string()),
        ("_status", pa.string()),
        ("_failure", FAILURE_TYPE),
        ("_partial", pa.bool_()),
        ("_disagreements", pa.list_(DISAGREEMENT_TYPE)),
        ("_rules", pa.list_(RULE_TYPE)),
        ("_corrected", pa.list_(pa.string())),
        ("_evidence", pa.list_(EVIDENCE_TYPE)),
        ("_confidence", pa.list_(CONFIDENCE_TYPE)),
        ("_alerts", pa.list_(ALERT_TYPE)),
    ]
)
"""What is read of the records."""
REQUEST_COLUMNS = "status rule first_page last_page prompt_tokens completion_tokens model engine started_at elapsed_s".split()
EXAMPLES = 3
CONFIDENCE_BINS = 20
MAX_PATHS = 500
"""Fields that are counted apart; objects with keys of a document's own could have any number."""
MAX_BUCKETS = 4096
MAX_TYPES = 8


@dataclass(frozen=True)
class Example:
    """A document, and what was found there."""

    source: str
    text: str


@dataclass
class Findings:
    """How often each thing was found, with the first examples of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def add(self, name: str, count: int, examples: Iterable[Example]) -> None:
        self.counts[name] += count
        kept = self.examples.setdefault(name, [])
        kept += list(examples)[: EXAMPLES - len(kept)]

    def merge(self, other: Findings) -> None:
        for name, count in other.counts.items():
            self.add(name, count, other.examples.get(name, []))


@dataclass
class FieldCount:
    """What is known of one field's values in all records."""

    rated: int = 0
    """Values that have a confidence."""
    confidence: float = 0.0
    """The sum of it."""
    looked_for: int = 0
    """Values that were looked for in the pages' words."""
    unwitnessed: int = 0

    def merge(self, other: FieldCount) -> None:
        self.rated += other.rated
        self.confidence += other.confidence
        self.looked_for += other.looked_for
        self.unwitnessed += other.unwitnessed


@dataclass
class RecordSummary:
    """What the records have. Names of findings: `stage/kind`, a field's path, a rule, `kind, reason` of an alert."""

    records: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    partial: int = 0
    corrected: int = 0
    failures: Findings = field(default_factory=Findings)
    disagreements: Findings = field(default_factory=Findings)
    unwitnessed: Findings = field(default_factory=Findings)
    alerts: Findings = field(default_factory=Findings)
    broken_rules: Findings = field(default_factory=Findings)
    """Rules that are broken or an error."""
    rules: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By name and result."""
    confidence: NDArray[np.int64] = field(default_factory=lambda: np.zeros(CONFIDENCE_BINS, np.int64))
    """Values by confidence, in equal steps from 0 to 1."""
    fields: dict[str, FieldCount] = field(default_factory=dict)

    def merge(self, other: RecordSummary) -> None:
        self.records += other.records
        self.partial += other.partial
        self.corrected += other.corrected
        self.statuses += other.statuses
        self.rules += other.rules
        self.confidence += other.confidence
        for name in ("failures", "disagreements", "unwitnessed", "alerts", "broken_rules"):
            getattr(self, name).merge(getattr(other, name))
        for path, count in other.fields.items():
            if path in self.fields or len(self.fields) < MAX_PATHS:
                self.fields.setdefault(path, FieldCount()).merge(count)


@dataclass
class Timeline:
    """Requests by the time of their end: in each step of `step_s` seconds that has any, pages, requests and failed requests."""

    step_s: int = 1
    steps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Unix time divided by `step_s`, ascending."""
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 3), np.int64))

    def merge(self, other: Timeline) -> None:
        """Add another time line; steps become longer where they would be more than `MAX_BUCKETS`."""
        step_s = max(self.step_s, other.step_s)
        steps = np.concatenate([one.steps * one.step_s // step_s for one in (self, other)])
        counts = np.concatenate([self.counts, other.counts])
        self.step_s, (self.steps, self.counts) = step_s, sum_steps(steps, counts)
        while len(self.steps) > MAX_BUCKETS:
            self.step_s *= 2
            self.steps, self.counts = sum_steps(self.steps // 2, self.counts)


@dataclass
class RequestSummary:
    """What the ledger has, all attempts counted."""

    statuses: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    rule_requests: int = 0
    """Requests that asked again for what broke a rule."""
    reread_requests: int = 0
    """Requests that asked where values stand, or read them again."""
    request_s: float = 0.0
    """Time that requests took, together."""
    models: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Requests by model and engine."""
    timeline: Timeline = field(default_factory=Timeline)

    def merge(self, other: RequestSummary) -> None:
        self.statuses += other.statuses
        self.models += other.models
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.rule_requests += other.rule_requests
        self.reread_requests += other.reread_requests
        self.request_s += other.request_s
        self.timeline.merge(other.timeline)


@dataclass(frozen=True)
class SourceSummary:
    """What was listed."""

    documents: int
    contents: int
    """Documents of different content, of those that were read."""
    unread: int
    pages: int
    size_bytes: int
    types: list[tuple[str, int]]
    """Documents by the ending of their names, the most frequent first; the rest is `other`."""


@dataclass(frozen=True)
class OutputSummary:
    """All that a report for people says of an output."""

    sources: SourceSummary
    requests: RequestSummary
    records: RecordSummary


def summarize_output(output: Output) -> OutputSummary:
    """Return the summary of an output; damaged shards are left out. Raises RunError when its store is unreachable."""
    requests, records = RequestSummary(), RecordSummary()
    for part in read_each_shard(output.requests, REQUEST_COLUMNS, LEDGER_SCHEMA, convert=summarize_requests):
        if not isinstance(part, DamagedShard):
            requests.merge(part)
    for found in read_each_shard(output.records, SUMMARY_SCHEMA.names, SUMMARY_SCHEMA, convert=summarize_records):
        if not isinstance(found, DamagedShard):
            records.merge(found)
    return OutputSummary(summarize_sources(read_sources(output)), requests, records)


def summarize_sources(table: pa.Table) -> SourceSummary:
    """Return what is in a list of sources."""
    names = pc.utf8_lower(pc.replace_substring_regex(table["source"], r"[?#].*$", ""))
    endings = pc.struct_field(pc.extract_regex(names, r"\.(?P<ending>[a-z0-9]{1,5})$"), "ending")
    counts = Counter({row["values"] or "none": row["counts"] for row in pc.value_counts(endings).to_pylist()})
    types = counts.most_common(MAX_TYPES)
    rest = counts.total() - sum(count for _, count in types)
    return SourceSummary(
        documents=table.num_rows,
        contents=pc.count_distinct(table["doc_id"]).as_py(),
        unread=table["doc_id"].null_count,
        pages=pc.sum(table["page_count"]).as_py() or 0,
        size_bytes=pc.sum(pc.max_element_wise(table["size_bytes"], 0)).as_py() or 0,
        types=types + ([("other", rest)] if rest else []),
    )


# ---- Ledger ---------------------------------------------------------------------------------------------------------


def summarize_requests(table: pa.Table) -> RequestSummary:
    """Return what a shard of the ledger has."""
    models = table.group_by(["model", "engine"]).aggregate([([], "count_all")]).to_pylist()
    rereads = pc.sum(pc.equal(table["rule"], REREAD)).as_py() or 0
    return RequestSummary(
        statuses=count_texts(table["status"]),
        prompt_tokens=pc.sum(table["prompt_tokens"]).as_py() or 0,
        completion_tokens=pc.sum(table["completion_tokens"]).as_py() or 0,
        rule_requests=table.num_rows - table["rule"].null_count - rereads,
        reread_requests=rereads,
        request_s=pc.sum(table["elapsed_s"]).as_py() or 0.0,
        models=Counter({(row["model"], row["engine"]): row["count_all"] for row in models if row["model"]}),
        timeline=draw_timeline(table.filter(pc.is_valid(table["started_at"]))),
    )


def draw_timeline(table: pa.Table) -> Timeline:
    """Return when these requests ended. One that failed has no pages, and one about a broken rule none that were not counted before."""
    ended_s = table["started_at"].cast(pa.int64()).to_numpy() / 1e6 + table["elapsed_s"].fill_null(0.0).to_numpy()
    has_failed = pc.equal(table["status"], str(Status.FAILED)).to_numpy().astype(np.int64)
    pages = pc.add(pc.subtract(table["last_page"], table["first_page"]), 1).fill_null(0).to_numpy()
    is_whole = pc.is_null(table["rule"]).to_numpy().astype(np.int64)
    counts = np.stack([pages * is_whole * (1 - has_failed), np.ones_like(has_failed), has_failed], axis=1).astype(np.int64)
    line = Timeline()
    line.merge(Timeline(1, *sum_steps(np.floor(ended_s).astype(np.int64), counts)))
    return line


def sum_steps(steps: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each step once, ascending, with the sums of its rows of counts."""
    distinct, places = np.unique(steps, return_inverse=True)
    sums = np.zeros((len(distinct), counts.shape[1]), np.int64)
    np.add.at(sums, places, counts)
    return distinct, sums


# ---- Records --------------------------------------------------------------------------------------------------------


def summarize_records(table: pa.Table) -> RecordSummary:
    """Return what a shard of records has."""
    table = table.combine_chunks()
    found = RecordSummary(table.num_rows, count_texts(table["_status"]))
    found.partial = pc.sum(table["_partial"]).as_py() or 0
    found.corrected = pc.sum(pc.greater(pc.list_value_length(table["_corrected"]), 0)).as_py() or 0
    failures = add_field(table["_failure"].combine_chunks(), "name", ("stage", "kind"), "/")
    collect_findings(found.failures, table["_source"], pc.indices_nonzero(pc.is_valid(table["_failure"])), failures, ["message"])

    rows, disagreements = flatten_list(table["_disagreements"])
    collect_findings(found.disagreements, table["_source"].take(rows), None, generalize_paths(disagreements), ["kept", "other"], " or ")
    rows, alerts = flatten_list(table["_alerts"])
    collect_findings(found.alerts, table["_source"].take(rows), None, add_field(alerts, "name", ("kind", "reason"), ", "), ["text"])

    rows, rules = flatten_list(table["_rules"])
    results = rules.group_by(["name", "result"]).aggregate([([], "count_all")]).to_pylist()
    found.rules = Counter({(row["name"], row["result"]): row["count_all"] for row in results})
    told = pc.indices_nonzero(pc.is_in(rules["result"], pa.array([str(RuleResult.BROKEN), str(RuleResult.ERROR)])))
    collect_findings(found.broken_rules, table["_source"].take(rows), told, rules, ["message"])

    _, certain = flatten_list(table["_confidence"])
    certain = generalize_paths(certain)
    values = certain["confidence"].to_numpy()
    found.confidence = np.histogram(values[~np.isnan(values)], CONFIDENCE_BINS, (0.0, 1.0))[0]
    for row in certain.group_by("name").aggregate([("confidence", "sum"), ("confidence", "count")]).to_pylist()[:MAX_PATHS]:
        found.fields[row["name"]] = FieldCount(rated=row["confidence_count"], confidence=row["confidence_sum"] or 0.0)

    rows, evidence = flatten_list(table["_evidence"])
    evidence = generalize_paths(evidence)
    is_unwitnessed = pc.is_in(evidence["match"], pa.array([str(match) for match in UNWITNESSED]))
    collect_findings(found.unwitnessed, table["_source"].take(rows), pc.indices_nonzero(is_unwitnessed), evidence, ["value"])
    for row in evidence.group_by("name").aggregate([([], "count_all")]).to_pylist()[:MAX_PATHS]:
        count = found.fields.setdefault(row["name"], FieldCount())
        count.looked_for, count.unwitnessed = row["count_all"], found.unwitnessed.counts[row["name"]]
    return found


def count_texts(column: pa.ChunkedArray) -> Counter[str]:
    return Counter({str(row["values"]): row["counts"] for row in pc.value_counts(column).to_pylist()})


def flatten_list(column: pa.ChunkedArray) -> tuple[pa.Array, pa.Table]:
    """Return the items of a column of lists of structs as a table, and the row of each."""
    lists = column.combine_chunks()
    return pc.list_parent_indices(lists), make_struct_table(pc.list_flatten(lists))


def make_struct_table(structs: pa.StructArray) -> pa.Table:
    return pa.Table.from_arrays(structs.flatten(), names=[one.name for one in structs.type])


def add_field(found: pa.StructArray | pa.Table, name: str, parts: tuple[str, str], between: str) -> pa.Table:
    """Return a table with one more column: two others, joined."""
    table = found if isinstance(found, pa.Table) else make_struct_table(found)
    joined = pc.binary_join_element_wise(*(table[part] for part in parts), between)
    return table.drop_columns([name] if name in table.column_names else []).append_column(name, joined)


def generalize_paths(table: pa.Table) -> pa.Table:
    """Return a table with the column `name`: its column `path` without `$.` and the numbers of items, `line_items[].amount`."""
    paths = table["path"].combine_chunks().dictionary_encode()
    names = pc.replace_substring_regex(pc.replace_substring_regex(paths.dictionary, r"\[\d+\]", "[]"), r"^\$\.?", "")
    return table.append_column("name", names.take(paths.indices))


def collect_findings(
    found: Findings, sources: pa.ChunkedArray, rows: pa.Array | None, table: pa.Table, texts: list[str], between: str = ""
) -> None:
    """Count rows of a table by their column `name`, `rows` or all of them, and keep the first of each name as examples."""
    if rows is not None:
        table, sources = table.take(rows), sources.take(rows)
    names = table["name"].combine_chunks() if isinstance(table["name"], pa.ChunkedArray) else table["name"]
    for name, count in count_texts(names).most_common(MAX_PATHS):
        places = pc.indices_nonzero(pc.equal(names, name)).slice(0, EXAMPLES).to_pylist()
        rest: Any = [between.join(str(table[text][place].as_py()) for text in texts) for place in places]
        found.add(name, count, [Example(str(sources[place].as_py()), text) for place, text in zip(places, rest, strict=True)])
