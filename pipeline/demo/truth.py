"""Records of the synthetic documents: their values by path, and their JSON in the form that the demonstration model writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any


def list_leaves(value: Any, path: str = "$") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of every leaf of a record; an empty array is one leaf with the value None."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from list_leaves(inner, f"{path}.{key}")
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from list_leaves(inner, f"{path}[{index}]")
    else:
        yield path, None if value == [] else value


def format_answer(value: Any) -> str:
    """Return a record as the model should write it: compact JSON, amounts of money with two decimals."""
    return "".join(text for text, _ in split_json(value))


def split_json(value: Any, path: str = "$") -> Iterator[tuple[str, str]]:
    """Yield a record's JSON in pieces: each value with its path, and the text between values with the path ""."""
    if isinstance(value, dict):
        for at, (key, inner) in enumerate(value.items()):
            yield ("," if at else "{") + json.dumps(key) + ":", ""
            yield from split_json(inner, f"{path}.{key}")
        yield "}", ""
    elif isinstance(value, list):
        yield "[", ""
        for at, inner in enumerate(value):
            if at:
                yield ",", ""
            yield from split_json(inner, f"{path}[{at}]")
        yield "]", ""
    else:
        yield f"{value:.2f}" if isinstance(value, Decimal) else json.dumps(value, ensure_ascii=False), path
