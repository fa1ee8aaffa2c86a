"""Does reading again confirm true values, and no altered ones? Documents with true values in, a table out (`evidence.model: on`).

    python benchmarks/reread.py jobs/samples [FOLDER …]

`jobs/samples` are the sample documents, read without their text layers; any other folder holds images (*.jpg), each with its true values
beside it in a JSON file of the same name. A Chat Completions server on loopback stands for the model: it really reads the images that it
gets, by OCR (extra `ocr`). Asked for an answer, it gives the true record, or one with all values altered, three times each. Asked for the
place of a value, it gives that of the most similar print, as a model that believes what it has written: the place of the true value for
most altered ones, with edges up to a seventh of a line off. So an altered value is confirmed where the part of the page, read alone, has
it. Wanted: at most 2 % of altered totals and dates.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import copy
import hashlib
import io
import json
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from difflib import SequenceMatcher
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Self

import numpy as np
from evidence import DAY_FORMS, alter_value, classify_value, list_amounts, overlap_boxes, replace_value, squeeze
from PIL import Image

from pipeline import engines
from pipeline.evidence.match import Match, is_choice, list_scalars
from pipeline.evidence.ocr import read_words_by_ocr
from pipeline.evidence.text_layer import PageWords
from pipeline.job import Job
from pipeline.records import SourceRow
from pipeline.schema import dump_json, parse_json
from pipeline.stages.ask import AskStage
from pipeline.stages.record_plan import RecordPlan
from pipeline.stages.render import RenderPlan, RenderStage
from pipeline.stages.settle import SettleStage

JOBS = Path(__file__).parents[1] / "jobs"
SEED, ALTERATIONS = 7, 3
EDGE_ERROR = 1 / 7
LEAST_LIKENESS = 0.5
"""Of a print that the server takes for a value."""
MAX_WORDS = 14
KINDS = ("total", "date", "other amount", "text")
Box = tuple[float, float, float, float]
Counts = Counter[tuple[str, str]]
Labelled = tuple[Path, Any, Path | None]


class ReadingServer:
    """A server whose model reads by OCR. `record` is its answer about a document."""

    def __init__(self) -> None:
        self.record, self.requests, self.read_s = "{}", Counter[str](), 0.0
        self.words, self.turn = dict[str, PageWords](), Lock()
        handler = type("Connection", (Connection,), {"server_of": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.base_url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self) -> Self:
        Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, messages: list[dict[str, Any]]) -> str:
        """Return what the model writes to a conversation."""
        parts = messages[-1]["content"]
        images = [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in parts if "image_url" in part]
        text = "\n".join(part["text"] for part in parts if "text" in part)
        if "bbox_2d" in text:
            self.requests["places"] += 1
            return json.dumps(self.locate_values(text, images))
        if len(parts) > len(images) + 1:
            self.requests["readings"] += 1
            return json.dumps({str(number): join_lines(self.read(image, is_part=True)) or None for number, image in enumerate(images, 1)})
        self.requests["records"] += 1
        return self.record

    def locate_values(self, text: str, images: Sequence[bytes]) -> dict[str, Any]:
        """Return the place of each value in a question, by its number."""
        pages = [self.read(image) for image in images]
        sizes = [Image.open(io.BytesIO(image)).size for image in images]
        found = dict[str, Any]()
        for number, value in re.findall(r"^(\d+)\. [^\n]*?: (\".*\"|[-\d.eE+]+)$", text, re.MULTILINE):
            likest = [find_likest(words, json.loads(value)) for words in pages]
            page = max(range(len(pages)), key=lambda at: likest[at][0])
            likeness, box = likest[page]
            if likeness < LEAST_LIKENESS:
                found[number] = None
                continue
            chance, error = random.Random(str(box)), EDGE_ERROR * min(box[3] - box[1], 40.0)
            edges = [edge + chance.uniform(-error, error) for edge in box]
            if "thousandths" in text:
                edges = [1000 * edge / side for edge, side in zip(edges, sizes[page] * 2, strict=True)]
            most = 1000 if "thousandths" in text else max(max(size) for size in sizes)
            found[number] = {"page": page + 1, "bbox_2d": [min(max(round(edge), 0), most) for edge in edges]}
        return found

    def read(self, image: bytes, is_part: bool = False) -> PageWords:
        """Return the words of an image, with boxes in its pixels if it is a page; the same image is read once."""
        with self.turn:
            name = hashlib.sha256(image).hexdigest()
            if name not in self.words:
                began_s = time.process_time()
                shown = Image.open(io.BytesIO(image)).convert("RGB")
                pixels = np.asarray(shrink_part(shown) if is_part else shown)
                self.words[name] = read_words_by_ocr(1, pixels, pixels.shape[1], pixels.shape[0])
                self.read_s += time.process_time() - began_s
            return self.words[name]


class Connection(BaseHTTPRequestHandler):
    """One connection to the server."""

    protocol_version = "HTTP/1.1"
    server_of: ReadingServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = self.server_of.answer(body["messages"])
        usage = {"prompt_tokens": 1, "completion_tokens": max(1, len(text) // 4), "total_tokens": 1 + max(1, len(text) // 4)}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        data = json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def shrink_part(part: Image.Image) -> Image.Image:
    """Return an enlarged part of a page in half its size on white: PP-OCR enlarges images to 736 px, where letters are too large for it."""
    sheet = Image.new("RGB", (max(736, part.width // 2 + 80), max(736, part.height // 2 + 80)), "white")
    sheet.paste(part.resize((part.width // 2, part.height // 2), Image.Resampling.LANCZOS), (40, 40))
    return sheet


def join_lines(words: PageWords) -> str:
    """Return the words of an image as lines of text; OCR gives them line by line, from the left."""
    lefts = words.boxes[:, 0].tolist()
    marks = ["" if at == 0 else "\n" if lefts[at] <= lefts[at - 1] else " " for at in range(len(lefts))]
    return "".join(mark + text for mark, text in zip(marks, words.texts, strict=True))


def find_likest(words: PageWords, value: Any) -> tuple[float, Box]:
    """Return how like the most similar print on a page is to a value, 0 to 1, and the box around it."""
    forms = {squeeze(form) for form in list_forms(value)} - {""}
    texts, best, place = [squeeze(text) for text in words.texts], 0.0, (0.0, 0.0, 0.0, 0.0)
    for start in range(len(texts)):
        for form in forms:  # a date that OCR has joined with the time after it
            if len(form) > 4 and (at := texts[start].find(form)) >= 0:
                left, top, right, bottom = words.boxes[start].tolist()
                ends = (left + (right - left) * share / len(texts[start]) for share in (at, at + len(form)))
                return 1.0, (next(ends), top, next(ends), bottom)
        joined = ""
        for end in range(start, min(start + MAX_WORDS, len(texts))):
            joined += texts[end]
            for form in forms:
                if 0.6 * len(form) <= len(joined) <= 1.6 * len(form):
                    matcher = SequenceMatcher(None, form, joined, autojunk=False)
                    if matcher.quick_ratio() > best and (likeness := matcher.ratio()) > best:
                        boxes = words.boxes[start : end + 1]
                        place = (*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist())
                        best = likeness
            if len(joined) > 1.6 * max(map(len, forms), default=0):
                break
    return best, place


def list_forms(value: Any) -> Iterator[str]:
    """Yield how a value may be printed."""
    kind, read = classify_value(str(value), day_first=True)
    if isinstance(value, int | float):
        yield from list_amounts(abs(float(value)))
    elif kind == "date":
        yield from (read.strftime(form) for form in DAY_FORMS)
    yield str(value)


def list_documents(folder: Path) -> Iterator[Labelled]:
    """Yield the documents of a folder, each with its true record and, of the samples, its job file."""
    if (folder / "truth").is_dir():
        for truths in sorted((folder / "truth").glob("*.jsonl")):
            for line in truths.read_text().splitlines():
                record = parse_json(line)
                yield folder / truths.stem / record.pop("source"), record, JOBS / f"{truths.stem}.yaml"
        return
    for labels in sorted(folder.glob("*.json")):
        if (file := labels.with_suffix(".jpg")).exists():
            yield file, parse_json(labels.read_text()), None


def make_job(file: Path, record: Any, job_file: Path | None, base_url: str, folder: Path) -> Job:
    """Return the job of one document: the sample's, or one whose schema has texts alone."""
    settings = [
        *("model.engine=openai", f"model.base_url={base_url}", "model.name=qwen2.5-vl by OCR", "model.server=other", "model.max_retries=0"),
        *("model.structure=json_schema", "model.logprobs=false", "evidence.text=off", "evidence.model=on", "sampling.max_tokens=4096"),
        f"source.paths={json.dumps([str(file.absolute())])}",
    ]
    if job_file:
        return Job.load(job_file, settings, folder / "out")
    properties = {name: {"type": ["string", "null"]} for name in record}
    (folder / "schema.json").write_text(json.dumps({"title": "Receipt", "type": "object", "properties": properties}))
    (folder / "job.yaml").write_text(
        "name: receipts\nsource: {paths: [x]}\nextract: {schema: schema.json}\nmodel: {name: x}\noutput: {path: out}"
    )
    return Job.load(folder / "job.yaml", settings)


