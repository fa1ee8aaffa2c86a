"""Merging of a long document: takes the answers to its requests (`Part`) and returns one value and what the parts disagree on.

A document of six pages, in requests of four pages, has two parts. A scalar comes from the first part that has it, lists
are joined in page order, and contradicting scalars are returned beside the value:

    pages 1-4  {"number": "A-7", "total": null,  "line_items": [tea]}
    pages 5-6  {"number": "A-1", "total": 19.99, "line_items": [milk]}
            -> {"number": "A-7", "total": 19.99, "line_items": [tea, milk]}, Disagreement("$.number", "A-7", 1, "A-1", 5)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.schema import Schema, join_path, walk_in_place

ValueClaim = tuple[int, Any]
"""(first page of the part, the value it has at one path)."""


@dataclass(frozen=True)
class Part:
    """The answer to one request of a document, with its page range: 1-based, last page included."""

    first_page: int
    last_page: int
    value: Any


@dataclass(frozen=True)
class Disagreement:
    """Two parts have different values at one path; the pages are the first pages of the parts."""

    path: str
    kept: Any
    kept_page: int
    other: Any
    other_page: int


@dataclass(frozen=True)
class MergeResult:
    """A document's value and the disagreements of its parts."""

    value: Any
    disagreements: tuple[Disagreement, ...] = ()


def merge_parts(schema: Schema, parts: Sequence[Part]) -> MergeResult:
    """Return one value for all parts, which are in page order. A single part is returned unchanged."""
    disagreements: list[Disagreement] = []
    value = join_claims([(part.first_page, part.value) for part in parts], "$", [schema], schema, disagreements)
    return MergeResult(value, tuple(disagreements))


def join_claims(claims: list[ValueClaim], path: str, here: list[Schema], root: Schema, disagreements: list[Disagreement]) -> Any:
    """Return one value for the values that the parts have at `path`; `here` are the schemas that apply to it.

    Differences are appended to `disagreements`.
    """
    claims = [(page, value) for page, value in claims if value is not None]
    if not claims:
        return None
    page, first = claims[0]
    rules = [rule for schema in here for rule in walk_in_place(schema, root)]
    if all(isinstance(value, dict) for _, value in claims):
        merged = {}
        for name in dict.fromkeys(name for _, value in claims for name in value):
            members = [(part_page, value[name]) for part_page, value in claims if name in value]
            schemas = [rule["properties"][name] for rule in rules if name in rule.get("properties", {})]
            merged[name] = join_claims(members, join_path(path, name), schemas, root, disagreements)
        return merged
    if all(isinstance(value, list) for _, value in claims) and not any(is_tuple(rule) for rule in rules):
        return [item for _, value in claims for item in value]
    others = [(other_page, other) for other_page, other in claims[1:] if is_different(first, other)]
    disagreements += [Disagreement(path, first, page, other, other_page) for other_page, other in others]
    return first


def is_tuple(rule: Schema) -> bool:
    """Return whether the positions of a list have a meaning, as in a box of four numbers, so that two must not be joined."""
    return "prefixItems" in rule or isinstance(rule.get("items"), list) or rule.get("minItems", -1) == rule.get("maxItems")


def is_different(one: Any, other: Any) -> bool:
    """Return whether two JSON values differ; unlike in Python, true is not 1."""
    return bool(one != other) or isinstance(one, bool) != isinstance(other, bool)
