"""How fast is everything around the model, and what does it cost? `pipeline.run` beside a plain asyncio client, both asking a
server that answers at once. Prints a table; needs no GPU and no weights. Linux only.

    python benchmarks/endpoint.py [--documents 400] [--pages 5] [--rounds 3]
    python benchmarks/endpoint.py --real FOLDER [--documents 296]      real pages, one request a page
    python benchmarks/endpoint.py ... --olmocr PYTHON                  and olmOCR, installed for this interpreter

With `--real` the documents are single pages of the PDFs in a folder and its folders, of each its first six; without, they are made.

The server is a process of its own on loopback, whose CPU time is nobody's: a valid record of one token an event, with
log-probabilities for whoever asks for them, as `pipeline.run` does. The plain client is what one writes in an afternoon: PyMuPDF at
200 dpi, Pillow's `resize` to the size the model would resize to, PNG, base64, httpx2, 16 requests at once; it keeps the answers'
text. `pipeline.run` draws in its sandbox, checks every answer, and writes ledger and records. olmOCR draws by poppler, at the size that its
own model wants, asks without a schema, and writes text.

They take turns, each time in fresh processes. CPU time is that of all processes of a run: what the kernel says of those that
were waited for, orphans too, for they come to this process; or what /proc showed of them last, where that is more. A run over the
first document alone is what starting costs, Ray's processes above all. `parts.py` measures the parts of our way in one process; what a run
takes beyond them, starting left out, is Ray's and that of the parts side by side. Each run of ours also says what its
own process, the driver, took.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import ctypes
import io
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLE_S = 0.2
CONCURRENCY = 16
PAGE_MS, REAL_PAGES, REAL_S, REAL_CPU_S = 45.0, 296, 15.0, 25.0
"""Bounds: CPU a page of a long run; time and CPU time of a run over so many real pages on two cores."""
PR_SET_CHILD_SUBREAPER = 36
NAMES = {"ours": "pipeline.run", "plain": "plain asyncio client", "olmocr": "olmOCR"}
TICKS = os.sysconf("SC_CLK_TCK")
SCHEMA = Path(__file__).parents[1] / "schemas" / "invoice.json"
DRAWING = threading.Lock()
"""MuPDF draws in one thread at a time."""
ITEM = {"description": "Screws M4x20, zinc-plated", "quantity": 17, "unit_price": 12.4, "amount": 210.8}
RECORD = {
    "seller_name": "Northwind Traders Ltd", "seller_tax_id": "DE123456789", "buyer_name": "Contoso GmbH", "invoice_number": "INV-24-0117",
    "invoice_date": "2024-03-05", "due_date": "2024-04-04", "purchase_order": None, "currency": "EUR", "line_items": [ITEM] * 8,
    "subtotal": 1686.4, "tax_amount": 320.42, "total": 2006.82,
}  # fmt: skip


@dataclass(frozen=True)
class Spent:
    """What a run took."""

    wall_s: float
    cpu_s: float


def main() -> int:
    """Print the tables; return 1 when the plain client uses less CPU for a page, or a bound is exceeded."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--documents", type=int, help="400, or 296 real ones")
    parser.add_argument("--pages", type=int, default=5)
    parser.add_argument("--real", type=Path, help="a folder with PDFs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--olmocr", type=Path, metavar="PYTHON", help="interpreter that has olmocr")
    parser.add_argument("--only", choices=("ours", "plain", "server"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.only == "server":
        asyncio.run(serve())
    elif chosen.only == "ours":
        ours(chosen.folder, chosen.address, chosen.documents, chosen.pages)
    elif chosen.only == "plain":
        asyncio.run(plain(chosen.folder, chosen.address, chosen.documents))
    else:
        return compare(chosen.documents, chosen.pages, chosen.rounds, chosen.real, chosen.olmocr)
    return 0


def compare(documents: int | None, pages: int, rounds: int, real: Path | None, olmocr: Path | None) -> int:
    """Run them in turns and print what they took, and what the parts of ours take."""
    import parts  # not by the plain client, whose start is measured

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory() as name, subprocess.Popen([*me("server")], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address, folder = server.stdout.readline().strip(), Path(name)
            documents, pages = documents or (REAL_PAGES if real else 400), 1 if real else pages
            documents = write_pages(folder / "in", documents, real) if real else write_documents(folder / "in", documents, pages)
            taken: dict[tuple[str, int], list[Spent]] = {}
            peers = [who for who in NAMES if olmocr or who != "olmocr"]
            for round_no, count, who in [(round_no, count, who) for round_no in range(rounds) for count in (1, documents) for who in peers]:
                if who == "olmocr":
                    workspace = folder / f"olmocr-{round_no}-{count}"
                    spent = metered(ask_olmocr(str(olmocr), folder, workspace, address, count), {server.pid}, folder / "olmocr.log")
                    check_olmocr(workspace, count)
                else:
                    command = me(who, "--folder", name, "--address", address, "--documents", str(count), "--pages", str(pages))
                    spent = metered(command, {server.pid})
                print(f"    {who}, {count} documents: {spent.wall_s:.1f} s, {spent.cpu_s:.1f} s of CPU", flush=True)
                taken.setdefault((who, count), []).append(spent)
            parts_ms = parts.measure_parts(folder / "in", address, documents * pages, pages, rounds)
        finally:
            server.kill()
    then_ms, is_worse = table(taken, documents, pages)
    parts.print_parts(parts_ms, then_ms)
    whole = median(taken["ours", documents])
    bounds = [("CPU ms a page, starting left out", then_ms, PAGE_MS)]
    if real and documents == REAL_PAGES:
        bounds += [("seconds, starting included", whole.wall_s, REAL_S), ("seconds of CPU, starting included", whole.cpu_s, REAL_CPU_S)]
    for what, found, bound in bounds:
        print(f"{what}: {found:.1f}, bound {bound:g}: {'within' if found <= bound else 'EXCEEDED'}")
    return int(is_worse or any(found > bound for _, found, bound in bounds))


def me(role: str, *arguments: str) -> list[str]:
    return [sys.executable, __file__, "--only", role, *arguments]


def table(taken: dict[tuple[str, int], list[Spent]], documents: int, pages: int) -> tuple[float, bool]:
    """Print medians; return our CPU ms for a page and whether the plain client uses less, starting left out of both."""
    print(f"{documents} documents of {pages} pages, medians of {len(taken['ours', 1])} runs each")
    print(f"{'':22}{'documents/s':>12}{'CPU ms/page':>13}{'start s':>9}{'start CPU s':>13}{'then documents/s':>18}{'then CPU ms/page':>18}")
    start_s, then_ms = dict[str, float](), dict[str, float]()
    for who, name in NAMES.items():
        if (who, documents) not in taken:
            continue
        whole, start = median(taken[who, documents]), median(taken[who, 1])
        start_s[who], then_ms[who] = start.cpu_s, (whole.cpu_s - start.cpu_s) / (documents - 1) / pages * 1000
        print(
            f"{name:22}{documents / whole.wall_s:12.1f}{whole.cpu_s / documents / pages * 1000:13.1f}{start.wall_s:9.1f}{start.cpu_s:13.1f}"
            f"{(documents - 1) / (whole.wall_s - start.wall_s):18.1f}{then_ms[who]:18.1f}"
        )
    print(f"CPU for a page, starting left out: {then_ms['ours'] / then_ms['plain']:.2f} of the plain client's")
    if then_ms["ours"] < then_ms["plain"]:
        even = (start_s["ours"] - start_s["plain"]) / (then_ms["plain"] - then_ms["ours"]) * 1000
        print(f"with it, less than the plain client's from {even:,.0f} pages on")
    return then_ms["ours"], then_ms["ours"] > then_ms["plain"]


def median(runs: list[Spent]) -> Spent:
    return Spent(*(statistics.median(getattr(spent, what) for spent in runs) for what in ("wall_s", "cpu_s")))


# ---- What a run takes -------------------------------------------------------------------------------------------------


def metered(command: list[str], others: set[int], log: Path | None = None) -> Spent:
    """Return what a command took, all the processes that came of it included; waits until the last of them has ended.

    What it prints goes to `log`, if there is one.
    """
    before, seen, started = waited_s(), dict[int, float](), time.monotonic()
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with open(log or os.devnull, "wb") as kept:
        process = subprocess.Popen(command, env=own, **({"stdout": kept, "stderr": kept} if log else {}))
    try:
        while process.poll() is None:
            seen |= alive(others)
            time.sleep(SAMPLE_S)
    finally:
        process.kill()
    wall_s = time.monotonic() - started
    while left := alive(others):
        seen |= left
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(SAMPLE_S / 4)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Spent(wall_s, max(waited_s() - before, sum(seen.values())))


def waited_s() -> float:
    """Return the CPU seconds of all descendants that have ended and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def alive(others: set[int]) -> dict[int, float]:
    """Return this process's descendants, each with its CPU seconds so far; `others` and theirs left out."""
    parents, used = dict[int, int](), dict[int, float]()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # it ended meanwhile
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)], used[int(folder.name)] = int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours and pid not in ours | others}:
        ours |= more
    return {pid: used[pid] for pid in ours - {os.getpid()}}


