"""Words that a reader cannot see are found, however they are hidden; what a reader sees is not taken for hidden."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.budget import PixelBudget, RenderSettings
from pipeline.evidence.alerts import list_alerts
from pipeline.evidence.match import Match, match_values
from pipeline.evidence.text_layer import PageWords, pack_words, unpack_words
from pipeline.records import WordMark
from pipeline.render.document import render_pages
from tests.support.hidden import HONEST, ORDER, SCAN, WAYS, make_hidden_pdf, write

ATTACKS = Path(__file__).parents[4] / "shared/corpora/attacks/text_attack_train.json"


def read(data: bytes, *, max_pixels: int = 1280 * 784) -> list[PageWords]:
    pages = render_pages(data, RenderSettings(PixelBudget(784, max_pixels), text_layer=True))
    return [unpack_words(page.page_no, row) for page in pages if (row := pack_words(page))]


@pytest.mark.parametrize("max_pixels", [1280 * 784, 300 * 784])
@pytest.mark.parametrize("way", WAYS)
def test_hidden_text_is_an_alert(way: str, max_pixels: int) -> None:
    pages = read(WAYS[way](ORDER), max_pixels=max_pixels)
    (alert,) = list_alerts(pages, [])
    assert (alert["kind"], alert["page"]) == ("hidden_text", 1)
    assert " ".join(alert["text"].replace("…", "").split()) == ORDER
    assert {"Invoice", "4711", "Total", "25.00"} <= {
        text for text, mark in zip(pages[0].texts, pages[0].marks.tolist(), strict=True) if mark <= WordMark.OVERLAY
    }


@pytest.mark.parametrize("way", WAYS)
def test_a_value_that_only_hidden_text_shows_is_an_alert_of_its_own(way: str) -> None:
    pages = read(WAYS[way]("Sum 99.00"))
    evidence = match_values({}, {"total": Decimal(99), "shown": Decimal(25)}, pages)
    assert [found.match for found in evidence] == [Match.HIDDEN, Match.NORMALIZED]
    assert [(alert["kind"], alert["path"]) for alert in list_alerts(pages, evidence)] == [("hidden_value", "$.total")]


@pytest.mark.parametrize("name", HONEST)
def test_what_a_reader_sees_is_no_alert(name: str) -> None:
    pages = read(HONEST[name])
    assert list_alerts(pages, []) == []
    assert WordMark.PRINTED in pages[0].marks


def test_text_over_a_scan_s_ink_is_what_ocr_software_adds() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 3 * 99 * 99, np.uint8).tobytes()
    scan = make_hidden_pdf(write("Invoice 4711 over the scan", before="3 Tr"), image=noise, first=SCAN)
    (page,) = read(scan.replace(b"/Width 1/Height 1", b"/Width 99/Height 99"))
    marks = dict(zip(page.texts, page.marks.tolist(), strict=True))
    assert (marks["over"], marks["scan"]) == (WordMark.OVERLAY, WordMark.OVERLAY)
    assert list_alerts([page], []) == []


def test_text_beneath_a_scan_is_what_ocr_software_adds() -> None:
    picture = Image.new("RGB", (800, 1132), "white")
    ImageDraw.Draw(picture).text((50, 440), "Invoice 4711 over the scan", fill="black", font_size=18)
    image = picture.tobytes()
    scan = make_hidden_pdf(write("Invoice 4711 over the scan") + SCAN, image=image).replace(b"/Width 1/Height 1", b"/Width 800/Height 1132")
    (page,) = read(scan)
    marks = dict(zip(page.texts, page.marks.tolist(), strict=True))
    assert (marks["over"], marks["scan"]) == (WordMark.OVERLAY, WordMark.OVERLAY)


def test_words_keep_the_reading_order_and_their_places() -> None:
    (page,) = read(WAYS["white"]("hidden here"))
    assert page.texts == ["Invoice", "4711", "Total", "25.00", "hidden", "here"]
    assert page.marks.tolist() == [0, 0, 0, 0, WordMark.NO_INK, WordMark.NO_INK]
    assert page.boxes[4] == pytest.approx((40, 329, 75, 346), abs=3)


@pytest.mark.skipif(not ATTACKS.exists(), reason="the collection of injections is not here")
def test_instructions_that_people_smuggled_into_documents_are_alerts_where_they_are_hidden() -> None:
    orders = [order for some in json.loads(ATTACKS.read_text()).values() for order in some]
    assert len(orders) >= 40
    for number, order in enumerate(orders):
        way = [*WAYS][number % len(WAYS)]
        text = re.sub(r"[^\x20-\x7e]|[()\\]", " ", order)[:70]
        assert list_alerts(read(WAYS[way](text)), []), f"{way}: {text}"
        assert list_alerts(read(make_hidden_pdf(write(text, size=9))), []) == [], text
