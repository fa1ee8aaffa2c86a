"""What does each part of a page's way around the model cost? CPU time of each, without Ray. `endpoint.py` prints this table beside what
whole runs took; alone:

    python benchmarks/parts.py FOLDER [--pages 296] [--per-request 1] [--rounds 3]

FOLDER has PDFs, searched in its folders too, of which the first six pages each are taken. All is done in one process, both sides of a
transport too, but for the server. A document goes through all parts before the next one; the table has the medians of the rounds.
Each request is settled as a document of its own. Its answer has 43 values that no page shows: the most that looking for values can cost.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import pickle
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.budget import RenderSettings
from pipeline.engines.openai import chat
from pipeline.engines.openai.client import ChatClient, RetryPolicy
from pipeline.evidence.text_layer import pack_words
from pipeline.flow.settle_pass import settle_output
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.compaction import compact_shards
from pipeline.output.ledger import write_rows
from pipeline.output.sources import SOURCE_SCHEMA
from pipeline.records import Completion, Page, Request
from pipeline.render import pdf, protocol
from pipeline.render.document import open_document
from pipeline.report import ProgressTracker, Report
from pipeline.stages.ask import AskStage
from pipeline.stages.record_plan import RecordPlan
from pipeline.stages.render import describe_page
from pipeline.stages.requests import compute_request_key
from pipeline.stages.settle import SettleStage

PAGES_PER_FILE = 6
ROWS_PER_SHARD = 64
"""About what an engine writes at once when it answers 12 requests/s."""
SCHEMA = Path(__file__).parents[1] / "schemas" / "invoice.json"
PARTS = (
    "read and hash a document", "open it", "rasterise a page", "scale it down", "read its words", "renderer to its parent",
    "copy to an engine", "encode as PNG", "base64 and JSON", "HTTP and the answer's events", "check the answer", "write the ledger",
    "settle the record",
)  # fmt: skip


class Clock:
    """CPU seconds of this process, by part; a part within another is not counted twice."""

    def __init__(self) -> None:
        self.spent_s, self.inner_s = defaultdict[str, float](float), [0.0]

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        started_s = time.process_time()
        self.inner_s.append(0.0)
        try:
            yield
        finally:
            taken_s = time.process_time() - started_s
            self.spent_s[part] += taken_s - self.inner_s.pop()
            self.inner_s[-1] += taken_s

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            with self.measure(part):
                return function(*given, **named)

        return wrapped


class Answerer:
    """Asks the server as the engine `openai` does, in this process's only event loop."""

    name, model = "openai", "stub"

    def __init__(self, address: str, clock: Clock) -> None:
        self.clock, self.client = clock, ChatClient(address, None, RetryPolicy())
        self.profile = chat.ServerProfile("stub", "json_schema", logprobs=True)

    async def complete(self, request: Request) -> Completion:
        with self.clock.measure("base64 and JSON"):
            body = chat.build_body(request, self.profile)
        with self.clock.measure("HTTP and the answer's events"):
            return await self.client.complete(body, request.sampling.max_tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pages", type=int, default=296)
    parser.add_argument("--per-request", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    command = [sys.executable, str(Path(__file__).with_name("endpoint.py")), "--only", "server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            print_parts(measure_parts(chosen.folder, address, chosen.pages, chosen.per_request, chosen.rounds))
        finally:
            server.kill()
    return 0


def print_parts(parts_ms: dict[str, float], whole_ms: float | None = None) -> None:
    """Print what each part takes; with the whole of a run, what is left of that."""
    parts_ms = parts_ms if whole_ms is None else {**parts_ms, "Ray and the rest": whole_ms - sum(parts_ms.values())}
    total_ms = sum(parts_ms.values())
    print(f"{'CPU ms a page':32}{total_ms:8.1f}")
    for part, ms in parts_ms.items():
        print(f"    {part:28}{ms:8.2f}{ms / total_ms:8.1%}")


def measure_parts(folder: Path, address: str, pages: int, per_request: int, rounds: int) -> dict[str, float]:
    """Return the CPU milliseconds a page of each part, medians of rounds over the first so many pages of a folder."""
    found: list[dict[str, float]] = []
    original = pdf.read_text, chat.encode_page
    for _ in range(rounds + 1):
        clock = Clock()
        pdf.read_text = clock.wrap("read its words", original[0])
        chat.encode_page = clock.wrap("encode as PNG", original[1])
        count = asyncio.run(send_pages(folder, address, pages, per_request, clock))
        found.append({part: clock.spent_s[part] / count * 1000 for part in PARTS})
    pdf.read_text, chat.encode_page = original
    return {part: statistics.median(each[part] for each in found[1:]) for part in PARTS}  # the first round warms up


async def send_pages(folder: Path, address: str, most: int, per_request: int, clock: Clock) -> int:
    """Take pages through all parts; return how many there were."""
    count, rows, documents = 0, list[Any](), list[Any]()
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "job.yaml")
        file.write_text(
            f"name: parts\nsource: {{paths: [.]}}\npages: {{per_request: {per_request}}}\nextract: {{schema: {SCHEMA}}}\n"
            "output: {path: out}\n"
            f"model: {{engine: openai, name: stub, base_url: '{address}'}}\n"
        )
        job = Job.load(file, output=Path(name, "out"))
        stage, output = AskStage(job, Answerer(address, clock)), Output(job.output)  # type: ignore[arg-type]
        output.create()
        for source in sorted(folder.rglob("*.pdf")):
            if count == most:
                break
            with clock.measure("read and hash a document"):
                data = source.read_bytes()
                doc_id = hashlib.sha256(data).hexdigest()
            drawn = list(draw_pages(data, min(PAGES_PER_FILE, most - count), clock))
            count += len(drawn)
            for first in range(0, len(drawn), per_request):
                row = pass_on(make_row(drawn[first : first + per_request], f"{doc_id[:52]}{first:012}", job.fingerprint, clock), clock)
                documents.append({name: row[name] for name in SOURCE_SCHEMA.names if name in row})
                with clock.measure("check the answer"):
                    rows.append(await stage.answer_row(row))
                if len(rows) == ROWS_PER_SHARD:
                    write(output, rows, clock)
        write(output, rows, clock)
        with clock.measure("settle the record"):
            settle(job, output, documents)
        await stage.engine.client.close()  # type: ignore[attr-defined]
    return count


def draw_pages(data: bytes, most: int, clock: Clock) -> Iterator[Page]:
    """Yield pages of a document, as they come out of a renderer: a page that cannot be drawn is left out."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with clock.measure("open it"):
            opened = open_document(data, RenderSettings(text_layer=True))
        for page_no in islice(range(1, opened.page_count + 1), most):
            with clock.measure("rasterise a page"):
                page = opened.draw(page_no)
            with clock.measure("renderer to its parent"):
                sending = threading.Thread(target=protocol.send_message, args=(theirs, *protocol.pack_page(page)))
                sending.start()
                header, body = protocol.receive_message(ours, protocol.compute_page_bytes(28))
                sending.join()
                received = protocol.unpack_page(header, body, page_no, 28)
            yield received


def make_row(pages: list[Page], doc_id: str, fingerprint: str, clock: Clock) -> Any:
    """Return the row of a request about the pages of a document."""
    with clock.measure("renderer to its parent"):
        facts = [{**describe_page(page), "text_layer": pack_words(page)} for page in pages]
        return {
            "key": compute_request_key(doc_id, 1, len(pages), fingerprint),
            "attempt": 1,
            "source": doc_id,
            "doc_id": doc_id,
            "page_count": len(pages),
            "size_bytes": 1,
            "version": "1",
            "first_page": 1,
            "last_page": len(pages),
            "page_failures": [],
            "pages": facts,
            "pixels": [page.pixels for page in pages],
        }


def pass_on(row: Any, clock: Clock) -> Any:
    """Return a row as another process gets it from an object store: pickled, its pixels copied once and then read in place."""
    with clock.measure("copy to an engine"):
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(row, protocol=5, buffer_callback=buffers.append)
        return pickle.loads(pickled, buffers=[bytes(buffer.raw()) for buffer in buffers])


def write(output: Output, rows: list[Any], clock: Clock) -> None:
    """Write rows into the ledger, and forget them."""
    with clock.measure("write the ledger"):
        write_rows(output, rows)
    rows.clear()


def settle(job: Job, output: Output, documents: list[Any]) -> None:
    """Write the records, as a run does at its end."""
    report = Report("parts", "", "", False)
    compact_shards(output)
    stage = SettleStage(RecordPlan(job), job.pages_per_request, job.fingerprint)
    settle_output(pa.Table.from_pylist(documents, SOURCE_SCHEMA), stage, output, ProgressTracker(report, lambda _: None), job)
    assert report.statuses == {"extracted": len(documents)}, report.as_dict()


if __name__ == "__main__":
    raise SystemExit(main())
