"""The answers to a long document's requests -> one value for the document. Knows no page and no model.

A document of six pages, asked four at a time, gives two parts. Scalars come from the first part that has one, lists
are joined in page order, and what contradicts is kept beside the value:

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
"""A value and the first page of the part that gives it."""


@dataclass(frozen=True)
class Part:
    """What one request of a document answered; its pages, 1-based, the last one included."""

    first_page: int
    last_page: int
    value: Any


@dataclass(frozen=True)
class Disagreement:
    """Two parts gave different values for one place; pages are the first ones of the parts."""

    path: str
    kept: Any
    kept_page: int
    other: Any
    other_page: int


@dataclass(frozen=True)
class MergeResult:
    """A document's value, and what its parts did not agree on."""

    value: Any
    disagreements: tuple[Disagreement, ...] = ()


def merge_parts(schema: Schema, parts: Sequence[Part]) -> MergeResult:
    """Return one value for all parts, which are in page order. One part comes back as it is."""
    disagreements: list[Disagreement] = []
    value = join_claims([(part.first_page, part.value) for part in parts], "$", [schema], schema, disagreements)
    return MergeResult(value, tuple(disagreements))


def join_claims(claims: list[ValueClaim], path: str, here: list[Schema], root: Schema, disagreements: list[Disagreement]) -> Any:
    """Return one value for what the parts claim of one place; `here` are the schemas that speak of it."""
    claims = [(page, value) for page, value in claims if value is not None]
    if not claims:
        return None
    page, first = claims[0]
    rules = [rule for schema in here for rule in walk_in_place(schema, root)]
    if all(isinstance(value, dict) for _, value in claims):
        names = dict.fromkeys(name for _, value in claims for name in value)
        return {
            name: join_claims(
                find_member_claims(name, claims), join_path(path, name), find_property_rules(name, rules), root, disagreements
            )
            for name in names
        }
    if all(isinstance(value, list) for _, value in claims) and not any(is_tuple(rule) for rule in rules):
        return [item for _, value in claims for item in value]
    others = [(other_page, other) for other_page, other in claims[1:] if is_different(first, other)]
    disagreements += [Disagreement(path, first, page, other, other_page) for other_page, other in others]
    return first


def find_member_claims(name: str, claims: list[ValueClaim]) -> list[ValueClaim]:
    return [(page, value[name]) for page, value in claims if name in value]


def find_property_rules(name: str, rules: list[Schema]) -> list[Schema]:
    """Return the schemas that speak of a property."""
    return [rule["properties"][name] for rule in rules if name in rule.get("properties", {})]


def is_tuple(rule: Schema) -> bool:
    """Say whether a list has places of its own, as a box of four numbers has, so that joining two makes no sense."""
    return "prefixItems" in rule or isinstance(rule.get("items"), list) or rule.get("minItems", -1) == rule.get("maxItems")


def is_different(one: Any, other: Any) -> bool:
    """Say whether two JSON values are different; unlike Python, true is not 1."""
    return bool(one != other) or isinstance(one, bool) != isinstance(other, bool)
