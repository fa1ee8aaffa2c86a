"""Metrics of a run for Ray's dashboard and Prometheus, under these names:

    ray_pipeline_pages_rendered_total            pages drawn
    ray_pipeline_requests_total{status}          requests that came back
    ray_pipeline_tokens_total{kind}              tokens read (`prompt`) and written (`completion`)
    ray_pipeline_queue_depth                     requests that an engine has and has not answered
    ray_pipeline_engine_busy_seconds_total       seconds in which an engine had any: their rate is its busy share

Each process of a run counts its own part; a query adds them up. All have the label `job`. They are exported every ten seconds where
`ray[default]` is installed, and end with their process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge

from pipeline.records import LedgerRow, RequestRow


class RenderMetrics:
    """Counts the pages that a worker renders."""

    def __init__(self, job: str) -> None:
        self.tags = {"job": job}
        self.pages = Counter("pipeline_pages_rendered", "Pages drawn.", ("job",))

    def add(self, row: RequestRow) -> None:
        if pages := len(row.get("pages") or []):
            self.pages.inc(pages, self.tags)


class EngineMetrics:
    """Counts what one engine answers, and for how long it has requests."""

    def __init__(self, job: str) -> None:
        self.tags = {"job": job}
        self.requests = Counter("pipeline_requests", "Requests that came back.", ("job", "status"))
        self.tokens = Counter("pipeline_tokens", "Tokens read and written.", ("job", "kind"))
        self.queue = Gauge("pipeline_queue_depth", "Requests that an engine has and has not answered.", ("job",))
        self.busy = Counter("pipeline_engine_busy_seconds", "Seconds in which an engine had a request.", ("job",))
        self.waiting, self.since = 0, time.monotonic()
        self.loaded, self.busy_s = self.since, 0.0

    def add_waiting(self, requests: int) -> None:
        """Count requests that have come; a negative number takes back those given up."""
        now = time.monotonic()
        if self.waiting and now > self.since:
            self.busy.inc(now - self.since, self.tags)
            self.busy_s += now - self.since
        self.waiting, self.since = self.waiting + requests, now
        self.queue.set(self.waiting, self.tags)

    def record_answer(self, rows: Sequence[LedgerRow]) -> dict[str, float]:
        """Count a completed request, by the status of its own row, which is the first, and the tokens of all its rows.

        Returns for how long this engine has been loaded, and busy (fields of `ReceiptRow`).
        """
        self.add_waiting(-1)
        self.requests.inc(1, {**self.tags, "status": rows[0]["status"]})
        for row in rows:
            for kind, tokens in (("prompt", row.get("prompt_tokens")), ("completion", row.get("completion_tokens"))):
                if tokens:
                    self.tokens.inc(tokens, {**self.tags, "kind": kind})
        return {"alive_s": self.since - self.loaded, "busy_s": self.busy_s}
