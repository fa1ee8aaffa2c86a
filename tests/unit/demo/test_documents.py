"""The synthetic documents: their drawing, their truth, and the sample files made from them."""

from __future__ import annotations

import io
import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import schema
from pipeline.budget import RenderSettings
from pipeline.demo import documents, drawing, samples
from pipeline.demo.documents import HELD_OUT, Form, Sample
from pipeline.demo.samples import SamplePlan
from pipeline.demo.sheets import HEIGHT_PX, WIDTH_PX, measure_characters
from pipeline.demo.truth import format_answer, list_leaves
from pipeline.render.document import render_pages
from pipeline.schema.validate import Validator

ROOT = Path(__file__).parents[3]
KINDS: list[tuple[Form, int]] = [("invoice", 1), ("receipt", 1), ("invoice", 2)]
SEEDS = range(HELD_OUT + 2 * 10**6, HELD_OUT + 2 * 10**6 + 60)
SAMPLES = [documents.draw_sample(seed, form, pages) for form, pages in KINDS for seed in SEEDS]
SCHEMAS = {form: schema.load_schema(ROOT / f"schemas/{form}.json") for form in ("invoice", "receipt")}


def join_runs(sample: Sample) -> str:
    return " ".join(run.text for sheet in sample.sheets for run in sheet.runs)


def render_file(data: bytes) -> list[Any]:
    """Return the pixels of a file's pages, rendered with the jobs' budget."""
    return [page.pixels for page in render_pages(data, RenderSettings())]


# --- the documents


@pytest.mark.parametrize(("form", "count"), KINDS)
def test_a_seed_always_gives_the_same_document(form: Form, count: int) -> None:
    assert documents.draw_sample(7, form, count) == documents.draw_sample(7, form, count)
    assert documents.draw_sample(7, form, count) != documents.draw_sample(8, form, count)


def test_a_document_has_the_pages_it_was_asked_for() -> None:
    assert [len(sample.sheets) for sample in SAMPLES] == [pages for _, pages in KINDS for _ in SEEDS]


def test_the_truth_has_the_schema_s_keys_in_the_schema_s_order() -> None:
    for sample in SAMPLES:
        known = SCHEMAS[sample.form]["properties"]
        assert list(sample.truth) == list(known)
        for item in sample.truth["line_items"]:
            assert list(item) == list(known["line_items"]["items"]["properties"])


def test_the_truth_satisfies_the_schema() -> None:
    validators = {form: Validator(given) for form, given in SCHEMAS.items()}
    for sample in SAMPLES:
        assert validators[sample.form].find_violations(schema.parse_json(format_answer(sample.truth))) == []


def test_the_sums_add_up() -> None:
    for truth in (sample.truth for sample in SAMPLES):
        lines = sum(item["amount"] for item in truth["line_items"])
        assert lines + (truth["tax_amount"] or 0 if "subtotal" in truth else 0) == truth["total"]


def test_every_text_of_the_truth_is_printed_and_so_is_every_amount() -> None:
    for sample in SAMPLES:
        text = join_runs(sample)
        digits = "".join(c for c in text if c.isdigit())
        for path, value in list_leaves(sample.truth):
            if isinstance(value, Decimal):
                assert f"{value:.2f}".replace(".", "") in digits, path
            elif isinstance(value, str) and not path.endswith(("date", ".currency", ".payment_method")):
                assert value in text, path


def test_every_run_and_rule_lies_inside_the_page() -> None:
    for sheet in (sheet for sample in SAMPLES for sheet in sample.sheets):
        for run in sheet.runs:
            right_px = run.x_px + sum(measure_characters(run.text, run.font, run.size_px))
            assert 0 <= run.x_px < right_px <= WIDTH_PX, run
            assert run.size_px <= run.y_px <= HEIGHT_PX - 0.25 * run.size_px, run
        assert all(0 <= rule.x0_px <= rule.x1_px <= WIDTH_PX and 0 <= rule.y0_px <= HEIGHT_PX for rule in sheet.rules)


def test_texts_of_one_row_do_not_touch() -> None:
    for sheet in (sheet for sample in SAMPLES for sheet in sample.sheets):
        ends: dict[float, float] = {}  # each row's right end so far
        for run in sorted(sheet.runs, key=lambda run: run.x_px):
            assert run.x_px > ends.get(run.y_px, -1.0), run
            ends[run.y_px] = run.x_px + sum(measure_characters(run.text, run.font, run.size_px))


def test_fields_that_may_be_null_are_missing_sometimes() -> None:
    missing = {(sample.form, name) for sample in SAMPLES for name, value in sample.truth.items() if value is None}
    assert {name for form, name in missing if form == "receipt"} == {"receipt_number", "tax_amount", "payment_method"}
    assert {name for form, name in missing if form == "invoice"} == {
        "seller_tax_id", "buyer_name", "invoice_number", "due_date", "purchase_order", "subtotal", "tax_amount"
    }  # fmt: skip


def test_an_answer_is_compact_json_with_two_decimals() -> None:
    truth = {"name": "Zoë", "total": Decimal("12.3"), "items": [{"count": 2, "price": Decimal(7)}], "date": None}
    assert format_answer(truth) == '{"name":"Zoë","total":12.30,"items":[{"count":2,"price":7.00}],"date":null}'


