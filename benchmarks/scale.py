"""How does a run scale? The real driver, registry, routing, writers and ledger, between simulated renderers and simulated GPUs.

    python benchmarks/scale.py [--documents 20000] [--gpus 10 100] [--calls 10 100 1000] [--mix 2000]

Three tables, each figure beside its bound; 1 is returned when one is broken.

1. Whole runs of so many documents: a simulated GPU answers 8 requests of one page and 400 tokens a second, a simulated renderer draws
   nothing, all else is as in a run. Several GPUs share one engine actor, so that they fit on a small machine.
2. The calls that a cluster of so many GPUs makes, made of the real registry and taken by a driver's part of them: claims of its renderers,
   shards of its engines, looks at the list of engines, news. Few clients make them, as fast as the machine allows; what counts is the CPU.
3. An engine of 64 places whose answers take 2 s or, one in twenty, 40 s: how much of its places is in use from the time
   when it was full until the last request has a place.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
from resume import load_job, make_listing

from pipeline import cluster, flow
from pipeline.events import attach_handler
from pipeline.flow import ask_pass, pending
from pipeline.job import Job
from pipeline.output.key_set import KeySet
from pipeline.records import Completion, FinishReason, Request, Token, Usage
from pipeline.registry import EngineEntry, RequestRegistry, pack_receipts, unpack_receipts
from pipeline.registry.deaths import EngineId
from pipeline.report import Canary, CircuitBreaker, Progress, ProgressTracker, Report
from pipeline.stages.render import DrawnRequest
from pipeline.stages.requests import compute_document_keys

REQUESTS_PER_GPU_S = 8.0
GPUS_PER_ACTOR = 64
TOKENS = 400
TICKS = 100
BOUNDS = {"driver": 0.5, "registry": 0.2, "store requests": 0.1}
"""CPU of driver and registry in ms a request; requests to the store for each document."""
BUSY_SHARE = 0.95
PLACES, SHORT_S, LONG_S, LONG_EVERY = 64, 2.0, 40.0, 20


# ---- 1: whole runs --------------------------------------------------------------------------------------------------------------------


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

    def render_documents(self, documents: Iterable[Any]) -> Iterator[DrawnRequest]:
        page = {"page_no": 1, "width_px": 28, "height_px": 28, "dpi": 200.0, "visual_tokens": 1, "warnings": [], "renderer": None}
        for listed in documents:
            document = {**listed, "doc_id": hashlib.sha256(listed["source"].encode()).hexdigest(), "page_count": 1}
            (key,) = compute_document_keys(document, 1, self.plan.fingerprint)
            claimed: Future[dict[str, int]] = self.claim(document, [key])
            request: Any = {"key": key, "first_page": 1, "last_page": 1, "pages": [page], "pixels": [np.zeros((28, 28, 3), np.uint8)]}
            yield DrawnRequest({**document, **request}, claimed)


class SimulatedRenderer(ask_pass.RenderActor):
    def __init__(self, plan: Any, registry: str, limits: Any) -> None:
        super().__init__(plan, registry, limits)
        self.stage = SimulatedStage(plan, self.claim_requests)  # type: ignore[assignment]


class CpuWatch(threading.Thread):
    """Looks at the CPU seconds of Ray's processes, by the word in their title."""

    WORDS = ("RequestRegistry", "SimulatedActor", "SimulatedRenderer", "raylet", "gcs_server")

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own_s = 0.0
        self.over, self.used, self.before = threading.Event(), dict[tuple[str, str], float](), dict[tuple[str, str], float]()

    def run(self) -> None:
        while not self.over.wait(1.0):
            self.look()
            self.own_s = time.thread_time()

    def look(self) -> None:
        """Take the CPU seconds of this process's descendants: others may run on this machine."""
        found: dict[str, tuple[str, str, float]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError):
                title = (folder / "cmdline").read_bytes().decode(errors="replace").partition("\0")[0]
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                found[folder.name] = fields[1], title, (int(fields[11]) + int(fields[12])) / TICKS
        own = {str(os.getpid())}
        while more := {pid for pid, (parent, _, _) in found.items() if parent in own} - own:
            own |= more
        for pid, (_, title, used_s) in found.items():
            word = next((word for word in self.WORDS if word in title), None)
            if pid in own and word:
                self.used[word, pid] = used_s

    def begin(self) -> None:
        """Leave out what was used so far: by imports, above all."""
        self.look()
        self.before = dict(self.used)

    def sum_up(self, word: str) -> float:
        return sum(used - self.before.get(at, 0.0) for at, used in self.used.items() if at[0] == word)


