"""Run report: counts ledger rows as they come, and decides the exit code and whether a failing run goes on."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any

from pipeline.errors import RunError
from pipeline.records import REREAD, ReceiptRow, Stage

if TYPE_CHECKING:
    import pandas as pd


class ExitCode(IntEnum):
    """Exit code of a command."""

    OK = 0
    DOCUMENTS_FAILED = 1
    """Every document has its row; some are failed or invalid."""
    JOB_WRONG = 2
    """Nothing was started."""
    RUN_BROKEN = 3
    """The run could not go on; the same command resumes it."""
    INTERRUPTED = 130
    """Ctrl-C; the same command resumes the run."""
    TERMINATED = 143
    """SIGTERM; the same command resumes the run."""


LAST_ASKED = ("requests_asked", "pages_asked", "elapsed_s", "pages_per_s", "requests_in_flight", "engine_busy_share")
"""What is kept of the last run that asked anything."""
PENDING_FAILURE = "settle/pending"
"""Failure kind of a record whose requests are not all answered yet."""


class Phase(StrEnum):
    """What a run is doing, in this order."""

    LISTING = "listing"
    STARTING_RAY = "starting Ray"
    LOADING_MODEL = "loading the model"
    ASKING = "asking"
    SETTLING = "settling"
    READING = "reading by OCR"
    """Between two settlings, where `evidence.ocr` is not off."""


ENOUGH_DOCUMENTS = 50
"""Documents after which the time that is left is estimated, or one in a hundred of fewer than 5,000."""


@dataclass(frozen=True)
class Progress:
    """How far a phase of a run has come."""

    phase: Phase
    documents: int | None
    """Documents of this phase; None while nothing but listing is done."""
    documents_done: int
    """Documents that the phase has got through; while it lists, those found so far."""
    pages_done: int
    requests_done: int
    failed: int
    """Requests that failed."""
    elapsed_s: float
    """Since this phase began."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Failed requests by `stage/kind`."""
    engine_busy_share: float | None = None
    """Share of the engines' time since they loaded in which they had a request, as of their last answers."""
    is_listing: bool = False
    """Documents are still being found: `documents` is how many there are so far."""

    @property
    def remaining_s(self) -> float | None:
        """Time that the phase still takes if the other documents are like those that are done; None while these are too few to say, or
        documents are still being found."""
        if self.is_listing or not self.documents or self.elapsed_s < 1:
            return None
        if self.documents_done < min(ENOUGH_DOCUMENTS, max(1, self.documents / 100)):
            return None
        return self.elapsed_s * max(0, self.documents - self.documents_done) / self.documents_done

    @property
    def pages_per_s(self) -> float:
        """0 in the first second: the first answers may come before the phase has begun."""
        return self.pages_done / self.elapsed_s if self.elapsed_s >= 1 else 0.0


