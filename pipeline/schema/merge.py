"""Merging of a long document: takes the answers to its requests (`Part`) and returns one value and what the parts disagree on.

A document of six pages, in requests of four pages, has two parts. Lists are joined in page order. A scalar comes from the part that has
it; where parts have different values, the one with the most certain tokens is kept (the first, if the engine gave no log-probabilities),
and the others are returned beside the value:

    pages 1-4  {"number": "A-7", "total": null,  "line_items": [tea]}
    pages 5-6  {"number": "A-1", "total": 19.99, "line_items": [milk]}
            -> {"number": "A-7", "total": 19.99, "line_items": [tea, milk]}, Disagreement("$.number", "A-7", 1, "A-1", 5)

Values that say nothing (null, "", an empty list, an object of such values) never replace one that does. The schema can choose another
rule for a property: `"x-merge": "first" | "last" | "concat" | "longest"`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.schema import MERGE_RULE, Schema, join_path, walk_in_place
from pipeline.schema.certainty import TokenScore
from pipeline.schema.request_schema import is_fixed_array
from pipeline.schema.validate import is_blank


@dataclass(frozen=True)
class Part:
    """The answer to one request of a document, with its page range: 1-based, last page included."""

    first_page: int
    last_page: int
    value: Any
    scores: Mapping[str, TokenScore] = field(default_factory=dict)
    """Of each scalar's tokens by its path (`certainty.score_tokens`), where the engine gives log-probabilities."""


@dataclass(frozen=True)
class ValueClaim:
    """The value of one part at one path."""

    value: Any
    path: str
    """In the part's own value: an item of a list has another index there than in the merged one."""
    part: Part

    @property
    def page(self) -> int:
        """First page of the part."""
        return self.part.first_page

    def enter(self, step: str | int) -> ValueClaim:
        """Return the claim of this part one step further."""
        return ValueClaim(self.value[step], join_path(self.path, step), self.part)

    def compute_certainty(self) -> float | None:
        """Return the mean certainty of the scalars in the value; None if it is not known."""
        inside = (f"{self.path}.", f"{self.path}[")
        scores = [score.mean for path, score in self.part.scores.items() if path == self.path or path.startswith(inside)]
        return sum(scores) / len(scores) if scores else None


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
    origins: Mapping[str, ValueClaim] = field(default_factory=dict)
    """The claim from which each value, or list item, was taken, by its path here; what is inside of it is not listed."""

    def find_score(self, path: str) -> TokenScore | None:
        """Return the score of a scalar's tokens in the part from which it was taken; None if it is not known."""
        origin = self.find_origin(path)
        return origin[0].scores.get(origin[1]) if origin else None

    def find_origin(self, path: str) -> tuple[Part, str] | None:
        """Return the part from which a scalar was taken, and its path there; None for one that was joined from several."""
        end = len(path)
        while end > 0:
            if claim := self.origins.get(path[:end]):
                return claim.part, claim.path + path[end:]
            end = max(path.rfind(".", 0, end), path.rfind("[", 0, end))
        return None


def merge_parts(schema: Schema, parts: Sequence[Part]) -> MergeResult:
    """Return one value for all parts, which are in page order. A single part is returned unchanged."""
    if len(parts) == 1:
        return MergeResult(parts[0].value, origins={"$": ValueClaim(parts[0].value, "$", parts[0])})
    disagreements: list[Disagreement] = []
    origins: dict[str, ValueClaim] = {}
    claims = [ValueClaim(part.value, "$", part) for part in parts]
    value = join_claims(claims, "$", [schema], MergeNotes(schema, disagreements, origins))
    return MergeResult(value, tuple(disagreements), origins)


@dataclass(frozen=True)
class MergeNotes:
    """The root schema, and what is noted of a merge while it goes on."""

    root: Schema
    disagreements: list[Disagreement]
    origins: dict[str, ValueClaim]

    def keep(self, path: str, claim: ValueClaim) -> Any:
        """Note that the value at a path is that of a claim, and return it."""
        self.origins[path] = claim
        return claim.value


def join_claims(claims: list[ValueClaim], path: str, here: list[Schema], notes: MergeNotes) -> Any:
    """Return one value for the values that the parts have at `path`; `here` are the schemas that apply to it.

    Differences and origins are noted.
    """
    claims = [claim for claim in claims if claim.value is not None]
    if not claims:
        return None
    rules = [rule for schema in here for rule in walk_in_place(schema, notes.root)]
    chosen = next((rule[MERGE_RULE] for rule in rules if MERGE_RULE in rule), None)
    meaningful = [claim for claim in claims if not is_blank(claim.value)] or claims[:1]
    values = [claim.value for claim in meaningful]
    if chosen in ("first", "last"):
        return notes.keep(path, meaningful[0 if chosen == "first" else -1])
    if all(isinstance(claim.value, dict) for claim in claims):
        return join_objects(claims, path, rules, notes)
    are_lists = all(isinstance(value, list) for value in values)
    are_texts = all(isinstance(value, str) for value in values)
    if chosen == "longest" and (are_lists or are_texts):
        return notes.keep(path, max(meaningful, key=lambda claim: len(claim.value)))
    if are_lists and not any(is_fixed_array(rule) for rule in rules):
        items = [claim.enter(at) for claim in meaningful for at, item in enumerate(claim.value) if not is_blank(item)]
        return [notes.keep(join_path(path, at), item) for at, item in enumerate(items)]
    if chosen == "concat" and are_texts:
        return "\n".join(values)
    kept = choose_claim(meaningful)
    others = [claim for claim in meaningful if is_different(kept.value, claim.value)]
    notes.disagreements.extend(Disagreement(path, kept.value, kept.page, claim.value, claim.page) for claim in others)
    return notes.keep(path, kept)


def join_objects(claims: list[ValueClaim], path: str, rules: list[Schema], notes: MergeNotes) -> Any:
    """Return one object, property by property, for those that parts have at `path`."""
    merged = {}
    for name in dict.fromkeys(name for claim in claims for name in claim.value):
        members = [claim.enter(name) for claim in claims if name in claim.value]
        schemas = [rule["properties"][name] for rule in rules if name in rule.get("properties", {})]
        merged[name] = join_claims(members, join_path(path, name), schemas, notes)
    return merged


def choose_claim(claims: list[ValueClaim]) -> ValueClaim:
    """Return the claim with the highest certainty; the first of equals, and where one is not known."""
    scores = [claim.compute_certainty() for claim in claims]
    known = [score for score in scores if score is not None]
    return claims[scores.index(max(known))] if len(known) == len(claims) else claims[0]


def is_different(one: Any, other: Any) -> bool:
    """Return whether two JSON values differ; unlike in Python, true is not 1."""
    return bool(one != other) or isinstance(one, bool) != isinstance(other, bool)