def read_document_again(job: Job, file: Path, stage: AskStage) -> dict[str, Any]:
    """Return the record of a document as the server's answers make it, without Ray."""

    def claim(_: SourceRow, keys: list[str]) -> Future[dict[str, int]]:
        claimed = Future[dict[str, int]]()
        claimed.set_result(dict.fromkeys(keys, 1))
        return claimed

    data, rendering = Future[bytes](), RenderStage(RenderPlan.of_job(job), claim)
    data.set_result(file.read_bytes())
    listed: Any = {"source": str(file), "size_bytes": file.stat().st_size, "version": "1"}
    try:
        asked = [{**row, "attempt": 1} for row, _ in rendering.render_document(listed, data)]
    finally:
        rendering.close()
    rows = [row for one in asked for row in asyncio.run(stage.answer_rows(one))]  # type: ignore[arg-type]
    document = {**listed, "doc_id": asked[0]["doc_id"], "page_count": asked[0]["page_count"]}
    (record,) = SettleStage(RecordPlan(job), job.pages_per_request, job.fingerprint).build_table([document], rows).to_pylist()
    return dict(record)


def name_kind(path: str, value: Any) -> str:
    """Return the kind of a value, by its path and how it is written."""
    kind = classify_value(str(value), day_first=True)[0]
    is_amount = kind == "amount" or not isinstance(value, str)
    return "date" if kind == "date" else "total" if is_amount and path == "$.total" else "other amount" if is_amount else "text"