@dataclass
class Report:
    """Result of a run or of settling: what `report.json` holds."""

    job: str
    output: str
    model: str
    demonstration: bool
    """The demonstration model answered in place of the job's own."""
    engine: str = ""
    engine_reason: str = ""
    """Why it is this engine, as a clause: what `model.engine: auto` was decided by."""
    documents: int = 0
    records: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    """Records without a valid result, by `stage/kind`."""
    partial: int = 0
    """Records that lack pages which could not be drawn."""
    disagreements: int = 0
    """Records whose requests read different values."""
    unwitnessed: int = 0
    """Records with values that no witness shows."""
    alerts: int = 0
    """Records with alerts: hidden text, values that only hidden text shows, text that differs from what is drawn."""
    ocr_pages: int = 0
    """Pages that OCR read in this run."""
    ocr_failed: int = 0
    """Pages that OCR should have read in this run and could not; their values have no witness of it, and nothing else is lost."""
    ocr_problem: str = ""
    """Why the first of them could not be read; empty if all were."""
    missing: list[str] = field(default_factory=list)
    """Sources without a record: always a defect of this package."""
    damaged: list[str] = field(default_factory=list)
    """Damaged shards that were set aside; their requests were asked again."""
    requests: dict[str, int] = field(default_factory=dict)
    """Requests completed in this run, by status."""
    requests_asked: int = 0
    """Requests that an engine answered in this run."""
    rule_requests: int = 0
    """Those of them that asked again for the fields of a broken rule; no other count by status has them."""
    reread_requests: int = 0
    """Those of them that asked where values stand, or read them again (`evidence.model`); no count by status has them either."""
    pages_asked: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    elapsed_s: float = 0.0
    requests_in_flight: float | None = None
    """Mean number of requests at the engines, from the start of the first to the end of the last."""
    engine_busy_share: float | None = None
    """Share of the engines' time, from loaded to last answer, in which they had a request."""
    last_asked: dict[str, float | None] = field(default_factory=dict)
    """These figures (`LAST_ASKED`) of the last run that asked anything: this one, or an earlier one of the same output."""

    @property
    def exit_code(self) -> ExitCode:
        if self.missing or PENDING_FAILURE in self.failures:
            return ExitCode.RUN_BROKEN
        return ExitCode.DOCUMENTS_FAILED if self.failures or self.partial else ExitCode.OK

    @property
    def pages_per_s(self) -> float:
        return self.pages_asked / self.elapsed_s if self.elapsed_s > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the content of `report.json` and of `--json`."""
        return {**asdict(self), "pages_per_s": round(self.pages_per_s, 3), "exit_code": int(self.exit_code)}

    def keep_last_asked(self, before: Mapping[str, Any]) -> None:
        """Note what this run asked, or, if nothing, what the last one that did asked; `before` is what `report.json` held until now."""
        asked = self.as_dict() if self.requests_asked else before.get("last_asked") or before  # 0.1.0 wrote no `last_asked`
        self.last_asked = {name: asked.get(name) for name in LAST_ASKED} if asked.get("requests_asked") else {}

    def to_pandas(self, explode: str | None = None) -> pd.DataFrame:
        """Return the records of the output as a DataFrame, with a row for each item of an array if `explode` names one: `pipeline.read`."""
        import pipeline

        return pipeline.read(self.output, explode)

    def count_records(self, statuses: Iterable[str], failures: Iterable[str]) -> None:
        """Count the records."""
        self.statuses, self.failures = (dict(sorted(Counter(found).items())) for found in (statuses, failures))
        self.records = sum(self.statuses.values())


OnProgress = Callable[[Progress], None]


class ProgressTracker:
    """Counts ledger rows into the report and reports progress: at each change of phase and after each row."""

    def __init__(self, report: Report, on_progress: OnProgress) -> None:
        self.report, self.on_progress = report, on_progress
        self.phase, self.phase_started_s = Phase.LISTING, time.monotonic()
        self.documents: int | None = None
        self.documents_done = 0
        self.failures: Counter[str] = Counter()
        self.is_listing = False
        self.pages_left: dict[str, int] = {}
        self.engine_times: dict[str, tuple[float, float]] = {}
        """Seconds loaded and seconds busy of each engine, by its own count."""
        self.answering_s, self.first_start_s, self.last_end_s = 0.0, float("inf"), 0.0

    def enter_phase(self, phase: Phase, documents: int | None = None) -> None:
        """Begin a phase over this many documents, of which none is done."""
        self.phase, self.phase_started_s = phase, time.monotonic()
        self.documents, self.documents_done = documents, 0
        self.pages_left = {}
        self.notify()

    def change_phase(self, phase: Phase) -> None:
        """Begin a phase that goes on with the documents of the current one."""
        self.phase, self.phase_started_s = phase, time.monotonic()
        self.notify()

    def count_found(self, documents: int) -> None:
        """Set the number of documents that the listing has so far."""
        self.documents_done = documents
        self.notify()

    def set_documents(self, documents: int) -> None:
        """Set the number of documents of the current phase, of which none is done."""
        self.documents, self.documents_done = documents, 0
        self.notify()

    def extend_phase(self, documents: int) -> None:
        """Go on with so many more documents, beside those that are done."""
        self.documents = self.documents_done + documents
        self.notify()

    def add_settled(self, documents: int) -> None:
        """Count documents whose records are written, or whose pages are read by OCR."""
        self.documents_done += documents
        self.notify()

    def add(self, row: ReceiptRow) -> None:
        """Count a row: a completed request, or a document that needed none (its key is None)."""
        report = self.report
        self.record_engine(row)
        report.requests_asked += bool(row.get("asks"))
        report.pages_asked += row.get("pages_shown", 0)
        report.prompt_tokens += row.get("prompt_tokens") or 0
        report.completion_tokens += row.get("completion_tokens") or 0
        if rule := row.get("rule"):  # beside the request whose answer broke it, which is counted itself
            report.reread_requests += rule == REREAD
            report.rule_requests += rule != REREAD
            return
        if row["key"]:
            report.requests[row["status"]] = report.requests.get(row["status"], 0) + 1
        if row.get("status") == "failed" and (failure := row.get("failure")):
            self.failures[f"{failure['stage']}/{failure['kind']}"] += 1
        pages = row["last_page"] - row["first_page"] + 1 if row["key"] and row["last_page"] else 0
        left = self.pages_left.get(row["source"], row["page_count"] or 0) - pages
        self.pages_left[row["source"]] = left
        if left <= 0 or not row["key"]:
            self.documents_done += 1
            del self.pages_left[row["source"]]
        self.notify()

    def record_engine(self, row: ReceiptRow) -> None:
        """Take note of how long the engine of this row has been loaded and busy, and of when the request was there."""
        if actor := row.get("actor"):
            self.engine_times[actor] = max(self.engine_times.get(actor, (0.0, 0.0)), (row["alive_s"], row["busy_s"]))
        if started_at := row.get("started_at"):
            start_s, elapsed_s = started_at.timestamp(), row["elapsed_s"] or 0.0
            self.answering_s += elapsed_s
            self.first_start_s, self.last_end_s = min(self.first_start_s, start_s), max(self.last_end_s, start_s + elapsed_s)

    def finish(self) -> None:
        """Write into the report how the engines were used."""
        self.report.engine_busy_share = self.compute_busy_share()
        span_s = self.last_end_s - self.first_start_s
        self.report.requests_in_flight = round(self.answering_s / span_s, 1) if span_s > 0 else None

    def compute_busy_share(self) -> float | None:
        """Return the share of the engines' time in which they had a request."""
        loaded_s, busy_s = (sum(times) for times in zip((0.0, 0.0), *self.engine_times.values(), strict=True))
        return round(busy_s / loaded_s, 3) if loaded_s else None

    def notify(self) -> None:
        report, elapsed_s = self.report, time.monotonic() - self.phase_started_s
        counts = (report.pages_asked, report.requests_asked, self.failures.total())
        about = (dict(self.failures), self.compute_busy_share(), self.is_listing)
        self.on_progress(Progress(self.phase, self.documents, self.documents_done, *counts, elapsed_s, *about))