def test_leaves_are_all_values_with_their_paths() -> None:
    record = {"a": 1, "b": [{"c": 2}, {"c": None}], "d": []}
    assert dict(list_leaves(record)) == {"$.a": 1, "$.b[0].c": 2, "$.b[1].c": None, "$.d": None}


# --- the drawings


@pytest.mark.parametrize(("form", "count"), KINDS)
def test_a_pdf_s_text_layer_holds_what_is_printed(form: Form, count: int) -> None:
    sample = documents.draw_sample(SEEDS[0], form, count)
    found = [[word.text for word in page.words] for page in render_pages(drawing.draw_pdf(sample.sheets), RenderSettings(text_layer=True))]
    assert [sorted(words) for words in found] == [sorted(" ".join(run.text for run in sheet.runs).split()) for sheet in sample.sheets]


def test_the_pipeline_renders_a_pdf_to_the_pixels_that_training_saw() -> None:
    for sample in SAMPLES[:3]:
        (found,) = render_file(drawing.draw_pdf(sample.sheets))
        assert (found != drawing.rasterize_sheet(sample.sheets[0])).mean() < 0.005  # a glyph may be placed a quarter of a pixel further


def test_a_scan_is_of_the_same_size_and_slightly_turned() -> None:
    page = drawing.rasterize_sheet(SAMPLES[0].sheets[0])
    scan, angle = drawing.simulate_scan(page, random.Random(1))
    assert (scan.shape, scan.dtype) == (page.shape, np.uint8) == ((HEIGHT_PX, WIDTH_PX, 3), np.uint8)
    assert 0 < abs(angle) <= 0.5
    assert not np.array_equal(scan, page)


def test_a_scan_of_one_seed_is_always_the_same() -> None:
    page = drawing.rasterize_sheet(SAMPLES[0].sheets[0])
    one, other = (drawing.simulate_scan(page, random.Random(1))[0] for _ in range(2))
    assert np.array_equal(one, other)


# --- the sample files

PLANS = [SamplePlan("invoice", "pdf"), SamplePlan("invoice", "tiff", pages=2), SamplePlan("receipt", "jpg"), SamplePlan("receipt", "png")]


def test_drawing_twice_gives_the_same_bytes() -> None:
    assert samples.draw_documents(PLANS, 5) == samples.draw_documents(PLANS, 5)


def test_files_are_what_their_endings_say_and_keep_the_page_s_size() -> None:
    drawn = samples.draw_documents(PLANS, HELD_OUT)
    assert [one.name for one in drawn] == ["invoice-01.pdf", "invoice-02.tiff", "receipt-01.jpg", "receipt-02.png"]
    assert [Image.open(io.BytesIO(one.data)).format for one in drawn[1:]] == ["TIFF", "JPEG", "PNG"]
    for one in drawn:
        assert [page.shape for page in render_file(one.data)] == [(HEIGHT_PX, WIDTH_PX, 3)] * one.pages


def test_a_png_is_clean_and_a_tiff_a_scan_that_loses_nothing_more() -> None:
    _, tiff, _, png = samples.draw_documents(PLANS, HELD_OUT)
    sheet = documents.draw_sample(HELD_OUT + 3, "receipt").sheets[0]
    assert np.array_equal(render_file(png.data)[0], drawing.rasterize_sheet(sheet))
    scan, _ = drawing.simulate_scan(
        drawing.rasterize_sheet(documents.draw_sample(HELD_OUT + 1, "invoice", 2).sheets[0]), random.Random(f"scan/{HELD_OUT + 1}")
    )
    assert np.abs(render_file(tiff.data)[0].astype(int) - scan).max() <= 3  # a grey JPEG decodes to channels a shade apart


def test_written_truth_reads_back_with_exact_money(tmp_path: Path) -> None:
    drawn = samples.draw_documents(PLANS, HELD_OUT)
    samples.write_truth(drawn, tmp_path)
    read = samples.read_truth(tmp_path / "invoices.jsonl") | samples.read_truth(tmp_path / "receipts.jsonl")
    assert read == {one.name: one.truth for one in drawn}


def test_the_files_in_jobs_are_the_samples_of_these_seeds() -> None:
    folder = ROOT / "jobs/samples"
    drawn = samples.draw_documents(samples.SAMPLES, samples.SAMPLES_SEED)
    files = {f"{one.form}s/{one.name}" for one in drawn} | {"truth/invoices.jsonl", "truth/receipts.jsonl"}
    assert {str(file.relative_to(folder)) for file in folder.rglob("*.*")} == files
    for form in ("invoice", "receipt"):
        lines = [format_answer({"source": one.name, **one.truth}) for one in drawn if one.form == form]
        assert (folder / f"truth/{form}s.jsonl").read_text(encoding="utf-8").splitlines() == lines


def test_the_samples_are_held_out_small_and_some_lack_a_field() -> None:
    assert samples.SAMPLES_SEED >= HELD_OUT
    assert sum(file.stat().st_size for file in (ROOT / "jobs/samples").rglob("*.*")) < 2**20
    truth = [json.loads(line) for line in (ROOT / "jobs/samples/truth/invoices.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {"invoice_number", "buyer_name", "due_date"} <= {name for record in truth for name, value in record.items() if value is None}
