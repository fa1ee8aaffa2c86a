"""Matching of a record with the words of its pages: for each value one `Evidence`, which says whether and where it is printed.

exact            printed as it is written
normalized       printed in another form: 1.234,50 for 1234.5, 22. Mai 2020 for 2020-05-22, other case, spacing, punctuation
similar          nearly the same is printed: this places a box and verifies nothing
hidden           only in text that a reader cannot see
reread           no witness shows it, and the model that wrote it reads it again in the place that it names (`readings`)
absent           in no word of the pages
not_applicable   nothing to look for: no words, a boolean, a choice whose printed form the schema does not say
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from itertools import islice, pairwise
from typing import Any

from pipeline.evidence.letters import read_query
from pipeline.evidence.numbers import parse_number_text
from pipeline.evidence.page_index import Box, Find, PageIndex, PageSet
from pipeline.evidence.places import Place, PlacedValue, choose_places, measure_gap, split_label
from pipeline.evidence.searches import DocumentIndex, Scalar, choose_searches
from pipeline.evidence.similar import find_similar
from pipeline.evidence.text_layer import PageWords
from pipeline.records import PlacedValueRow
from pipeline.schema import Schema, dump_json, join_path, walk_in_place
from pipeline.schema.validate import is_blank

PIECES = re.compile(r"\s*[,;\n]+\s*")
PIECE_DISTANCE_PT = 80.0
"""How far apart the pieces of a text, such as the lines of an address, may be."""
MAX_PIECES = 12
MAX_PLACES = 500
"""Most places of a value that are counted."""
MAX_SIMILAR_PAGES = 100
"""Pages of a document on which a text is looked for that is not printed as it is: a fifth of a millisecond each."""


class Match(StrEnum):
    """How a value is printed."""

    EXACT = "exact"
    NORMALIZED = "normalized"
    SIMILAR = "similar"
    HIDDEN = "hidden"
    REREAD = "reread"
    ABSENT = "absent"
    NOT_APPLICABLE = "not_applicable"


UNWITNESSED = frozenset({Match.SIMILAR, Match.HIDDEN, Match.REREAD, Match.ABSENT})
"""Values that no witness shows."""


class Witness(StrEnum):
    """Who says that a value is printed."""

    TEXT = "text"
    """The text layer of a PDF, which is what is drawn."""
    OCR_LAYER = "ocr_layer"
    """Text that OCR software added to a scan: a weaker witness."""
    OCR = "ocr"
    """OCR of the page's pixels (`ocr.read_words_by_ocr`)."""
    MODEL = "model"
    """The model itself, asked again: no independent reader."""


@dataclass(frozen=True)
class Evidence:
    """How one value of a record is witnessed. The box is in PDF points, origin top left, page rotation applied."""

    path: str
    value: str
    match: Match
    page: int | None = None
    box: Box | None = None
    witness: Witness | None = None
    words: str | None = None
    """What is printed there."""
    places: int = 0
    """In how many places the value is printed."""
    distance: int | None = None
    """Edits between a similar text and the value."""
    label_fit: float = 0.0
    """0 to 1: how much of its label stands beside or above the chosen place."""
    siblings_pt: float | None = None
    """From the place to the nearest of the values beside this one in the schema."""
    item_fit: float | None = None
    """0 to 1, of a value in a list's item: with how many of the item's other values that are printed it is on a line."""
    is_misplaced: bool = False
    """Whether it is in the line or the column of other values of its list alone."""
    rivals: int = 0
    """Other values of the record with the same place."""
    has_words_before: bool = False
    """Whether words stand closely before the place that are no value of the record."""
    has_words_after: bool = False

    @property
    def is_witnessed(self) -> bool:
        """Whether a witness shows the value itself."""
        return self.match in (Match.EXACT, Match.NORMALIZED)


class EvidenceRow(PlacedValueRow):
    """An `Evidence` as a record holds it."""

    witness: str | None
    match: str
    places: int
    words: str | None
    distance: int | None


def match_values(schema: Schema, value: Any, pages: Iterable[PageWords]) -> list[Evidence]:
    """Return the evidence for each value of a record, in the record's order; none for nulls and empty texts.

    Where a page was read in two ways, the second witnesses what the first does not show.
    """
    return match_scalars(list(list_scalars(value, [schema], schema)), pages)