class CircuitBreaker:
    """Stops a run when too large a share of the latest requests failed."""

    WINDOW = 1000
    """Requests that count: a run of days must notice what broke in its last hour."""

    def __init__(self, max_ratio: float, min_requests: int) -> None:
        self.max_ratio, self.min_requests = max_ratio, min_requests
        self.kinds: deque[str | None] = deque(maxlen=self.WINDOW)

    def add(self, row: ReceiptRow) -> None:
        """Count a request. Raises RunError when more of the latest ones failed than allowed."""
        if row["key"] is None:
            return
        has_failed = row.get("status") == "failed" and not is_demo_refusal(row)
        self.kinds.append(describe_failure(row) if has_failed else None)
        if not has_failed or len(self.kinds) < self.min_requests:
            return
        failed = [kind for kind in self.kinds if kind]
        if len(failed) > self.max_ratio * len(self.kinds):
            raise RunError(
                f"the run stopped: {len(failed)} of the last {len(self.kinds)} requests failed, `limits.max_failure_ratio` allows "
                f"{self.max_ratio:g}; the last said {failed[-1]}. The same command resumes; --retry failed asks the failed ones again"
            )


class Canary:
    """Judges the first documents of a run on a new output: a wrong schema or prompt fails nearly all of them."""

    def __init__(self, max_ratio: float) -> None:
        self.max_ratio = max_ratio
        self.outcomes: dict[str, str | None] = {}
        """What is wrong with each document that reached a model; None where nothing is."""
        self.pages_left: dict[str, int] = {}
        """Pages of each of them whose requests have not come yet."""

    def add(self, row: ReceiptRow) -> None:
        """Count a request. Files that cannot be read, and those that the demonstration model refuses, did not reach a model."""
        if row["key"] is None or is_demo_refusal(row):
            return
        pages = row["last_page"] - row["first_page"] + 1
        self.pages_left[row["source"]] = self.pages_left.get(row["source"], row["page_count"] or 0) - pages
        failure = row.get("failure")
        if failure is None:
            self.outcomes.setdefault(row["source"])
        elif failure["stage"] not in (Stage.SOURCE, Stage.RENDER):
            self.outcomes[row["source"]] = describe_failure(row)

    def has_passed(self, documents: int) -> bool:
        """Say whether so many of these documents are good that it does not matter what comes of the others."""
        good = sum(wrong is None and self.pages_left[source] <= 0 for source, wrong in self.outcomes.items())
        return documents - good <= self.max_ratio * documents

    def check(self, output: str) -> None:
        """Raise RunError when more of the documents failed or are invalid than allowed."""
        bad = [wrong for wrong in self.outcomes.values() if wrong]
        if len(bad) <= self.max_ratio * len(self.outcomes):
            return
        raise RunError(
            f"the run stopped after its first documents: {len(bad)} of the {len(self.outcomes)} that reached the model failed or are "
            f"invalid, `limits.canary_failures` allows {self.max_ratio:g}; {Counter(bad).most_common(1)[0][0]}. Their answers are kept in "
            f"{output} (`pipeline settle` writes their records). Correct the job and choose another output with --output, or run the same "
            "command again: it goes on with all documents"
        )


def is_demo_refusal(row: ReceiptRow) -> bool:
    """Say whether the demonstration model was not asked about a document, because it is none of its samples."""
    failure = row.get("failure")
    return failure is not None and (failure["stage"], failure["kind"]) == (Stage.GENERATE, "demo")


def describe_failure(row: ReceiptRow) -> str:
    """Return a row's failure as `stage/kind: message`; "" if it has none."""
    failure = row.get("failure")
    return f"{failure['stage']}/{failure['kind']}: {failure['message']}" if failure else ""