class ShardCounter(logging.Handler):
    """Counts the shards that engines report."""

    shards = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.shards += record.msg == "shard_written"


def measure_own_mib() -> float:
    """Return how much real memory is this process's own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def measure_run(documents: int, gpus: int) -> dict[str, float]:
    """Return what asking so many documents of so many simulated GPUs takes."""
    listing = make_listing(documents)
    pending.DocumentListing.begin = lambda job: pending.DocumentListing(job, listing)  # type: ignore[method-assign]
    ask_pass.EngineActor, ask_pass.RenderActor = SimulatedActor, SimulatedRenderer  # type: ignore[misc]
    actors = -(-gpus // GPUS_PER_ACTOR)
    SimulatedActor.gpus = gpus // actors
    marks: list[tuple[float, float, float]] = []  # time, the driver's CPU without the watch's, its memory
    watch, counter = CpuWatch(), ShardCounter()

    def mark(now: Progress) -> None:
        if now.phase == "asking":
            if not marks:
                watch.begin()
            if not marks or time.monotonic() > marks[-1][0] + 0.5 or now.requests_done == documents:
                marks.append((time.monotonic(), time.process_time() - watch.own_s, measure_own_mib()))

    with tempfile.TemporaryDirectory() as folder, attach_handler(counter):
        watch.start()
        report = flow.run(load_job(Path(folder)), on_progress=mark)
        watch.over.set()
        watch.join()
    assert report.statuses == {"extracted": documents}, report
    wall_s, cpu_s = (marks[-1][at] - marks[0][at] for at in (0, 1))
    own_mib = [mib for *_, mib in marks]
    return {
        "rate": documents / wall_s,
        "driver": cpu_s / documents * 1e3,
        "driver a second": cpu_s / wall_s * 1e3,
        "registry": watch.sum_up("RequestRegistry") / documents * 1e3,
        "engine": watch.sum_up("SimulatedActor") / documents * 1e3,
        "renderer": watch.sum_up("SimulatedRenderer") / documents * 1e3,
        "idle": 1 - (report.engine_busy_share or 0.0),
        "store requests": 2 * counter.shards / documents,
        "driver B/doc": (max(own_mib) - own_mib[0]) * 2**20 / documents,
    }


# ---- 2: the calls of a cluster --------------------------------------------------------------------------------------------------------

DOCUMENTS_PER_CLAIM = 15
"""A renderer draws 30 pages a second and claims twice in it."""
PAGES_PER_RENDERER_S = 30.0
SHARD_S, NEWS_S, LOOK_S = 5.0, 1.0, 2.0


class SimulatedClients:
    """Makes the calls of renderers and engines, many of which are under way at a time."""

    def __init__(self, registry: Any, gpus: int) -> None:
        self.registry = registry
        self.engines = [EngineId(f"{number:032x}", 1) for number in range(gpus)]
        self.looks = round(gpus * REQUESTS_PER_GPU_S / PAGES_PER_RENDERER_S / LOOK_S)
        self.list_number = 0

    async def begin(self) -> None:
        here = ray.get_runtime_context().current_actor
        for engine in self.engines:
            await self.registry.begin_process.remote(engine, "here", False)
            await self.registry.add_engine.remote(EngineEntry(engine, "here", here))
        self.list_number = (await self.registry.list_engines.remote(0, False)).number

    async def work(self, second: int) -> int:
        """Make the calls of one second; return how many requests there were."""
        writers = [engine for at, engine in enumerate(self.engines) if at % SHARD_S == second % SHARD_S]
        numbers = range(int(SHARD_S * REQUESTS_PER_GPU_S))
        keys = {engine: [hash_text(f"{second} {engine} {number}")[:32] for number in numbers] for engine in writers}
        documents = [(make_document(key), [key]) for some in keys.values() for key in some]
        starts = range(0, len(documents), DOCUMENTS_PER_CLAIM)
        await gather_some(self.registry.claim.remote(documents[start : start + DOCUMENTS_PER_CLAIM]) for start in starts)
        await gather_some(self.registry.list_engines.remote(self.list_number, False) for _ in range(self.looks))
        await gather_some(self.write_shard(engine, f"{second} {engine}", some) for engine, some in keys.items())
        return len(documents)

    async def write_shard(self, engine: EngineId, name: str, keys: list[str]) -> None:
        refused, doubtful = await self.registry.begin_shard.remote(engine, name, keys)
        assert (refused, doubtful) == (set(), {})
        receipts = pack_receipts([make_receipt(key, engine) for key in keys])
        await self.registry.end_shard.remote(engine, name, keys, receipts, 16)


async def gather_some(calls: Iterable[Any], most: int = 64) -> None:
    """Await many calls, so many at a time."""
    under_way: set[Any] = set()
    for call in calls:
        under_way.add(asyncio.ensure_future(await_call(call)))
        if len(under_way) >= most:
            _, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.gather(*under_way)


async def await_call(call: Any) -> Any:
    return await call


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_document(key: str) -> Any:
    return {"source": f"in/{key}.pdf", "size_bytes": 1, "version": "1", "doc_id": hash_text(key), "page_count": 1, "full_url": None}


def make_receipt(key: str, engine: EngineId) -> Any:
    outcome = {"key": key, "attempt": 1, "first_page": 1, "last_page": 1, "status": "extracted", "failure": None, "asks": 1}
    counts = {"prompt_tokens": 1600, "completion_tokens": TOKENS, "pages_shown": 1, "elapsed_s": 1.5, "alive_s": 60.0, "busy_s": 59.0}
    return {**make_document(key), **outcome, **counts, "engine": "simulated", "actor": f"{engine.actor} 1", "started_at": None}


def measure_calls(gpus: int, seconds: int) -> dict[str, float]:
    """Return the CPU that the calls of so many GPUs in so many seconds take."""
    registry: Any = ray.remote(RequestRegistry).options(num_cpus=0).remote(cluster.is_node_alive)
    clients: Any = ray.remote(SimulatedClients).options(num_cpus=0, max_concurrency=100).remote(registry, gpus)
    ray.get([registry.begin_round.remote(KeySet(), {}, True), clients.begin.remote()])
    tracker = ProgressTracker(Report("scale", "", "", False), lambda _: None)
    breaker, canary, watch = CircuitBreaker(1.0, 100), Canary(1.0), CpuWatch()
    watch.begin()
    requests, driver_s = 0, 0.0
    for second in range(seconds):
        requests += ray.get(clients.work.remote(second))
        started_s = time.process_time()
        news = ray.get(registry.take_news.remote())
        for packed in news.receipts:
            for receipt in unpack_receipts(packed):
                tracker.add(receipt)
                breaker.add(receipt)
                canary.add(receipt)
        driver_s += time.process_time() - started_s
    watch.look()
    assert tracker.report.requests_asked == requests
    for actor in (clients, registry):
        ray.kill(actor)
    return {"registry": watch.sum_up("RequestRegistry") / requests * 1e3, "driver": driver_s / requests * 1e3}


# ---- 3: short and long answers --------------------------------------------------------------------------------------------------------


class MixedEngine(SimulatedEngine):
    """Has so many places; an answer takes long for one document in twenty. Keeps how much of its places was in use."""

    def __init__(self, file: Path) -> None:
        super().__init__(1)
        self.file, self.places, self.used, self.used_s = file, asyncio.Semaphore(PLACES), 0, 0.0
        self.first_s = self.since_s = 0.0

    def change(self, used: int) -> None:
        now_s = time.monotonic()
        if self.first_s:
            self.used_s += self.used * (now_s - self.since_s)
        elif self.used + used == PLACES:
            self.first_s = now_s
        self.used, self.since_s = self.used + used, now_s

    async def complete(self, request: Request) -> Completion:
        async with self.places:
            self.change(1)
            self.file.write_text(json.dumps([self.used_s, self.since_s - self.first_s]))
            await asyncio.sleep(LONG_S if int(request.key, 16) % LONG_EVERY == 0 else SHORT_S)
            self.change(-1)
        return self.completion


class MixedActor(ask_pass.EngineActor):
    def load(self, job: Job, threads: int) -> Any:
        return MixedEngine(job.file.parent / "places.json")


def measure_mix(documents: int) -> float:
    """Return how much of an engine's places is in use once it was full, until the last request has one. No documents are tried alone."""
    listing = make_listing(documents)
    pending.DocumentListing.begin = lambda job: pending.DocumentListing(job, listing)  # type: ignore[method-assign]
    ask_pass.EngineActor, ask_pass.RenderActor = MixedActor, SimulatedRenderer  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        load_job(Path(folder))
        report = flow.run(Job.load(Path(folder) / "job.yaml", ["limits.canary=0"]))
        used_s, span_s = json.loads((Path(folder) / "places.json").read_text())
    assert report.statuses == {"extracted": documents}, report
    return float(used_s / span_s / PLACES)