def match_scalars(scalars: Sequence[Scalar], pages: Iterable[PageWords]) -> list[Evidence]:
    """Return the evidence for each of a record's values (`list_scalars`), as `match_values` does."""
    pages = list(pages)
    evidence = match_in_index(scalars, DocumentIndex(page for page in pages if not page.is_second))
    if second := [page for page in pages if page.is_second]:
        others = match_in_index(scalars, DocumentIndex(second))
        return [other if other.is_witnessed and not one.is_witnessed else one for one, other in zip(evidence, others, strict=True)]
    return evidence


def match_in_index(scalars: Sequence[Scalar], index: DocumentIndex) -> list[Evidence]:
    """Return the evidence for each of some values in the words of a document."""
    if not index.pages and not index.hidden_pages:
        return [Evidence(scalar.path, format_scalar(scalar.value), Match.NOT_APPLICABLE) for scalar in scalars]
    placed = [place_scalar(scalar, index) for scalar in scalars]
    choose_places(placed)
    return [describe_scalar(scalar, value, index) for scalar, value in zip(scalars, placed, strict=True)]


def list_scalars(
    value: Any, here: list[Schema], root: Schema, path: str = "$", group: str = "", item: str = "", name: str = ""
) -> Iterator[Scalar]:
    """Yield the scalars of a record that are neither null nor empty; `here` are the schemas that apply to `value`."""
    if is_blank(value) and not isinstance(value, bool):
        return
    rules = [rule for schema in here for rule in walk_in_place(schema, root) if isinstance(rule, dict)]
    if isinstance(value, dict):
        for key, inner in value.items():
            schemas = [rule["properties"][key] for rule in rules if key in rule.get("properties", {})]
            yield from list_scalars(inner, schemas, root, join_path(path, key), path, item, key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            schemas = [rule["items"] for rule in rules if isinstance(rule.get("items"), dict)]
            schemas += [rule["prefixItems"][number] for rule in rules if number < len(rule.get("prefixItems", ()))]
            inner_path = join_path(path, number)
            yield from list_scalars(inner, schemas, root, inner_path, path, inner_path if isinstance(inner, dict) else item, name)
    else:
        yield Scalar(path, value, rules, group, item, name)


def format_scalar(value: Any) -> str:
    """Return a scalar as text: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else dump_json(value)


def place_scalar(scalar: Scalar, index: DocumentIndex) -> PlacedValue:
    """Return a value with the places where a reader sees it."""
    titles = [str(schema["title"]) for schema in scalar.schemas if schema.get("title")]
    return PlacedValue(scalar.path, scalar.group, scalar.item, split_label(scalar.name, *titles), find_places(scalar, index, index.pages))


def find_places(scalar: Scalar, index: DocumentIndex, pages: PageSet) -> list[Place]:
    """Return where a value is printed on these pages, once for each place, in their order; the first form of it that is printed counts."""
    for search in choose_searches(scalar, index):
        found = list(islice(search(pages), MAX_PLACES))
        if not found and pages is index.pages and search.__name__ == "search_text":
            lines = index.read_lines(str(scalar.value))
            found = list(islice((place for page in lines for place in search(page)), MAX_PLACES))
        if found:
            return drop_overlaps(found)
    return find_pieces(str(scalar.value), pages)


def drop_overlaps(places: Sequence[Place]) -> list[Place]:
    """Return the places without those inside of an earlier one; what is exact comes before what is not."""
    if all(one.page is not other.page or one.find.end <= other.find.start for one, other in pairwise(places)):
        return list(places)
    kept, unique = dict[int, list[tuple[int, int]]](), set[int]()
    for place in sorted(places, key=lambda place: not place.is_exact):
        here, span = kept.setdefault(id(place.page), []), (place.find.start, place.find.end)
        at = bisect_left(here, span)
        if (at == 0 or here[at - 1][1] <= span[0]) and (at == len(here) or span[1] <= here[at][0]):
            here.insert(at, span)
            unique.add(id(place))
    return [place for place in places if id(place) in unique]


def find_pieces(text: str, pages: PageSet) -> list[Place]:
    """Return the place of a text whose pieces, between its commas and lines, stand near each other: an address in a column of its own."""
    pieces = [piece for piece in PIECES.split(text) if len(piece) > 1]
    if not 2 <= len(pieces) <= MAX_PIECES:
        return []
    printed = [dict(pages.find_text(read_query(piece))) for piece in pieces]
    for page in pages:
        finds = [found.get(page, []) for found in printed]
        if not all(finds):
            continue
        for start in finds[0]:
            chain = [start]
            for some in finds[1:]:
                last = page.get_box(chain[-1])
                near = min(some, key=lambda find: measure_gap(last, page.get_box(find)))
                if measure_gap(last, page.get_box(near)) > PIECE_DISTANCE_PT:
                    break
                chain.append(near)
            else:
                return [Place(page, start, False, tuple(chain))]
    return []


def describe_scalar(scalar: Scalar, placed: PlacedValue, index: DocumentIndex) -> Evidence:
    """Return the evidence for a value whose place is chosen."""
    text = format_scalar(scalar.value)
    if place := placed.chosen:
        match = Match.EXACT if place.is_exact else Match.NORMALIZED
        if placed.is_misplaced and names_number(scalar.value):
            match = Match.SIMILAR  # another number of a table: it is printed somewhere on most pages that have one
        return describe_place(
            scalar.path,
            text,
            match,
            place,
            places=len(placed.places),
            label_fit=placed.label_fit,
            siblings_pt=placed.distance_pt,
            item_fit=placed.item_fit,
            is_misplaced=placed.is_misplaced,
            rivals=placed.rivals,
            has_words_before=placed.has_words_before,
            has_words_after=placed.has_words_after,
        )
    if index.hidden_pages and (hidden := find_places(scalar, index, index.hidden_pages)):
        return describe_place(scalar.path, text, Match.HIDDEN, hidden[0], places=len(hidden))
    if is_choice(scalar):
        return Evidence(scalar.path, text, Match.NOT_APPLICABLE)
    similar = [(edits, page, find) for page in index.pages[:MAX_SIMILAR_PAGES] for find, edits in list_similar(page, scalar)]
    if similar:
        edits, page, find = min(similar, key=lambda found: found[0])
        return describe_place(scalar.path, text, Match.SIMILAR, Place(page, find, False), distance=edits)
    return Evidence(scalar.path, text, Match.ABSENT)


def is_choice(scalar: Scalar) -> bool:
    """Say whether a value is one of a few that need not be printed as they are written."""
    return isinstance(scalar.value, bool) or any("enum" in schema or "const" in schema for schema in scalar.schemas)


def names_number(value: Any) -> bool:
    """Say whether a value is a number, or a text that is one."""
    return not isinstance(value, bool) and (isinstance(value, int | float | Decimal) or bool(parse_number_text(str(value))[0]))


def list_similar(page: PageIndex, scalar: Scalar) -> list[tuple[Find, int]]:
    """Return the place of a page that differs least from a text, if there is one; none for a day or a time."""
    is_text = isinstance(scalar.value, str) and not any("format" in schema for schema in scalar.schemas)
    found = find_similar(page, scalar.value) if is_text else None
    return [found] if found else []


def describe_place(path: str, text: str, match: Match, place: Place, **facts: Any) -> Evidence:
    """Return the evidence for a value at a place, and what else is known of it."""
    witness = Witness.OCR if place.page.is_ocr else Witness.OCR_LAYER if place.is_overlay else Witness.TEXT
    words = " ".join(place.page.get_printed(find) for find in place.finds)
    return Evidence(path, text, match, place.page.page_no, place.box, witness, words, **facts)


def make_placed_row(path: str, value: str, page: int | None, box: Box | None) -> PlacedValueRow:
    """Return a value, as text, and where it stands."""
    x0, y0, x1, y1 = box or (None, None, None, None)
    return {"path": path, "value": value, "page": page, "x0": x0, "y0": y0, "x1": x1, "y1": y1}


def make_evidence_row(found: Evidence) -> EvidenceRow:
    """Return evidence as a record holds it."""
    return {
        **make_placed_row(found.path, found.value, found.page, found.box),
        "witness": found.witness,
        "match": found.match,
        "places": found.places,
        "words": found.words,
        "distance": found.distance,
    }