# ---- Who asks ----------------------------------------------------------------------------------------------------------


def ours(folder: Path, address: str, documents: int, pages: int) -> None:
    """Run the pipeline over the first so many documents, into a folder of its own."""
    from pipeline import Job, run
    from pipeline.report import Phase, Progress

    job = folder / "job.yaml"
    job.write_text(
        f"name: ceiling\nsource: {{paths: [in]}}\npages: {{per_request: {pages}}}\nextract: {{schema: {SCHEMA}}}\noutput: {{path: out}}\n"
        f"model: {{engine: openai, name: stub, base_url: '{address}', server: other, structure: json_schema, concurrency: {CONCURRENCY}}}\n"
    )
    asking_s: list[float] = []

    def note(now: Progress) -> None:
        if now.phase == Phase.ASKING:
            asking_s[1:] = [time.process_time()]

    with tempfile.TemporaryDirectory(dir=folder) as output:
        report = run(Job.load(job, output=output), limit=documents, on_progress=note)
    assert report.statuses == {"extracted": documents}, report.as_dict()
    driver_s, asking = time.process_time(), asking_s[-1] - asking_s[0]
    each = [1000 * used_s / report.requests_asked for used_s in (driver_s, asking)]
    print(
        f"    driver: {driver_s:.2f} s of CPU, {each[0]:.2f} ms a request; while it asked {asking:.2f} s, {each[1]:.2f} ms a request",
        flush=True,
    )