# ---- tables ---------------------------------------------------------------------------------------------------------------------------


def show_runs(documents: int, counts: list[int]) -> bool:
    """Print the first table; return whether a bound was broken."""
    is_broken = False
    print(f"{documents:,} documents of one page; CPU in ms a request; bounds: {BOUNDS}")
    names = {"rate": "reached/s", "driver a second": "driver ms/s", "engine": "engine actor", "idle": "engines idle"}
    for gpus in counts:
        found = measure_run(documents, gpus)
        if gpus == counts[0]:
            print("".join(f"{name:>15}" for name in ("GPUs", "wanted/s", *(names.get(key, key) for key in found))))
        print(f"{gpus:15}{gpus * REQUESTS_PER_GPU_S:15.0f}" + "".join(f"{value:15.3f}" for value in found.values()), flush=True)
        is_broken |= any(found[name] > bound for name, bound in BOUNDS.items())
    return is_broken


def show_calls(counts: list[int]) -> bool:
    """Print the second table; return whether a bound was broken, or a process would need more than its core."""
    print("the calls of a cluster, without its work: CPU in ms a request, and share of a core at 8 requests/s of each GPU", flush=True)
    print("".join(f"{name:>15}" for name in ("GPUs", "registry", "driver", "registry core", "driver core")))
    is_broken = False
    for gpus in counts:
        found = measure_calls(gpus, max(5, min(100, 5000 // gpus)))
        cores = [found[name] * gpus * REQUESTS_PER_GPU_S / 1e3 for name in ("registry", "driver")]
        print(f"{gpus:15}{found['registry']:15.3f}{found['driver']:15.3f}{cores[0]:15.0%}{cores[1]:15.0%}", flush=True)
        is_broken |= found["registry"] > BOUNDS["registry"] or max(cores) > 1
    return is_broken


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--gpus", type=int, nargs="*", default=[10, 100])
    parser.add_argument("--calls", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--mix", type=int, default=2000, help="documents of the third table; 0 leaves it out")
    chosen = parser.parse_args()
    cluster.connect_ray()
    is_broken = show_calls(chosen.calls) if chosen.calls else False
    if chosen.gpus:
        is_broken |= show_runs(chosen.documents, chosen.gpus)
    if chosen.mix:
        share = measure_mix(chosen.mix)
        print(f"{PLACES} places, answers of {SHORT_S:g} s and {LONG_S:g} s: {share:.1%} of the places in use, bound {BUSY_SHARE:.0%}")
        is_broken |= share < BUSY_SHARE
    return int(is_broken)


if __name__ == "__main__":
    raise SystemExit(main())
