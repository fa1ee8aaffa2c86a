"""IRIs: texts that RFC 3987 allows and forbids."""

from __future__ import annotations

import pytest

from pipeline.schema.iri import is_iri, is_iri_reference


@pytest.mark.parametrize(
    "text",
    ["http://a.de", "http://ä.de/straße?ö=1#ü", "urn:isbn:1", "mailto:ü@ä.de", "http://[2001:db8::1]:80/", "http://a/😀", "http://a/?\ue000",
     "a:"],
)  # fmt: skip
def test_an_iri_is_a_uri_with_more_characters(text: str) -> None:
    assert is_iri(text)
    assert is_iri_reference(text)


@pytest.mark.parametrize("text", ["", "ä/b", "//ä.de/b", "/ß", "?ö", "#ü", "../b"])
def test_a_reference_needs_no_scheme(text: str) -> None:
    assert is_iri_reference(text)
    assert not is_iri(text)


@pytest.mark.parametrize(
    "text",
    ["a b", "http://a b", "ä:b", "http://a/%zz", "http://a/\\", "http://[::1", "http://a\n", "http://a/\ue000", "http://a/#\ue000", "http://a/\ufffe",
     "http://a:ä", "http://a/\ud800", "http://a/<b>", "http://a/#?\ue000"],
)  # fmt: skip
def test_what_is_neither(text: str) -> None:
    assert not is_iri(text)
    assert not is_iri_reference(text)


def test_what_is_no_text_has_no_format() -> None:
    assert is_iri(5)
    assert is_iri_reference(None)