def ask_olmocr(python: str, folder: Path, workspace: Path, address: str, documents: int) -> list[str]:
    """Return the command by which olmOCR asks for the first so many documents."""
    files = [str(file) for file in sorted((folder / "in").iterdir())[:documents]]
    own = ["--server", address, "--model", "stub", "--max_concurrent_requests", str(CONCURRENCY), "--max_server_ready_timeout", "60"]
    return [python, "-m", "olmocr.pipeline", str(workspace), *own, "--pdfs", *files]


def check_olmocr(workspace: Path, documents: int) -> None:
    """Say how many of the documents it has written, if it has not written all of them."""
    written = sum(len(file.read_text().splitlines()) for file in workspace.rglob("*.jsonl"))
    if written != documents:
        print(f"    olmocr wrote {written} of {documents} documents", flush=True)


async def plain(folder: Path, address: str, documents: int) -> None:
    """Ask for the first so many documents as one would by hand."""
    import httpx2

    from pipeline import schema
    from pipeline.schema import prompt

    given = schema.load_schema(SCHEMA)
    plainly = json.loads(schema.dump_compact_schema(given))
    response_format = {"type": "json_schema", "json_schema": {"name": "record", "strict": True, "schema": plainly}}
    system, places = prompt.build_system_message(given), asyncio.Semaphore(CONCURRENCY)

    async def ask(file: Path) -> str:
        async with places:
            images = [{"type": "image_url", "image_url": {"url": url}} for url in await asyncio.to_thread(data_urls, file)]
            user = {"role": "user", "content": [*images, {"type": "text", "text": prompt.ASK}]}
            messages = [{"role": "system", "content": system}, user]
            body = {"model": "stub", "messages": messages, "stream": True, "temperature": 0, "response_format": response_format}
            text = ""
            async with client.stream("POST", f"{address}/chat/completions", json=body) as reply:
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        for choice in json.loads(line[6:])["choices"]:
                            text += choice["delta"].get("content") or ""
            return text

    async with httpx2.AsyncClient(timeout=None) as client:
        files = sorted((folder / "in").iterdir())[:documents]
        answers = await asyncio.gather(*map(ask, files))
    with tempfile.TemporaryFile("w+", dir=folder) as kept:
        kept.writelines(json.dumps({"file": file.name} | json.loads(text)) + "\n" for file, text in zip(files, answers, strict=True))


