"""Sample documents: writes the files in `jobs/samples` from fixed seeds, and their truth (the records they show) next to them.

    python -m pipeline.demo.samples jobs/samples

    jobs/samples/invoices/   PDFs of one and of two pages, scanned-looking JPEGs and TIFFs of two pages
    jobs/samples/receipts/   PDFs, JPEGs, a PNG
    jobs/samples/truth/      invoices.jsonl and receipts.jsonl: {"source": "invoice-01.pdf", "seller_name": …, …}

The same seeds give the same bytes. Training draws other seeds.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from pipeline.demo import documents, drawing
from pipeline.demo.documents import HELD_OUT, Form
from pipeline.demo.sheets import DPI, Sheet
from pipeline.demo.truth import format_answer
from pipeline.job import DEMO_MARK
from pipeline.records import Pixels

SAMPLES_SEED = HELD_OUT + 1575
"""Chosen from two thousand because its documents have many currencies, lengths and missing fields; not by how well they are read."""
SCAN_JPEG_QUALITY = 92
"""Quality of the written file; the simulated scan in it was compressed once before."""


@dataclass(frozen=True)
class SamplePlan:
    """A document to be drawn: its form, file type and number of pages."""

    form: Form
    ending: str
    pages: int = 1


@dataclass(frozen=True)
class DrawnDocument:
    """A document as the bytes of a file, and its truth."""

    form: Form
    name: str
    pages: int
    data: bytes
    truth: dict[str, Any]


SAMPLES = (
    *[SamplePlan("invoice", "pdf")] * 5,
    *[SamplePlan("invoice", "pdf", pages=2)] * 2,
    *[SamplePlan("invoice", "jpg")] * 3,
    *[SamplePlan("invoice", "tiff", pages=2)] * 2,
    *[SamplePlan("receipt", "pdf")] * 3,
    *[SamplePlan("receipt", "jpg")] * 2,
    SamplePlan("receipt", "png"),
)


def draw_documents(plans: Iterable[SamplePlan], first_seed: int) -> list[DrawnDocument]:
    """Return a document for each plan, of consecutive seeds; names are numbered within a form."""
    drawn: list[DrawnDocument] = []
    for seed, plan in enumerate(plans, first_seed):
        sample = documents.draw_sample(seed, plan.form, plan.pages)
        number = 1 + sum(one.form == plan.form for one in drawn)
        data = encode_sheets(sample.sheets, plan.ending, random.Random(f"scan/{seed}"))
        drawn.append(DrawnDocument(plan.form, f"{plan.form}-{number:02}.{plan.ending}", plan.pages, data, sample.truth))
    return drawn


def encode_sheets(sheets: tuple[Sheet, ...], ending: str, rng: random.Random) -> bytes:
    """Return the sheets as the bytes of a file: a clean PDF or PNG, or a simulated scan as JPEG or TIFF."""
    if ending == "pdf":
        return drawing.draw_pdf(sheets)
    pages = [drawing.rasterize_sheet(sheet) for sheet in sheets]
    if ending == "png":
        comment = PngInfo()
        comment.add_text("Comment", DEMO_MARK.decode())
        return encode_lossless(pages, "PNG", pnginfo=comment)
    scans = [drawing.simulate_scan(page, rng)[0] for page in pages]
    return (
        drawing.encode_scan_jpeg(scans[0], SCAN_JPEG_QUALITY)
        if ending == "jpg"
        else encode_lossless(scans, "TIFF", compression="tiff_adobe_deflate", tiffinfo={ExifTags.Base.ImageDescription: DEMO_MARK.decode()})
    )


def encode_lossless(pages: list[Pixels], kind: str, **options: Any) -> bytes:
    """Return the pages, which have no colour, as one grey image file."""
    first, *rest = [Image.fromarray(page[..., 1]) for page in pages]
    more = {"save_all": True, "append_images": rest} if rest else {}
    buffer = io.BytesIO()
    first.save(buffer, kind, dpi=(DPI, DPI), **more, **options)
    return buffer.getvalue()


def write_documents(drawn: Iterable[DrawnDocument], folder: Path) -> None:
    """Write the documents, without their truth, into the folders `invoices` and `receipts` of a folder."""
    for one in drawn:
        subfolder = folder / f"{one.form}s"
        subfolder.mkdir(parents=True, exist_ok=True)
        (subfolder / one.name).write_bytes(one.data)


def write_truth(drawn: Iterable[DrawnDocument], folder: Path) -> None:
    """Write one JSON line per document: the name of its file, then the record in the schema's order."""
    lines: dict[Form, list[str]] = {}
    for one in drawn:
        lines.setdefault(one.form, []).append(format_answer({"source": one.name, **one.truth}) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for form, texts in lines.items():
        (folder / f"{form}s.jsonl").write_text("".join(texts), encoding="utf-8")


def read_truth(file: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a truth file by their documents' names, money as Decimal."""
    records = [json.loads(line, parse_float=Decimal) for line in file.read_text(encoding="utf-8").splitlines()]
    return {record.pop("source"): record for record in records}


def samples_main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write, for example jobs/samples")
    parser.add_argument("--first-seed", type=int, default=SAMPLES_SEED, help="seed of the first document (default: %(default)s)")
    given = parser.parse_args()
    drawn = draw_documents(SAMPLES, given.first_seed)
    write_documents(drawn, given.folder)
    write_truth(drawn, given.folder / "truth")
    print(f"{len(drawn)} documents in {given.folder}, {sum(len(one.data) for one in drawn):,} bytes")


if __name__ == "__main__":
    samples_main()