def alter_record(job: Job, record: Any, chance: random.Random) -> list[tuple[Any, set[str]]]:
    """Return records with altered values, and the paths of these: each value once in each, as far as there are other ones."""
    made: list[tuple[Any, set[str]]] = [(copy.deepcopy(record), set()) for _ in range(ALTERATIONS)]
    for scalar in list_scalars(record, [job.schema], job.schema):
        if is_choice(scalar):
            continue
        written = str(scalar.value)
        kind, value = classify_value(written, day_first=True)
        kind = kind if isinstance(scalar.value, str) else "amount"
        for at, altered in enumerate(list(alter_value(kind, value, written, chance, day_first=True))[:ALTERATIONS]):
            other = altered if isinstance(scalar.value, str) else parse_json(re.sub(r"^0+(?=\d)", "", altered))
            made[at] = (replace_value(made[at][0], scalar.path, other), made[at][1] | {scalar.path})
    return made


def measure_documents(documents: Iterable[Labelled], misses: bool = False) -> tuple[Counts, ReadingServer]:
    """Return counts of values by kind and outcome, and the server that answered."""
    counts, chance = Counter[tuple[str, str]](), random.Random(SEED)
    with ReadingServer() as server, tempfile.TemporaryDirectory() as scratch:
        for file, record, job_file in documents:
            job = make_job(file, record, job_file, server.base_url, Path(scratch))
            engine = engines.load_engine(job)
            try:
                stage = AskStage(job, engine)
                everything = {scalar.path for scalar in list_scalars(record, [job.schema], job.schema)}
                places = dict[str, list[float]]()
                for state, (shown, paths) in enumerate([(record, everything), *alter_record(job, record, chance)]):
                    server.record = dump_json(shown)
                    found = read_document_again(job, file, stage)
                    count_values(found, paths, "altered" if state else "true", counts, places, file.name if misses else "")
            finally:
                engine.close()
    return counts, server


