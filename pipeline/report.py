"""What a run did -> counts, reconciliation and the exit code. Knows no row, no file and no screen."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any

from pipeline.errors import RunError


class ExitCode(IntEnum):
    """What the shell is told."""

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


PENDING_FAILURE = "settle/pending"
"""How the failure of a record is counted that waits for an answer still."""


@dataclass(frozen=True)
class Progress:
    """Where the ask pass stands."""

    documents: int
    """Documents to ask."""
    documents_done: int
    pages_done: int
    requests_done: int
    failed: int
    elapsed_s: float

    @property
    def pages_per_s(self) -> float:
        return self.pages_done / self.elapsed_s if self.elapsed_s > 0 else 0.0


@dataclass
class Report:
    """The end of a run or a settling."""

    job: str
    output: str
    model: str
    demonstration: bool
    """The demonstration model answered in place of the job's own."""
    documents: int = 0
    records: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    """Records without a valid result, by `stage/kind`."""
    missing: list[str] = field(default_factory=list)
    """Sources without a row: always a defect, named here rather than lost."""
    damaged: list[str] = field(default_factory=list)
    """Shards that someone had damaged: set aside, and their requests asked again."""
    requests: dict[str, int] = field(default_factory=dict)
    """Requests that came back in this run, by status."""
    requests_asked: int = 0
    """Those of them that an engine answered."""
    pages_asked: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    elapsed_s: float = 0.0
    requests_at_once: dict[str, Any] = field(default_factory=dict)
    """How many requests were under way at engines: the mean of each slice of time, from the first one's start."""
    engine_busy_share: float | None = None
    """In so much of the time, from when it was loaded to its last answer, an engine had a request."""

    @property
    def exit_code(self) -> ExitCode:
        if self.missing or PENDING_FAILURE in self.failures:
            return ExitCode.RUN_BROKEN
        return ExitCode.DOCUMENTS_FAILED if self.failures else ExitCode.OK

    @property
    def pages_per_s(self) -> float:
        return self.pages_asked / self.elapsed_s if self.elapsed_s > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return what `report.json` and `--json` say."""
        return {**asdict(self), "pages_per_s": round(self.pages_per_s, 3), "exit_code": int(self.exit_code)}

    def count_records(self, statuses: Iterable[str], failures: Iterable[str]) -> None:
        """Count the records."""
        self.statuses, self.failures = (dict(sorted(Counter(found).items())) for found in (statuses, failures))
        self.records = sum(self.statuses.values())


class ConcurrencyProfile:
    """How many requests were under way at engines over time, in at most so many slices of equal length.

    Two requests, from 0 to 3 s and from 1 to 2 s:    second 0: 1    second 1: 2    second 2: 1
    """

    MOST = 60

    def __init__(self) -> None:
        self.start_s: float | None = None
        self.slice_s = 1.0
        self.busy_s: list[float] = []

    def add(self, start_s: float, end_s: float) -> None:
        """Take note of a request. One that began before the first one noted counts from there."""
        self.start_s = start_s if self.start_s is None else self.start_s
        first, last = max(0.0, start_s - self.start_s), max(0.0, end_s - self.start_s)
        while last > self.MOST * self.slice_s:
            self.busy_s = [sum(self.busy_s[at : at + 2]) for at in range(0, len(self.busy_s), 2)]
            self.slice_s *= 2
        self.busy_s += [0.0] * (math.ceil(last / self.slice_s) - len(self.busy_s))
        for at in range(int(first / self.slice_s), math.ceil(last / self.slice_s)):
            self.busy_s[at] += min(last, (at + 1) * self.slice_s) - max(first, at * self.slice_s)

    def as_dict(self) -> dict[str, Any]:
        """Return the mean number in each slice."""
        return {"slice_s": self.slice_s, "mean": [round(busy_s / self.slice_s, 1) for busy_s in self.busy_s]}


OnProgress = Callable[[Progress], None]


class ProgressTracker:
    """Counts answers for the report and the progress bar."""

    def __init__(self, report: Report, on_progress: OnProgress) -> None:
        self.report, self.on_progress = report, on_progress
        self.failed, self.started = 0, time.monotonic()
        self.at_once, self.engines = ConcurrencyProfile(), dict[str, tuple[float, float]]()
        self.start_round(0)

    def start_round(self, documents: int) -> None:
        """Begin a round of so many documents."""
        self.documents, self.documents_done = documents, 0
        self.left: dict[str, int] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        report = self.report
        self.record_engine(row)
        if row["key"]:
            report.requests[row["status"]] = report.requests.get(row["status"], 0) + 1
        report.requests_asked += bool(row.get("asks"))
        report.pages_asked += len(row.get("pages") or []) if row["key"] else 0
        report.prompt_tokens += row.get("prompt_tokens") or 0
        report.completion_tokens += row.get("completion_tokens") or 0
        self.failed += row.get("status") == "failed"
        if row.get("started_at"):
            start_s = row["started_at"].timestamp()
            self.at_once.add(start_s, start_s + row["elapsed_s"])
        pages = row["last_page"] - row["first_page"] + 1 if row["key"] and row["last_page"] else 0
        left = self.left.get(row["source"], row["page_count"] or 0) - pages
        self.left[row["source"]] = left
        if left <= 0 or not row["key"]:
            self.documents_done += 1
            del self.left[row["source"]]
        elapsed_s = time.monotonic() - self.started
        self.on_progress(Progress(self.documents, self.documents_done, report.pages_asked, report.requests_asked, self.failed, elapsed_s))

    def record_engine(self, row: Mapping[str, Any]) -> None:
        """Take note of how long the engine that answered had something to answer, by its own count."""
        if row.get("actor"):
            self.engines[row["actor"]] = max(self.engines.get(row["actor"], (0.0, 0.0)), (row["alive_s"], row["busy_s"]))

    def finish(self) -> None:
        """Tell the report how the engines were used."""
        alive_s, busy_s = (sum(times) for times in zip((0.0, 0.0), *self.engines.values(), strict=True))
        self.report.engine_busy_share = round(busy_s / alive_s, 3) if alive_s else None
        if self.at_once.busy_s:
            self.report.requests_at_once = self.at_once.as_dict()


class CircuitBreaker:
    """Stops a run that is failing wholesale."""

    WINDOW = 1000
    """So many of the last requests count, so that a run of days notices what broke in its last hour."""

    def __init__(self, max_ratio: float, min_requests: int) -> None:
        self.max_ratio, self.min_requests = max_ratio, min_requests
        self.kinds: deque[str | None] = deque(maxlen=self.WINDOW)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take note of a request. Raises RunError when more of the last ones failed than allowed."""
        if row["key"] is None:
            return
        failure = row.get("failure") if row.get("status") == "failed" else None
        self.kinds.append(f"{failure['stage']}/{failure['kind']}: {failure['message']}" if failure else None)
        if failure is None or len(self.kinds) < self.min_requests:
            return
        failed = [kind for kind in self.kinds if kind]
        if len(failed) > self.max_ratio * len(self.kinds):
            raise RunError(
                f"the run stopped: {len(failed)} of the last {len(self.kinds)} requests failed, `limits.max_failure_ratio` allows "
                f"{self.max_ratio:g}; the last said {failed[-1]}. The same command resumes; --retry failed asks the failed ones again"
            )
