"""How does a run scale? The real driver, registry, routing, writers and ledger, between simulated renderers and simulated GPUs.

    python benchmarks/scale.py [--documents 20000] [--gpus 10 100]

A simulated GPU answers 8 requests of one page a second with 400 tokens each, and a simulated renderer draws nothing; all else is as in a
run. Several GPUs share one engine actor, so that they fit on a small machine. Printed are, for each number of GPUs, the requests a second
that were reached, and the CPU that a request costs the driver, the registry and, beside answers of real size, an engine actor: one of the
first two is what limits a cluster. Returns 1 when the driver takes more than its bound.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from resume import load_job, make_listing

from pipeline import flow
from pipeline.flow import ask_pass
from pipeline.job import Job
from pipeline.records import Completion, FinishReason, Request, Token, Usage
from pipeline.report import Progress
from pipeline.stages.requests import compute_document_keys

REQUESTS_PER_GPU_S = 8.0
GPUS_PER_ACTOR = 64
TOKENS = 400
MIB = 2**20
TICKS = 100
DRIVER_MS = 0.5
"""Bound: CPU of the driver for a request."""


class SimulatedEngine:
    """Answers at the rate of so many GPUs."""

    name, model = "simulated", "none"

    def __init__(self, gpus: int) -> None:
        self.period_s, self.next_s = 1.0 / (gpus * REQUESTS_PER_GPU_S), 0.0
        text = json.dumps({"text": "x" * 3 * TOKENS})
        tokens = tuple(Token(text[at : at + 3], -0.01) for at in range(0, len(text), 3))
        self.completion = Completion(text, FinishReason.STOP, Usage(1600, TOKENS), tokens)

    async def complete(self, request: Request) -> Completion:
        self.next_s = max(self.next_s + self.period_s, time.monotonic())
        await asyncio.sleep(self.next_s - time.monotonic())
        return self.completion

    def measure_silence_s(self) -> float:
        return 0.0

    def close(self) -> None: ...


class SimulatedActor(ask_pass.EngineActor):
    gpus = 1

    def load(self, job: Job, threads: int) -> Any:
        return SimulatedEngine(self.gpus)


class SimulatedStage:
    """Documents -> requests with a page of one visual token, which nothing draws."""

    def __init__(self, plan: Any, claim: Any) -> None:
        self.plan, self.claim = plan, claim

    def render_documents(self, documents: Iterable[Any]) -> Iterator[Any]:
        page = {"page_no": 1, "width_px": 28, "height_px": 28, "dpi": 200.0, "visual_tokens": 1, "warnings": [], "renderer": None}
        for listed in documents:
            document = {**listed, "doc_id": hashlib.sha256(listed["source"].encode()).hexdigest(), "page_count": 1}
            keys = compute_document_keys(document, 1, self.plan.fingerprint)
            for key, attempt in self.claim(document, list(keys)).items():
                place = {"key": key, "attempt": attempt, "first_page": 1, "last_page": 1}
                yield {**document, **place, "pages": [page], "pixels": [np.zeros((28, 28, 3), np.uint8)]}


class SimulatedRenderer(ask_pass.RenderActor):
    def __init__(self, plan: Any, registry: str, limits: Any) -> None:
        super().__init__(plan, registry, limits)
        self.stage = SimulatedStage(plan, self.claim_requests)


class CpuWatch(threading.Thread):
    """Looks at the CPU seconds of Ray's processes, by the word in their title."""

    WORDS = ("RequestRegistry", "SimulatedActor", "SimulatedRenderer", "raylet", "gcs_server")

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over, self.used = threading.Event(), dict[tuple[str, str], float]()

    def run(self) -> None:
        while not self.over.wait(0.5):
            for folder in Path("/proc").glob("[0-9]*"):
                with suppress(OSError, ValueError):
                    title = (folder / "cmdline").read_bytes().decode(errors="replace")
                    word = next((word for word in self.WORDS if word in title.split("\0")[0]), None)
                    if word:
                        fields = (folder / "stat").read_text().rpartition(")")[2].split()
                        self.used[word, folder.name] = (int(fields[11]) + int(fields[12])) / TICKS

    def sum_up(self, word: str) -> float:
        return sum(used for (name, _), used in self.used.items() if name == word)


def measure_run(documents: int, gpus: int) -> dict[str, float]:
    """Return what asking so many documents of so many simulated GPUs takes."""
    listing = make_listing(documents)
    flow.DocumentListing.begin = lambda job: flow.DocumentListing(job, listing)  # type: ignore[method-assign]
    ask_pass.EngineActor, ask_pass.RenderActor = SimulatedActor, SimulatedRenderer  # type: ignore[misc]
    actors = -(-gpus // GPUS_PER_ACTOR)
    SimulatedActor.gpus = gpus // actors
    marks: list[tuple[float, float, int]] = []

    def mark(now: Progress) -> None:
        if now.phase == "asking":
            marks.append((time.monotonic(), time.process_time(), now.requests_done))

    with tempfile.TemporaryDirectory() as folder:
        (watch := CpuWatch()).start()
        job = load_job(Path(folder))
        report = flow.run(job, on_progress=mark)
        watch.over.set()
        shards = len(list((Path(folder) / "out" / "requests").iterdir()))
    assert report.statuses == {"extracted": documents}, report
    wall_s, cpu_s = (marks[-1][at] - marks[0][at] for at in (0, 1))
    return {
        "gpus": gpus,
        "rate": documents / wall_s,
        "driver": cpu_s / documents * 1e3,
        "registry": watch.sum_up("RequestRegistry") / documents * 1e3,
        "engine": watch.sum_up("SimulatedActor") / documents * 1e3,
        "renderer": watch.sum_up("SimulatedRenderer") / documents * 1e3,
        "idle": 1 - (report.engine_busy_share or 0.0),
        "shards": shards,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--gpus", type=int, nargs="+", default=[10, 100])
    chosen = parser.parse_args()
    is_broken = False
    print(f"{chosen.documents:,} documents of one page; CPU in ms a request; bound for the driver {DRIVER_MS}")
    names = ("GPUs", "wanted/s", "reached/s", "driver", "registry", "engine actor", "renderer", "engines idle", "shards")
    print("".join(f"{name:>14}" for name in names))
    for gpus in chosen.gpus:
        found = measure_run(chosen.documents, gpus)
        print(
            f"{gpus:14}{gpus * REQUESTS_PER_GPU_S:14.0f}{found['rate']:14.0f}{found['driver']:14.3f}{found['registry']:14.3f}"
            f"{found['engine']:14.3f}{found['renderer']:14.3f}{found['idle']:14.0%}{found['shards']:14.0f}",
            flush=True,
        )
        is_broken |= found["driver"] > DRIVER_MS
    return int(is_broken)


if __name__ == "__main__":
    raise SystemExit(main())