def data_urls(file: Path) -> list[str]:
    """Return a document's pages as an afternoon's program makes them."""
    import pymupdf
    from PIL import Image

    from pipeline.budget import PixelBudget, smart_resize

    budget = PixelBudget()
    with DRAWING, pymupdf.open(file) as document:
        pixmaps = [page.get_pixmap(dpi=200) for page in document]
    urls = []
    for pixmap in pixmaps:
        height, width = smart_resize(pixmap.height, pixmap.width, budget.min_pixels, budget.max_pixels)
        picture = Image.frombytes("RGB", (pixmap.width, pixmap.height), pixmap.samples).resize((width, height))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        urls.append(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return urls


# ---- What both are given ----------------------------------------------------------------------------------------------


def write_documents(folder: Path, count: int, pages: int) -> int:
    """Write PDFs of dense A4 pages, every other one with a coloured letterhead; return how many."""
    import pymupdf

    folder.mkdir()
    for number in range(count):
        with pymupdf.open() as document:
            for page_no in range(1, pages + 1):
                page = document.new_page(width=595, height=842)
                if number % 2:
                    page.draw_rect((0, 0, 595, 60), color=None, fill=(0.1, 0.3, 0.6))
                lines = [
                    f"{line:02}  Item {number}-{page_no}-{line}, zinc-plated, in boxes of 200   {line} x 12.40 EUR" for line in range(45)
                ]
                page.insert_text((50, 90), [f"Invoice {number}, page {page_no} of {pages}", *lines], fontsize=10)
            document.save(folder / f"{number:05}.pdf")
    return count


def write_pages(folder: Path, most: int, real: Path) -> int:
    """Write the first pages of real PDFs as documents of their own; return how many. One that cannot be opened is left out."""
    import pymupdf
    from parts import PAGES_PER_FILE

    folder.mkdir()
    count = 0
    for file in sorted(real.rglob("*.pdf")):
        with suppress(RuntimeError, ValueError), pymupdf.open(file) as whole:
            for page_no in range(min(PAGES_PER_FILE, len(whole), most - count)):
                with pymupdf.open() as single:
                    single.insert_pdf(whole, from_page=page_no, to_page=page_no)
                    single.save(folder / f"{count:05}.pdf")
                count += 1
    return count


async def serve() -> None:
    """Answer every request at once, and say where."""
    answers = {scored: answer(json.dumps(RECORD, separators=(",", ":")), scored) for scored in (True, False)}
    whole, models = reply(answer_olmocr()), reply({"object": "list", "data": [{"id": "stub", "object": "model"}]})

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b""
                if body:
                    is_streamed = re.search(rb'"stream": *true', body)
                    writer.write(answers[b'"logprobs":true' in body] if is_streamed else whole)
                else:
                    writer.write(models if b"/models" in head.split(b"\r\n")[0] else b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, limit=2**22)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


def reply(content: dict[str, Any]) -> bytes:
    """Return a reply with a JSON object."""
    body = json.dumps(content).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def answer_olmocr() -> dict[str, Any]:
    """Return what olmOCR wants to read: what a page is like, then its text."""
    about = {"primary_language": "en", "is_rotation_valid": True, "rotation_correction": 0, "is_table": False, "is_diagram": False}
    content = "\n".join(["---", *(f"{name}: {value}" for name, value in about.items()), "---", json.dumps(RECORD, indent=1)])
    message = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 6000, "completion_tokens": 254, "total_tokens": 6254}
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": "stub", "choices": [message], "usage": usage}


def answer(text: str, scored: bool) -> bytes:
    """Return a reply that streams a text, four characters an event."""
    parts = [text[at : at + 4] for at in range(0, len(text), 4)]
    choices: list[dict[str, Any]] = [{"index": 0, "delta": {"content": part}, "finish_reason": None} for part in parts]
    if scored:
        for part, choice in zip(parts, choices, strict=True):
            choice["logprobs"] = {"content": [{"token": part, "logprob": -0.01, "bytes": list(part.encode()), "top_logprobs": []}]}
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": "stub"}
    usage = {"prompt_tokens": 6000, "completion_tokens": len(parts), "total_tokens": 6000 + len(parts)}
    events = [*({**chunk, "choices": [choice]} for choice in choices), {**chunk, "choices": [], "usage": usage}]
    data = [f"data: {event}\n\n".encode() for event in (*(json.dumps(event, separators=(",", ":")) for event in events), "[DONE]")]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in data) + b"0\r\n\r\n"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the way out leads past the server, which would stay otherwise
    raise SystemExit(main())
