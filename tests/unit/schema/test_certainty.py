"""Certainty of values: the positions that are found are those of the values, and the tokens over them are averaged."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.records import TokenRow
from pipeline.schema import join_path
from pipeline.schema.certainty import TokenScore, find_values, score_tokens, score_values

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def list_leaves(value: Any, path: str = "$") -> list[tuple[str, Any]]:
    """Return the path and value of each scalar and of each empty list or object."""
    if isinstance(value, (dict, list)) and value:
        steps = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for step, inner in steps for leaf in list_leaves(inner, join_path(path, step))]
    return [(path, value)]


@given(VALUES, st.sampled_from([None, 2]), st.booleans())
def test_every_value_is_found_where_it_stands(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert [(path, json.loads(text[start:end])) for path, start, end in find_values(text)] == list_leaves(value)


def make_tokens(*tokens: tuple[str, float]) -> list[TokenRow]:
    return [TokenRow(text=text, logprob=logprob, margin=None) for text, logprob in tokens]


def test_a_value_has_the_mean_of_the_tokens_over_it() -> None:
    tokens = make_tokens(
        ('{"total":', 0), ("19", -0.2), (".99", -0.1), (',"items":[', 0), ("1", -1), (",", 0), ('2],"x":"a', -2), ('"}', 0)
    )
    scores = score_values('{"total":19.99,"items":[1,2],"x":"a"}', tokens)
    assert scores == pytest.approx({"$.total": -0.15, "$.items[0]": -1, "$.items[1]": -2, "$.x": -1})


@pytest.mark.parametrize("tokens", [[], make_tokens(("{}", 0.0), (" ", 0.0))])
def test_tokens_that_are_not_those_of_the_answer_say_nothing(tokens: list[TokenRow]) -> None:
    assert score_values("{}", tokens) == {}


def make_token(text: str, logprob: float, margin: float | None = None) -> TokenRow:
    return TokenRow(text=text, logprob=logprob, margin=margin)


def test_tokens_to_which_there_was_no_alternative_are_left_out() -> None:
    day = [make_token('"20', -0.5, 0.4), make_token("24-", -3.0), make_token("05", -0.1, 2.0), make_token('"', -0.2, 1.0)]
    tokens = [make_token('{"d":', -9.0), *day, make_token(',"c":', -9.0), make_token("null", -4.0), make_token("}", 0.0)]
    scores = score_tokens('{"d":"2024-05","c":null}', tokens)
    assert scores["$.d"] == TokenScore(pytest.approx(-0.8), 3, -0.5, -0.5, 0.4)  # type: ignore[arg-type]
    assert scores["$.c"] == TokenScore(-4.0, 1, -4.0, -4.0, None)


def test_tokens_of_an_older_ledger_have_no_margin() -> None:
    older: list[TokenRow] = [{"text": "[1", "logprob": -0.5}, {"text": "2]", "logprob": -0.25}]  # type: ignore[typeddict-item]
    assert score_tokens("[12]", older) == {"$[0]": TokenScore(-0.75, 2, -0.5, -0.5, None)}