def count_values(record: Any, paths: set[str], state: str, counts: Counts, places: dict[str, list[float]], name: str) -> None:
    """Count the values of a record that were asked about, located and read again; `places` are those of the true values, by path."""
    matches = {found["path"]: found["match"] for found in record["_evidence"] or []}
    for row in record["_reread"]:
        if row["path"] not in paths:
            continue
        value = row["value"]
        is_text = not re.fullmatch(r"-?\d+(\.\d+)?", value)
        kind, is_reread = name_kind(row["path"], value if is_text else float(value)), matches[row["path"]] == Match.REREAD
        counts[kind, state] += 1
        counts[kind, f"{state} located"] += row["reading"] is not None
        counts[kind, f"{state} reread"] += is_reread
        box = [row["page"], *(row[corner] for corner in ("x0", "y0", "x1", "y1"))]
        if state == "true" and row["page"]:
            places[row["path"]] = box
        true = places.get(row["path"])
        is_same = bool(true and row["page"] == true[0] and overlap_boxes((*box[1:],), (*true[1:],)))
        counts[kind, f"{state} reread there"] += is_reread and is_same
        if name and is_reread != (state == "true"):
            where = "" if state == "true" else "at the true one's place, " if is_same else "elsewhere, "
            print(f"{state}, {where}{matches[row['path']]}: {name} {row['path']} {value!r}, read {row['reading']!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument(
        "--misses", action="store_true", help="print the true values that were not read again, and the altered ones that were"
    )
    options = parser.parse_args()
    began_s = time.process_time()
    documents = [one for folder in options.folders for one in list_documents(folder)]
    counts, server = measure_documents(documents, options.misses)
    titles = ("kind", "true values", "with a place", "reread", "altered", "with a place", "reread at the true one's", "reread elsewhere")
    print(f"| {' | '.join(titles)} |\n| --- |{' ---: |' * (len(titles) - 1)}")
    for kind in KINDS:
        true, altered = (max(1, counts[kind, state]) for state in ("true", "altered"))
        there, reread = counts[kind, "altered reread there"], counts[kind, "altered reread"]
        cells = [
            kind,
            f"{counts[kind, 'true']:,}",
            f"{counts[kind, 'true located'] / true:.1%}",
            f"{counts[kind, 'true reread'] / true:.1%}",
        ]
        cells += [f"{counts[kind, 'altered']:,}", f"{counts[kind, 'altered located'] / altered:.1%}"]
        print("|", " | ".join([*cells, f"{there / altered:.1%}", f"{(reread - there) / altered:.1%}"]), "|")
    print(f"\nrequests: {dict(server.requests)}; OCR {server.read_s:.0f} s of CPU, all {time.process_time() - began_s:.0f} s")


if __name__ == "__main__":
    main()
