"""A value that no witness shows is `reread` where the model's reading of the place has it, in whatever form, and never by likeness."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.evidence.match import Match, Witness
from pipeline.evidence.readings import Reading, confirm_values, list_unwitnessed_values
from tests.support.printed import print_page

DAY = {"properties": {"a": {"type": "string", "format": "date"}}}


def confirm(value: Any, text: str | None, printed: str = "", schema: Any = None, asked: str | None = None) -> tuple[Any, Any]:
    """Return the evidence for the value and what was read of it."""
    words = [print_page(printed)] if printed else []
    reading = Reading(asked or str(value), 2, (10.0, 20.0, 60.0, 30.0), text)
    ((found,), rows) = confirm_values(schema or {}, {"a": value}, words, {"$.a": reading})
    return found, rows


@pytest.mark.parametrize(
    ("value", "text", "words", "schema"),
    [
        ("A-7", "No. A-7", "A-7", None),
        (1234.5, "Total\nEUR 1.234,50", "1.234,50", None),
        (1234.5, "1 234,50", "1 234,50", None),
        ("2020-05-22", "Date: 22. Mai 2020", "22. Mai 2020", DAY),
        ("Long Street 5, 12345 Town", "Acme Ltd\nLong Street 5\n12345 Town", "Long Street 5 12345 Town", None),
    ],
)
def test_a_value_that_is_read_there_again_is_reread(value: Any, text: str, words: str, schema: Any) -> None:
    found, (row,) = confirm(value, text, schema=schema)
    assert (found.match, found.witness, found.page, found.box) == (Match.REREAD, Witness.MODEL, 2, (10.0, 20.0, 60.0, 30.0))
    assert (found.words, found.is_witnessed, row["agrees"], row["reading"]) == (words, False, True, text)


@pytest.mark.parametrize(
    ("value", "text", "schema"),
    [
        (119.0, "Total 1119.00", None),
        ("Acme Ltd", "Acme Lid", None),  # similar at most
        ("2020-05-22", "23.05.2020", DAY),
        ("A-7", "", None),
        ("A-7", None, None),
    ],
)
def test_another_reading_leaves_the_value_absent_and_can_be_seen(value: Any, text: str | None, schema: Any) -> None:
    found, (row,) = confirm(value, text, schema=schema)
    assert (found.match, found.box, found.witness) == (Match.ABSENT, None, None)
    assert (row["agrees"], row["reading"], row["page"]) == (False, text, 2)


def test_what_words_witness_is_not_changed_by_a_reading() -> None:
    found, (row,) = confirm(19.99, "20.99", printed="Total 19.99")
    assert (found.match, found.witness, row["agrees"]) == (Match.EXACT, Witness.TEXT, False)
    assert confirm(19.99, "19.99", printed="Total 19.99")[0].witness == Witness.TEXT


def test_what_is_similar_stays_so_unless_it_is_read_again() -> None:
    printed = "To: Lynn Bennet for Congress"
    assert confirm("Lyn Bennett for Congress", "Lynn Bennet for Congress", printed)[0].match == Match.SIMILAR
    found = confirm("Lyn Bennett for Congress", "Lyn Bennett for Congress", printed)[0]
    assert (found.match, found.distance, found.places) == (Match.REREAD, None, 0)


def test_a_reading_of_another_value_counts_as_none() -> None:
    found, rows = confirm(19.99, "19.99", asked="18.99")
    assert (found.match, rows) == (Match.NOT_APPLICABLE, [])


def test_the_documents_dates_say_which_of_two_numbers_is_the_day() -> None:
    assert confirm("2020-03-04", "04/03/2020", "25/03/2020  26/03/2020", DAY)[0].match == Match.REREAD
    assert confirm("2020-04-03", "04/03/2020", "25/03/2020  26/03/2020", DAY)[0].match == Match.ABSENT


def test_values_that_words_do_not_show_are_asked_about() -> None:
    value = {"a": "printed", "b": "missing", "c": True, "d": None, "e": "Lyn Bennett for Congress"}
    page = print_page("Printed  Lynn Bennet for Congress")
    assert [one.path for one in list_unwitnessed_values({}, value, [page])] == ["$.b", "$.e"]


def test_without_words_all_but_choices_are_asked_about() -> None:
    schema = {"properties": {"b": {"enum": ["EUR", "USD"]}}}
    assert [one.path for one in list_unwitnessed_values(schema, {"a": 1, "b": "EUR", "c": False, "d": ""}, [])] == ["$.a"]


def test_hidden_text_is_no_reason_to_ask() -> None:
    assert list_unwitnessed_values({}, {"a": "Secret"}, [print_page("Secret", mark=2)]) == []
