"""How sure can one be of a value? Draws invoices in five tiers of degradation, reads them, calibrates on half of them, measures the rest.

    python benchmarks/calibration.py FOLDER [--documents 400]

The tiers are equally large: `clean` PDFs with a text layer; `scan`, as in the demonstration model's training; `pale`, `blurred` and
`photo`, which training never drew. Every sixth document has two pages. The demonstration model answers in this process, without Ray, and
OCR reads the images after it, at 1.2 s of CPU a page; what is in FOLDER already is not asked and not read again. Calibration sees every
second document of each kind of page, and the figures are of the others. The bounds: AUROC above that of the sum of a value's log-
probabilities alone, 0.99 over all and 0.95 in each tier that has errors; ECE 0.02 in each tier; 0.1 % wrong among the surest 90 % of all
values.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, ImageFilter

from pipeline import engines
from pipeline.demo import documents, drawing
from pipeline.demo.documents import HELD_OUT
from pipeline.demo.sheets import DPI, Sheet
from pipeline.demo.truth import format_answer
from pipeline.flow.ocr_pass import OcrPass, count_wanted_pages
from pipeline.flow.passes import settle
from pipeline.flow.pending import identify_documents, list_documents, select_unanswered
from pipeline.flow.preparation import describe_run
from pipeline.job import DEMO_MARK, Job
from pipeline.output import Output
from pipeline.output.ledger import read_ledger_state, write_rows
from pipeline.output.records import read_record_table
from pipeline.output.sources import read_sources, replace_sources
from pipeline.output.words import write_words
from pipeline.records import LedgerRow, OcrRow, Pixels, RequestRow, SourceRow
from pipeline.report import ProgressTracker, Report
from pipeline.score.calibration import LabelledRecord, label_records, measure_half, score_measured
from pipeline.score.cells import Tolerance
from pipeline.score.statistics import Floats
from pipeline.stages.ask import AskStage
from pipeline.stages.calibrate import collect_output_facts
from pipeline.stages.ocr import OcrStage, OcrTaskRow
from pipeline.stages.record_plan import RecordPlan
from pipeline.stages.render import RenderPlan, RenderStage

JOB = Path(__file__).parents[1] / "jobs" / "invoices.yaml"
TIERS = ("clean", "scan", "pale", "blurred", "photo")
FIRST_SEED = HELD_OUT + 3 * 10**6
ASKED_AT_ONCE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=400, help="how many in all (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help="seed of the first document (default: %(default)s)")
    parser.add_argument("--ocr", choices=["off", "scans", "all"], default="scans", help="evidence.ocr (default: %(default)s)")
    parser.add_argument("--pages", type=int, help="read so many pages by OCR at most; the others of FOLDER have no second witness")
    given = parser.parse_args()
    draw_tiers(given.folder, given.documents, given.first_seed)
    settings = [f"source.paths={json.dumps([str(given.folder / 'documents.csv')])}", "model.name=demo", "model.engine=transformers"]
    settings += [f"evidence.ocr={given.ocr}"]
    job = engines.resolve_engine(Job.load(JOB, settings, given.folder / "out"), gpus=0)
    began_s = time.monotonic()
    asked = ask_here(job)
    print(f"{asked} requests asked in {time.monotonic() - began_s:.0f} s")
    settle(job)
    if given.ocr != "off":
        began_s = time.process_time()
        read = read_here(job, given.pages)
        print(f"{read} pages read by OCR in {time.process_time() - began_s:.0f} s of CPU")
        settle(job)
    truth = given.folder / "truth.jsonl"
    records = read_record_table(str(job.output))
    labelled = label_records(records, collect_output_facts(records), truth, Tolerance())
    began_s = time.process_time()
    measured = measure_half(labelled)
    print(f"fitted in {time.process_time() - began_s:.1f} s of CPU\n")
    print_figures(measured)


def print_figures(measured: Sequence[tuple[LabelledRecord, Floats]]) -> None:
    """Print each figure beside its bound, those that miss it with a cross."""
    groups = {"all": measured}
    groups |= {tier: [one for one in measured if Path(one[0].source).name.startswith(f"{tier}-")] for tier in TIERS}
    print("| tier | documents | values | wrong % | AUROC | of tokens alone | ECE | Brier | wrong of surest 90 % |")
    print("| --- |" + " ---: |" * 8)
    for name, some in groups.items():
        found = score_measured(some)
        least = 0.99 if name == "all" else 0.95
        auroc, tokens, ece, surest = (found[key] for key in ("auroc", "auroc_tokens", "ece", "wrong_of_surest"))
        cells = [name, found["documents"], found["values"], f"{100 * found['errors'] / max(1, found['values']):.2f}"]
        cells.append("–" if auroc is None else f"{auroc:.4f} (> {least} {mark_bound(auroc >= least)})")
        cells.append("–" if auroc is None or tokens is None else f"{tokens:.4f} {mark_bound(auroc > tokens)}")
        cells.append(f"{ece:.4f}" + (f" (< 0.02 {mark_bound(ece <= 0.02)})" if name != "all" else ""))
        cells.append(f"{found['brier']:.4f}")
        cells.append(f"{100 * surest:.2f} %" + (f" (< 0.1 {mark_bound(surest <= 0.001)})" if name == "all" else ""))
        print("|", " | ".join(map(str, cells)), "|")


def mark_bound(is_kept: bool) -> str:
    return "✓" if is_kept else "✗"


def draw_tiers(folder: Path, count: int, first_seed: int) -> None:
    """Write the documents, `documents.csv` with their tiers, and `truth.jsonl`."""
    (folder / "documents").mkdir(parents=True, exist_ok=True)
    rows, truths = ["path,tier"], []
    for number in range(count):
        tier, pages = TIERS[number % len(TIERS)], 2 if number // len(TIERS) % 6 == 5 else 1
        sample = documents.draw_sample(first_seed + number, "invoice", pages)
        name = f"{tier}-{number:04}.{'pdf' if tier == 'clean' else 'tiff' if pages > 1 else 'jpg'}"
        file, data = folder / "documents" / name, draw_document(sample.sheets, tier, random.Random(f"tier/{first_seed + number}"))
        if not file.exists() or file.read_bytes() != data:  # else its time of change would make it another document
            file.write_bytes(data)
        rows.append(f"documents/{name},{tier}")
        truths.append(format_answer({"source": name, **sample.truth}))
    (folder / "documents.csv").write_text("\n".join(rows) + "\n")
    (folder / "truth.jsonl").write_text("\n".join(truths) + "\n")


def draw_document(sheets: tuple[Sheet, ...], tier: str, rng: random.Random) -> bytes:
    """Return the sheets as the bytes of a file."""
    if tier == "clean":
        return drawing.draw_pdf(sheets)
    pages = [Image.fromarray(degrade_page(drawing.rasterize_sheet(sheet), tier, rng)) for sheet in sheets]
    buffer, options = io.BytesIO(), dict[str, Any](dpi=(DPI, DPI))
    if len(pages) > 1:
        pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:], compression="tiff_adobe_deflate", **options)
    else:
        pages[0].save(buffer, "JPEG", quality=rng.randint(70, 92), comment=DEMO_MARK, **options)
    return buffer.getvalue()


def degrade_page(page: Pixels, tier: str, rng: random.Random) -> Pixels:
    """Return the page (height, width, 3) as the tier shows it, in a degree that a person reads without effort."""
    if tier == "scan":
        return drawing.simulate_scan(page, rng)[0]
    image = Image.fromarray(page)
    if tier == "photo":
        image = warp_page(image, rng)
    image = image.filter(ImageFilter.GaussianBlur({"pale": 0.2, "blurred": rng.uniform(0.65, 1.0), "photo": rng.uniform(0.2, 0.4)}[tier]))
    height, width = page.shape[:2]
    ink, paper = (rng.uniform(60, 90), rng.uniform(210, 235)) if tier == "pale" else (rng.uniform(20, 60), rng.uniform(225, 245))
    light = np.ones((height, width, 1))
    if tier == "photo":
        angle, fall = rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.16)
        y, x = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
        light -= fall * (0.5 + x * np.cos(angle) + y * np.sin(angle))[..., None].clip(0, 1)
        light = light * np.array([1.0, rng.uniform(0.97, 1.0), rng.uniform(0.92, 0.98)])
    noise = np.random.default_rng(rng.randrange(2**32)).standard_normal((height, width, 1)) * rng.uniform(1, 6)
    shown = (ink + np.asarray(image, np.float64) * ((paper - ink) / 255)) * light + noise
    return shown.clip(0, 255).astype(np.uint8)


def warp_page(image: Image.Image, rng: random.Random) -> Image.Image:
    """Return the page as a camera sees it that is not held straight: its corners up to a pixel off."""
    width, height = image.size
    corners = [(x + rng.uniform(-1, 1), y + rng.uniform(-1, 1)) for x, y in ((0, 0), (width, 0), (width, height), (0, height))]
    rows, sides = [], []
    for (u, v), (x, y) in zip(((0, 0), (width, 0), (width, height), (0, height)), corners, strict=True):
        rows += [[u, v, 1, 0, 0, 0, -x * u, -x * v], [0, 0, 0, u, v, 1, -y * u, -y * v]]
        sides += [x, y]
    found = np.linalg.solve(np.array(rows, float), np.array(sides))
    return image.transform(image.size, Image.Transform.PERSPECTIVE, found.tolist(), Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))


def ask_here(job: Job) -> int:
    """Ask what the output lacks, in this process, and write its ledger as a run would; return the number of requests."""
    output = Output(job.output)
    output.create()
    output.write_job(describe_run(job))
    state = read_ledger_state(output)
    listed = identify_documents(output, list_documents(job))
    replace_sources(output, listed)
    waiting, done = select_unanswered(job, listed, state).to_pylist(), state.done
    identified: list[LedgerRow] = []

    def claim(document: SourceRow, keys: list[str]) -> Future[dict[str, int]]:
        claimed = Future[dict[str, int]]()
        claimed.set_result({key: 1 for key in keys if key not in done})
        if not claimed.result():
            identified.append(cast(LedgerRow, {**document, "key": None}))
        return claimed

    stage = RenderStage(RenderPlan.of_job(job), claim)
    engine = engines.load_engine(job)
    count = 0
    try:
        asking = AskStage(job, engine)
        drawn = stage.render_documents(cast(Iterable[SourceRow], waiting))
        for batch in split_rows(cast(RequestRow, {**request.row, "attempt": 1}) for request in drawn):
            write_rows(output, asyncio.run(answer_rows(asking, batch)))
            count += len(batch)
            print(f"\r{count} of {len(waiting)}", end="", flush=True)
        write_rows(output, identified)
    finally:
        engine.close()
        stage.close()
    return count


def read_here(job: Job, most: int | None) -> int:
    """Read the pages by OCR that the job wants and the output lacks, in this process, and write their words; return their number."""
    output = Output(job.output)
    output.words.create()
    tracker = ProgressTracker(Report("", "", "", demonstration=True), lambda _: None)
    wanted = OcrPass(job, output, tracker, RecordPlan(job).schema).select_pages(read_sources(output))
    stage, count = OcrStage(RenderPlan.of_job(job)), 0
    try:
        for row in islice(stage.read_documents(cast(Iterable[OcrTaskRow], wanted.to_pylist())), most):
            write_words(output, [cast(OcrRow, row)])
            count += 1
            print(f"\r{count} of {count_wanted_pages(wanted)}", end="", flush=True)
    finally:
        stage.close()
    return count


async def answer_rows(asking: AskStage, rows: list[RequestRow]) -> list[LedgerRow]:
    return list(await asyncio.gather(*map(asking.answer_row, rows)))


def split_rows(rows: Iterator[RequestRow]) -> Iterator[list[RequestRow]]:
    batch: list[RequestRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) == ASKED_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


if __name__ == "__main__":
    main()
