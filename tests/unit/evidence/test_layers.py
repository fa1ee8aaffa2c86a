"""A page that was read twice: which reading is the better witness, and where the two are different texts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.evidence.alerts import list_alerts
from pipeline.evidence.layers import is_page_different, is_same_text, judge_layer, order_witnesses
from pipeline.evidence.match import Match, Witness, match_values
from pipeline.evidence.text_layer import PageWords
from pipeline.records import PageLayer, WordMark
from tests.support.printed import print_page

PAPER = np.full((420, 280, 3), 255, np.uint8)
STORY = " ".join(f"word{number:03}" for number in range(60))
OTHER = " ".join(f"else{number:03}" for number in range(60))


def read_by_ocr(text: str) -> PageWords:
    return replace(print_page(text), is_ocr=True)


def test_a_usable_layer_is_the_first_witness_and_ocr_shows_what_it_lacks() -> None:
    pages = order_witnesses(print_page("Total 19,99"), read_by_ocr("Total 19,99 Tea"), PageLayer.USABLE)
    total, tea = match_values({}, {"total": 19.99, "item": "Tea"}, pages)
    assert (total.witness, total.places, tea.witness, tea.match) == (Witness.TEXT, 1, Witness.OCR, Match.EXACT)


@pytest.mark.parametrize("layer", [PageLayer.OCR_SOFTWARE, PageLayer.GARBAGE, PageLayer.PICTURES])
def test_ocr_is_a_better_witness_than_any_other_layer(layer: PageLayer) -> None:
    pages = order_witnesses(print_page("Total 19,99 Milk", mark=WordMark.OVERLAY), read_by_ocr("Total 19,99"), layer)
    total, milk = match_values({}, {"total": 19.99, "item": "Milk"}, pages)
    assert (total.witness, milk.witness) == (Witness.OCR, Witness.OCR_LAYER)


def test_a_page_without_words_of_ocr_is_as_before() -> None:
    layer = print_page("Total")
    assert order_witnesses(layer, None, None) == [layer]
    assert order_witnesses(layer, print_page(""), PageLayer.NONE) == [layer]


def test_a_layer_whose_characters_are_no_letters_is_garbage() -> None:
    assert judge_layer(print_page("\ue001\ue002\ue003 Tea"), PAPER, 200, 300) == PageLayer.GARBAGE
    assert judge_layer(print_page("Tea Milk", mark=WordMark.OVERLAY), PAPER, 200, 300) == PageLayer.OCR_SOFTWARE


def test_a_layer_of_another_text_is_an_alert_of_its_page() -> None:
    assert [alert["reason"] for alert in list_alerts([print_page(STORY), replace(read_by_ocr(OTHER), is_second=True)], [])] == ["page"]


@pytest.mark.parametrize(
    ("layer", "ocr"),
    [(STORY, STORY.replace("word00", "w0rd00")), (STORY, ""), ("Tea Milk", OTHER), (STORY, "12 14 16")],
    ids=["errors", "nothing read", "few words", "nothing to compare"],
)
def test_a_page_that_ocr_reads_badly_is_no_alert(layer: str, ocr: str) -> None:
    assert not is_page_different(print_page(layer), read_by_ocr(ocr))


def test_a_value_in_whose_place_the_layer_has_another_is_an_alert() -> None:
    pages = order_witnesses(print_page("Total 11,11"), read_by_ocr("Total 19,99"), PageLayer.USABLE)
    (alert,) = list_alerts(pages, match_values({}, {"total": 19.99}, pages))
    assert (alert["kind"], alert["reason"], alert["text"], alert["path"]) == ("different_text", "value", "11,11", "$.total")


def test_a_value_that_is_drawn_as_a_picture_is_no_alert() -> None:
    pages = order_witnesses(print_page("Total 11,11"), read_by_ocr("Total 11,11 Tea"), PageLayer.USABLE)
    assert list_alerts(pages, match_values({}, {"item": "Tea"}, pages)) == []


@pytest.mark.parametrize(
    ("read", "layer", "is_same"),
    [
        ("2,742.5", "2,742.5", True),
        ("1998", "1998-2020", True),
        ("44,200", "(44,200)", True),
        ("Princeton University Together AI", "5Princeton University 6Together AI", True),
        ("Muller", "Müller", True),
        ("1", "I,", True),
        ("19.99", "119.99", False),
        ("19.99", "19.90", False),
        ("12", "112", False),
        ("DE89 3704", "DE89 3705", False),
        ("Muller", "Miller", False),
    ],
)
def test_a_layer_has_the_words_that_ocr_reads_where_they_are_whole(read: str, layer: str, is_same: bool) -> None:
    assert is_same_text(read, layer) is is_same


def test_a_value_that_the_layer_has_in_another_column_is_no_alert() -> None:
    """The layer's own place of the number counts as another number of the table there, and OCR, which read less, shows it."""
    layer, ocr = print_page("Growth 2.36", "Sum 7"), read_by_ocr("Growth 2.36")
    (found,) = match_values({}, {"growth": 2.36}, [ocr])
    assert found.witness == Witness.OCR
    assert list_alerts(order_witnesses(layer, ocr, PageLayer.USABLE), [found]) == []
