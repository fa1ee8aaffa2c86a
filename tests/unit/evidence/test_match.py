"""Each value of a record is found where it is printed, in whatever form, and an altered one is not."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evidence.letters import LetterIndex, squeeze_letters
from pipeline.evidence.match import Evidence, Match, Witness, make_evidence_row, match_values
from pipeline.evidence.text_layer import PageWords
from pipeline.records import WordMark
from pipeline.schema import parse_json
from tests.support.printed import print_page

DAY = {"type": "object", "properties": {"value": {"type": "string", "format": "date"}}}


def find(value: Any, *pages: str, schema: dict[str, Any] | None = None) -> Evidence:
    (found,) = match_values(schema or {}, {"value": value}, [print_page(page, number) for number, page in enumerate(pages, 1)])
    return found


@settings(max_examples=1000, deadline=None)
@given(st.text() | st.text("019\u0663\u00b2\u00bda\u00e9\u00df_ .,-~\u0300\U00020000\U00030000\ud800"))
def test_a_value_has_the_letters_that_a_page_with_it_has(text: str) -> None:
    assert squeeze_letters(text) == LetterIndex(text).letters


# --- forms of a value


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ("Acme Ltd", "Acme Ltd"),
        ("Smith (R)", "Smith (R) and others"),
        ("Tea, black", "Tea, black"),
        (Decimal("19.99"), "EUR 19.99"),
        (7, "7 pieces"),
        ("$6,025.00", "$6,025.00"),
        ("2020-05-22", "2020-05-22"),
    ],
)
def test_what_is_printed_as_written_is_exact(value: Any, printed: str) -> None:
    assert find(value, printed).match == Match.EXACT


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ("Acme Ltd", "ACME LTD."),
        ("Müller Straße", "MÜLLER STRASSE"),
        ("delivery note", "deliv-\nery note"),
        ("office", "oﬃce"),
        ("DE89370400440532013000", "DE89 3704 0044 0532 0130 00"),
        (Decimal("1234.5"), "1.234,50 €"),
        (Decimal("1234.5"), "1 234,50"),
        (Decimal("1234.5"), "1'234.50"),
        (Decimal("1234.5"), "RM1,234.50"),
        (Decimal("123456.78"), "1,23,456.78"),
        (Decimal("-12.5"), "(12.50)"),
        (Decimal("-12.5"), "12.50-"),
        (Decimal("-12.5"), "-$12.50"),
        (Decimal("0.19"), "19 %"),
        (1234, "1,234"),
        ("$6,025.00", "USD 6025"),
        ("USD", "$ 12"),
        ("EUR", "12 €"),
    ],
)
def test_what_is_printed_in_another_form_is_normalized(value: Any, printed: str) -> None:
    assert find(value, printed).match == Match.NORMALIZED


@pytest.mark.parametrize(
    "printed",
    ["22.05.2020", "22.5.20", "5/22/20", "05-22-2020", "22 May 2020", "May 22, 2020", "22. Mai 2020", "22-May-20", "20200522",
     "le 22 mai 2020", "22 de mayo de 2020", "2020年5月22日", "05/22/2020-05/29/2020", "22/05/202011:43", "May 22nd, 2020"],
)  # fmt: skip
def test_a_day_is_found_in_any_form(printed: str) -> None:
    assert find("2020-05-22", printed, schema=DAY).match == Match.NORMALIZED
    assert find("2020-05-23", printed, schema=DAY).match == Match.ABSENT


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ("12", "2012"),
        ("1.1", "1 1"),
        ("100", "100.50"),
        ("IBZY2087", "2087"),
        ("3012 CN", "3012"),
        (Decimal("5"), "08.05.2015"),
        (Decimal("2012"), "INV/2012/03"),
        (Decimal("-5"), "5.00"),
        (Decimal("5"), "-5.00"),
        (Decimal("1.23"), "123"),
        (Decimal("1234"), "12,34"),
        (Decimal("3"), "0000003"),
        ("2014-04-20", "april 2014"),
        ("2014-02-31", "31.02.2014"),
    ],
)
def test_what_only_looks_like_the_value_is_no_match(value: Any, printed: str) -> None:
    assert find(value, printed).match in (Match.ABSENT, Match.SIMILAR)


def test_the_order_of_day_and_month_comes_from_the_document() -> None:
    assert find("2020-03-04", "04/03/2020", schema=DAY).match == Match.NORMALIZED
    assert find("2020-04-03", "04/03/2020", schema=DAY).match == Match.NORMALIZED
    dates = "04/03/2020\n25/03/2020\n26/03/2020"
    assert find("2020-03-04", dates, schema=DAY).match == Match.NORMALIZED
    assert find("2020-04-03", dates, schema=DAY).match == Match.ABSENT
    assert find("2020-04-03", "04.03.2020", schema=DAY).match == Match.ABSENT


def test_a_date_and_time_needs_both() -> None:
    schema = {"type": "object", "properties": {"value": {"type": "string", "format": "x-local-date-time"}}}
    assert find("2020-05-22T14:05:00", "22.05.2020  2:05 pm", schema=schema).match == Match.NORMALIZED
    assert find("2020-05-22T14:06:00", "22.05.2020  2:05 pm", schema=schema).match == Match.ABSENT


def test_a_choice_is_found_by_its_title_or_not_applicable() -> None:
    options = {"oneOf": [{"const": True, "title": "PAID"}, {"const": False, "title": "unpaid"}]}
    schema = {"type": "object", "properties": {"value": options}}
    assert (find(True, "paid", schema=schema).match, find(False, "paid", schema=schema).match) == (Match.NORMALIZED, Match.NOT_APPLICABLE)
    assert find(True, "paid").match == Match.NOT_APPLICABLE
    schema = {"type": "object", "properties": {"value": {"enum": ["invoice", "receipt"]}}}
    assert (find("invoice", "Invoice", schema=schema).match, find("receipt", "x", schema=schema).match) == ("normalized", "not_applicable")


# --- places


def test_a_box_is_that_of_the_value() -> None:
    found = find(Decimal("19.99"), "first page", "Total:19.99 EUR")
    assert (found.page, found.words, found.places, found.witness) == (2, "19.99", 1, Witness.TEXT)
    assert found.box == pytest.approx((36, 0, 66, 10))


def test_an_address_in_a_column_of_its_own_is_one_place() -> None:
    page = "Acme Ltd         Invoice 12\nLong Street 5    Date 2020-05-22\n12345 Town       Page 1"
    found = find("Acme Ltd, Long Street 5, 12345 Town", page)
    assert (found.match, found.words, found.box) == (Match.NORMALIZED, "Acme Ltd Long Street 5 12345 Town", (0, 0, 78, 50))


def test_a_line_item_s_cells_share_a_line() -> None:
    page = "Item    Quantity  Price\nTea     2         5.00\nMilk    2         5.00\nTea     5         2.00"
    items = [
        {"what": "Tea", "n": 2, "price": Decimal(5)},
        {"what": "Milk", "n": 2, "price": Decimal(5)},
        {"what": "Tea", "n": 5, "price": 2},
    ]
    found = match_values({}, {"items": items}, [print_page(page)])
    assert [e.box[1] if e.box else None for e in found] == [20, 20, 20, 40, 40, 40, 60, 60, 60]
    assert [e.places for e in found] == [2, 3, 3, 1, 3, 3, 2, 3, 3]


def test_labels_choose_between_places() -> None:
    page = "Invoice date: 05/22/2020    Due date: 05/22/2020\nTotal: 10.00    Balance: 10.00"
    values = {"dueDate": "2020-05-22", "invoice_date": "2020-05-22", "balance": 10, "total": 10}
    found = {e.path: e for e in match_values({}, values, [print_page(page)])}
    assert [found[f"$.{name}"].box[0] // 6 for name in values] == [38, 14, 25, 7]  # type: ignore[index]
    assert {e.places for e in found.values()} == {2}
    assert found["$.dueDate"].label_fit > 0.9


def test_values_are_listed_as_the_record_has_them() -> None:
    record = parse_json('{"a": "Tea", "b": null, "c": "", "d": [1, 2], "e": {"f": true, "g": []}}')
    found = match_values({}, record, [print_page("Tea 1 2")])
    assert [(e.path, e.value) for e in found] == [("$.a", "Tea"), ("$.d[0]", "1"), ("$.d[1]", "2"), ("$.e.f", "true")]


# --- what is no match


def test_what_is_similar_places_a_box_and_says_by_how_much_it_differs() -> None:
    found = find("Lynn Bennett for Congres", "To: Lynn Bennet for Congress")
    assert (found.match, found.words, found.distance, found.places) == (Match.SIMILAR, "Lynn Bennet for Congress", 2, 0)
    assert find("Quite another text", "To: Lynn Bennet for Congress").match == Match.ABSENT


def test_words_that_a_reader_cannot_see_are_no_witness() -> None:
    page = print_page("Total 19.99 99.00")
    page.marks[2] = WordMark.NO_INK
    found = match_values({}, {"a": Decimal("19.99"), "b": 99, "c": "Total"}, [page])
    assert [(e.match, e.words) for e in found] == [(Match.EXACT, "19.99"), (Match.HIDDEN, "99.00"), (Match.EXACT, "Total")]


def test_text_of_ocr_software_is_another_witness() -> None:
    (found,) = match_values({}, {"a": 12}, [print_page("12", mark=WordMark.OVERLAY)])
    assert (found.match, found.witness) == (Match.EXACT, Witness.OCR_LAYER)


def test_without_words_nothing_is_said() -> None:
    assert [e.match for e in match_values({}, {"a": 12}, [])] == [Match.NOT_APPLICABLE]


def test_a_row_has_the_fields_of_the_evidence() -> None:
    row = make_evidence_row(find("Tea", "Tea"))
    assert json.loads(json.dumps(row)) == {
        "path": "$.value", "value": "Tea", "page": 1, "x0": 0.0, "y0": 0.0, "x1": 18.0, "y1": 10.0,
        "witness": "text", "match": "exact", "places": 1, "words": "Tea", "distance": None,
    }  # fmt: skip


@pytest.mark.parametrize("value", ["\x00", "…", "((((", "a" * 5000, "9" * 400, "1" + "0" * 300, "\ud800"])
@pytest.mark.parametrize("text", ["…", "a" * 5000, "( ( (", "9" * 400])
def test_odd_values_and_pages_are_matched_without_an_error(value: str, text: str) -> None:
    assert len(match_values({}, {"value": value, "other": Decimal("1e400")}, [print_page(text)])) == 2


def test_a_page_whose_words_have_no_size_is_matched() -> None:
    page = PageWords(1, ["Tea", "1"], np.zeros((2, 4)), np.zeros(2, np.uint8))
    assert [e.match for e in match_values({}, {"a": [{"b": "Tea", "c": 1}]}, [page])] == [Match.EXACT, Match.EXACT]


def test_a_number_on_every_page_of_a_long_document_is_counted_up_to_a_bound() -> None:
    pages = [print_page("1 " * 150, number) for number in range(1, 301)]
    (found,) = match_values({}, {"a": 1}, pages)
    assert (found.match, found.page, found.places) == (Match.EXACT, 1, 500)


def test_a_number_that_stands_on_another_items_line_is_only_similar() -> None:
    page = print_page("Tea  2  3.50  7.00\n\n\nMilk  4  1.25  5.00")
    lines = [{"item": "Tea", "count": 2, "price": 3.5, "amount": 7}, {"item": "Milk", "count": 4, "price": 3.5, "amount": 5}]
    matches = {found.path: found.match for found in match_values({}, {"lines": lines}, [page])}
    assert matches.pop("$.lines[1].price") == Match.SIMILAR
    assert {*matches.values()} <= {Match.EXACT, Match.NORMALIZED}


def test_units_and_periods_that_are_printed_everywhere_show_no_line() -> None:
    page = print_page("Q2 2025  USD\nQ1 2025  USD\nNotes to Q2 2025  USD\nNotes to Q1 2025  USD\n\n\n\n\nRevenue  5,048.4  4,668.0")
    facts = [{"period": "Q2 2025", "unit": "USD", "value": 5048.4}, {"period": "Q1 2025", "unit": "USD", "value": 4668}]
    assert all(found.is_witnessed for found in match_values({}, {"revenue": facts}, [page]))


TABLE = """\
Item   Qty  Price  Tax  Amount
Tea    2    3.50   19   7.00
Milk   4    1.25   19   5.00
Bread  1    2.75   19   2.75
Salt   3    4.00   19   12.00"""
ITEMS = [("Tea", 2, 3.5, 7), ("Milk", 4, 1.25, 5), ("Bread", 1, 2.75, 2.75), ("Salt", 3, 4, 12)]


def match_table(**changed: float) -> dict[str, Evidence]:
    """Return the evidence for the items of `TABLE`, the last of which has other values."""
    lines = [{"item": item, "count": count, "price": price, "tax": 19, "amount": amount} for item, count, price, amount in ITEMS]
    lines[-1] |= changed
    return {found.path: found for found in match_values({}, {"lines": lines}, [print_page(TABLE)])}


def test_of_two_places_on_a_line_the_one_in_the_column_is_chosen() -> None:
    found = match_table()
    price, amount, other = (found[f"$.lines[{item}].{name}"].box for item, name in ((2, "price"), (2, "amount"), (1, "amount")))
    assert price
    assert amount
    assert other
    assert price[0] < amount[0] == other[0]
    assert all(one.is_witnessed for one in found.values())


def test_a_number_in_the_column_of_another_property_is_only_similar() -> None:
    found = match_table(count=12)
    assert (found["$.lines[3].count"].match, found["$.lines[3].count"].words) == (Match.SIMILAR, "12.00")


def test_a_number_on_the_line_of_the_next_item_is_not_below_this_one() -> None:
    page = print_page("Tea   2  3.50\nMilk  4  1.25")
    lines = [{"item": "Tea", "count": 2, "price": 1.25}, {"item": "Milk", "count": 4, "price": 1.25}]
    found = {one.path: one.match for one in match_values({}, {"lines": lines}, [page])}
    assert found["$.lines[0].price"] == Match.SIMILAR


def test_words_beside_a_place_are_noted_unless_they_are_another_value() -> None:
    lines = [{"item": "Drill", "count": 4, "note": "red"}, {"item": "Carpet", "count": 2, "note": "blue"}]
    found = {one.path: one for one in match_values({}, {"lines": lines}, [print_page("Drill J59   4 red\nCarpet     2 blue")])}
    assert [one.path for one in found.values() if one.has_words_after] == ["$.lines[0].item"]
    assert [one.path for one in found.values() if one.has_words_before] == []


def test_values_of_one_place_are_rivals_and_an_item_of_two_lines_does_not_fit() -> None:
    page = print_page("Desk  6  2.12  12.72\nLamp  6  12.40  74.40")
    lines = [{"item": "Desk", "count": 6, "price": 12.4, "amount": 74.4}, {"item": "Lamp", "count": 6, "price": 12.4, "amount": 74.4}]
    found = {one.path: one for one in match_values({}, {"lines": lines}, [page])}
    assert {path for path, one in found.items() if one.rivals} >= {
        f"$.lines[{item}].{name}" for item in (0, 1) for name in ("price", "amount")
    }
    assert found["$.lines[0].item"].item_fit == 0
    assert found["$.lines[1].item"].item_fit == 1
