"""A page's words come out of a ledger as they went in, to a tenth of a point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.budget import RenderSettings
from pipeline.evidence.text_layer import pack_words, unpack_words
from pipeline.output import Output
from pipeline.output.ledger import LEDGER_SCHEMA, read_requests
from pipeline.output.shards import write_shard
from pipeline.records import Page, Word, WordMark
from pipeline.render.document import render_pages
from pipeline.stages.render import describe_page
from tests.support.pdfs import make_page_pdf


def make_page(*words: Word, width_pt: float = 595, height_pt: float = 842) -> Page:
    return Page(7, np.zeros((28, 28, 3), np.uint8), 100, width_pt, height_pt, 1, words)


def test_words_survive_packing() -> None:
    words = (Word("Müller", 10.04, 20, 30.06, 40), Word("1,50", 100, 200, 594.96, 841.9, WordMark.NO_INK))
    found = unpack_words(7, pack_words(make_page(*words)) or pytest.fail("no words"))
    assert (found.page_no, found.texts, found.marks.tolist()) == (7, ["Müller", "1,50"], [0, 3])
    assert found.boxes == pytest.approx(np.array([[10, 20, 30.1, 40], [100, 200, 595, 841.9]]), abs=0.001)


def test_boxes_are_cut_at_the_page_and_fit_any_page() -> None:
    words = Word("all", -50, -3e30, 3e30, 99), Word("end", 14_000, 14_000, 14_400, 14_400)
    found = unpack_words(7, pack_words(make_page(*words, width_pt=14_400, height_pt=14_400)) or pytest.fail("no words"))
    assert found.boxes == pytest.approx(np.array([[0, 0, 14_400, 99], [14_000, 14_000, 14_400, 14_400]]), abs=0.12)


def test_a_page_without_words_has_no_text_layer() -> None:
    assert pack_words(make_page()) is None


def test_white_space_in_a_word_does_not_make_two() -> None:
    found = unpack_words(7, pack_words(make_page(Word("a\nb c", 0, 0, 1, 1), Word(" ", 2, 0, 3, 1))) or pytest.fail("no words"))
    assert found.texts == ["abc", "\ufffd"]


@pytest.mark.parametrize("change", [{"boxes": bytes(15)}, {"marks": b"\0\0"}, {"marks": b"\x63"}])
def test_columns_that_do_not_fit_are_refused(change: dict[str, bytes]) -> None:
    row = pack_words(make_page(Word("a", 0, 0, 1, 1))) or pytest.fail("no words")
    with pytest.raises(ValueError, match=r"element size|words with the marks"):
        unpack_words(7, {**row, **change})  # type: ignore[typeddict-item]


def test_a_ledger_keeps_the_words_of_its_pages(tmp_path: Path) -> None:
    (page,) = render_pages(make_page_pdf(content=b"BT /F 12 Tf 20 50 Td (Total 19.99) Tj ET"), RenderSettings(text_layer=True))
    output = Output(tmp_path)
    output.create()
    row = {
        "key": "k",
        "attempt": 1,
        "doc_id": "d",
        "first_page": 1,
        "last_page": 1,
        "page_count": 1,
        "pages": [{**describe_page(page), "text_layer": pack_words(page)}],
    }
    write_shard(output.requests, pa.Table.from_pylist([row], LEDGER_SCHEMA), ["k/1"])
    (read,) = read_requests(output, pa.chunked_array([["d"]])).to_pylist()
    found = unpack_words(1, read["pages"][0]["text_layer"])
    assert found.texts == ["Total", "19.99"]
    assert 35 < found.boxes[0, 1] < found.boxes[0, 3] < 60


def test_an_older_ledger_has_pages_without_words_and_is_read_beside_a_new_one(tmp_path: Path) -> None:
    output = Output(tmp_path)
    output.create()
    old = pa.struct([field for field in LEDGER_SCHEMA.field("pages").type.value_type if field.name != "text_layer"])
    at = LEDGER_SCHEMA.get_field_index("pages")
    schemas = LEDGER_SCHEMA, LEDGER_SCHEMA.set(at, pa.field("pages", pa.list_(old)))
    for key, schema in zip("ab", schemas, strict=True):
        row = {"key": key, "attempt": 1, "doc_id": "d", "first_page": 1, "last_page": 1, "page_count": 1, "pages": [{"page_no": 1}]}
        write_shard(output.requests, pa.Table.from_pylist([row], schema), [f"{key}/1"])
    rows = read_requests(output, pa.chunked_array([["d"]])).to_pylist()
    assert [row["pages"][0]["text_layer"] for row in rows] == [None, None]
