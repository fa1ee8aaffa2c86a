"""What the parts of a run are doing, as Ray's metrics, which Ray's dashboard and Prometheus show under these names.

    ray_pipeline_pages_rendered_total            pages drawn
    ray_pipeline_requests_total{status}          requests that came back
    ray_pipeline_tokens_total{kind}              tokens read (`prompt`) and written (`completion`)
    ray_pipeline_queue_depth                     requests that an engine has and has not answered
    ray_pipeline_engine_busy_seconds_total       seconds in which an engine had any: their rate is its busy share

Every process of a run counts for itself, and whoever reads adds up; all of them have the label `job`. They are exported where
`ray[default]` is installed, every ten seconds, and end with their process. Knows neither documents nor answers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge


class RenderMetrics:
    """Counts what a render task draws."""

    def __init__(self, job: str) -> None:
        self.tags = {"job": job}
        self.pages = Counter("pipeline_pages_rendered", "Pages drawn.", ("job",))

    def add(self, row: Mapping[str, Any]) -> None:
        if pages := len(row.get("pages") or []):
            self.pages.inc(pages, self.tags)


class EngineMetrics:
    """Counts what one engine answers, and how long it has anything to answer."""

    def __init__(self, job: str) -> None:
        self.tags = {"job": job}
        self.requests = Counter("pipeline_requests", "Requests that came back.", ("job", "status"))
        self.tokens = Counter("pipeline_tokens", "Tokens read and written.", ("job", "kind"))
        self.queue = Gauge("pipeline_queue_depth", "Requests that an engine has and has not answered.", ("job",))
        self.busy = Counter("pipeline_engine_busy_seconds", "Seconds in which an engine had a request.", ("job",))
        self.waiting, self.since = 0, time.monotonic()
        self.loaded, self.busy_s = self.since, 0.0

    def take(self, requests: int) -> None:
        """Note that so many requests have come; a negative number takes back what was given up."""
        now = time.monotonic()
        if self.waiting and now > self.since:
            self.busy.inc(now - self.since, self.tags)
            self.busy_s += now - self.since
        self.waiting, self.since = self.waiting + requests, now
        self.queue.set(self.waiting, self.tags)

    def answer(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Note that one came back, and return for how long this engine has been loaded, and busy."""
        self.take(-1)
        if row.get("key"):
            self.requests.inc(1, {**self.tags, "status": str(row.get("status"))})
        for kind in ("prompt", "completion"):
            if tokens := row.get(f"{kind}_tokens"):
                self.tokens.inc(tokens, {**self.tags, "kind": kind})
        return {"alive_s": self.since - self.loaded, "busy_s": self.busy_s}
