"""How much memory does a long run hold, when its engine is slower than its renderers? Prints a table; needs no GPU and no weights.

    python benchmarks/backpressure.py [--pages 10000] [--page-s 0.03]

A whole `pipeline.run` over A4 pages of a million pixels each (3 MB), with an engine that answers one page in `--page-s` and
nothing else, so that pages would pile up in front of it if nothing held them back: without that, ten thousand of them are 30 GB.
The driver's peak is the kernel's count of the real memory that is its own (RssAnon, RssFile), less what it had before the run; what it
sees of the object store is counted there: as much as Ray says that this holds. Both are looked at once a second; what was
spilled to the disk is Ray's own sum. Returns 1 when a bound is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pymupdf
import ray

from pipeline import cluster, flow
from pipeline.flow import ask_pass
from pipeline.job import Job
from pipeline.records import Completion, FinishReason, Request, Usage

MIB = 2**20
STORE_BYTES = 1024 * MIB
"""The object store that the run is given, however much memory the machine has."""
DRIVER_BYTES = 256 * MIB
HELD_BYTES = STORE_BYTES
PAGES_PER_DOCUMENT = 100
SCHEMA = {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"], "additionalProperties": False}
JOB = """\
name: backpressure
source: {paths: [in]}
pages: {per_request: 1}
extract: {schema: schema.json, per: page}
model: {name: demo, batch_size: 8}
output: {path: out}
"""


class Steady:
    """An engine that takes its time, the same for each page, one after another."""

    name, model = "steady", "none"

    def __init__(self, page_s: float) -> None:
        self.page_s, self.turn = page_s, asyncio.Lock()

    async def complete(self, request: Request) -> Completion:
        async with self.turn:
            await asyncio.sleep(self.page_s)
        return Completion('{"total":1}', FinishReason.STOP, Usage(1290, 6))

    def close(self) -> None:
        """Nothing to release."""


class SteadyAsker(ask_pass.EngineActor):
    page_s = 0.0

    def load(self, job: Job, threads: int) -> Any:
        return Steady(self.page_s)


class Watch(threading.Thread):
    """Looks once a second at what the driver and the object store hold."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over, self.held_bytes, self.own_bytes = threading.Event(), 0.0, 0

    def run(self) -> None:
        whole = ray.cluster_resources()["object_store_memory"]
        while not self.over.wait(1.0):
            self.own_bytes = max(self.own_bytes, own_bytes())
            self.held_bytes = max(self.held_bytes, whole - ray.available_resources().get("object_store_memory", 0.0))


def main() -> int:
    """Print the table; return 1 when something takes more than its bound."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--pages", type=int, default=10_000)
    parser.add_argument("--page-s", type=float, default=0.03, help="seconds the engine takes for a page")
    chosen = parser.parse_args()
    SteadyAsker.page_s = chosen.page_s
    ask_pass.EngineActor = SteadyAsker  # type: ignore[misc]
    ray.init(include_dashboard=False, log_to_driver=False, object_store_memory=STORE_BYTES)
    cluster.connect_ray()
    with tempfile.TemporaryDirectory() as folder:
        job = prepared(Path(folder), chosen.pages)
        watch, before = Watch(), own_bytes()
        watch.start()
        report = flow.run(job)
        watch.over.set()
        watch.join()
    rows = [
        ("driver", watch.own_bytes - before, DRIVER_BYTES),
        ("object store", watch.held_bytes, HELD_BYTES),
        ("spilled", spilled_bytes(), 0),
    ]
    print(
        f"{report.pages_asked:,} pages, {report.statuses}, {report.elapsed_s:.0f} s, engine busy {chosen.page_s * report.pages_asked:.0f} s"
    )
    print(f"{'':20}{'peak MiB':>10}{'bound MiB':>10}")
    for name, used, bound in rows:
        print(f"{name:20}{used / MIB:10.1f}{bound / MIB:10.1f}{'' if used <= bound else '  TOO MUCH'}")
    return int(any(used > bound for _, used, bound in rows) or report.pages_asked != chosen.pages)


def prepared(folder: Path, pages: int) -> Job:
    """Write the job and its documents: text on white, as invoices are."""
    (folder / "job.yaml").write_text(JOB)
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    (folder / "in").mkdir()
    for number, first in enumerate(range(0, pages, PAGES_PER_DOCUMENT)):
        document = pymupdf.open()
        for page in range(first, min(pages, first + PAGES_PER_DOCUMENT)):
            document.new_page(width=595, height=842).insert_text(
                (40, 60), [f"Line {line} of page {page}" for line in range(50)], fontsize=10
            )
        document.save(folder / "in" / f"{number:05}.pdf")
    return Job.load(folder / "job.yaml", [])


def own_bytes() -> int:
    """Return how much real memory is this process's own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))) * 1024


def spilled_bytes() -> int:
    """Return what Ray has written to the disk because its object store was full."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    reply = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address))
    return int(reply.store_stats.spilled_bytes_total)


if __name__ == "__main__":
    sys.exit(main())
