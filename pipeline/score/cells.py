"""Comparison of a record with its truth: two typed rows and the columns of their schema in, one `Cell` for each value out.

    truth   {"total": 19.99, "items": [{"name": "Tea"}]}
    record  {"total": 19.9,  "items": [{"name": "Milk"}, {"name": "tea"}]}
         -> total WRONG; items[].name WRONG (Tea, tea), similarity 1; items[].name INVENTED (Milk)

Lists are aligned, so that a missing or an additional item does not shift those after it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Set
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any, NamedTuple

from pipeline.schema import arrow_values, join_path, parse_json
from pipeline.schema.arrow_values import Column
from pipeline.score.align import align_items
from pipeline.score.text import compute_anls, normalize_text


class Outcome(StrEnum):
    """What became of one value of the truth or of the record."""

    RIGHT = "right"
    WRONG = "wrong"
    """Both have a value, and not the same."""
    MISSING = "missing"
    """The record has null."""
    INVENTED = "invented"
    """The truth has null."""
    BOTH_NULL = "both_null"
    UNREAD = "unread"
    """The record is `failed`: nothing was read, so that its nulls are no answers."""


class Cell(NamedTuple):
    """One value compared. `field` is its path with items merged, `line_items[].amount`.

    `path` is that in the record; `$.line_items[-].amount` is of an item that only the truth has.
    """

    field: str
    path: str
    truth: Any
    found: Any
    outcome: Outcome
    is_normalized: bool
    """Right, or equal as normalised texts."""
    similarity: float
    """Levenshtein similarity (`text.compute_anls`); 1 for what is right or null on both sides."""

    @property
    def is_exact(self) -> bool:
        return self.outcome in (Outcome.RIGHT, Outcome.BOTH_NULL)


@dataclass(frozen=True)
class Tolerance:
    """How far apart a number or date may be from the true one and still be right."""

    number: Decimal = Decimal(0)
    date_days: int = 0


def make_tolerance(number: float, date_days: int) -> Tolerance:
    """Return a tolerance with the number as it is written: 0.01 is a hundredth."""
    return Tolerance(Decimal(str(number)), date_days)


@dataclass(frozen=True)
class FieldNode:
    """A column, or a field or item inside one, as the comparison walks it. Without members it is a single value."""

    field: str
    step: str
    """What it adds to its parent's path."""
    is_list: bool = False
    is_struct: bool = False
    is_json: bool = False
    members: tuple[FieldNode, ...] = ()
    """The fields of a struct, or the item of a list."""

    def list_leaves(self) -> list[FieldNode]:
        """Return the single values in it, in the schema's order."""
        if not self.members:
            return [self]
        return [leaf for member in self.members for leaf in member.list_leaves()]


def build_tree(part: Column, labelled: Set[str] | None = None, field: str = "$", step: str = "") -> FieldNode | None:
    """Return the tree of a schema's columns, without the fields that are not `labelled`; None if nothing is left."""
    name = field.removeprefix("$").removeprefix(".")
    if part.convert:
        is_json = part.convert is arrow_values.convert_to_json
        return FieldNode(name, step, is_json=is_json) if labelled is None or name in labelled else None
    if "" in part.fields:
        members = [build_tree(part.fields[""], labelled, f"{field}[]")]
    else:
        paths = {key: join_path("$", key).removeprefix("$") for key in part.fields}
        members = [build_tree(inner, labelled, field + paths[key], paths[key]) for key, inner in part.fields.items()]
    kept = tuple(member for member in members if member)
    is_list = "" in part.fields
    return FieldNode(name, step, is_list, not is_list, members=kept) if kept else None


class RecordComparer:
    """Compares rows of one schema."""

    def __init__(self, root: Column, tolerance: Tolerance, labelled: Set[str] | None = None) -> None:
        """`root` is the column of an `ArrowPlan`; only the fields in `labelled` are compared."""
        self.tree, self.tolerance = build_tree(root, labelled), tolerance
        self.keys = list_keys(root)

    @property
    def fields(self) -> list[str]:
        return [leaf.field for leaf in self.tree.list_leaves()] if self.tree else []

    def compare_rows(self, truth: Mapping[str, Any], found: Mapping[str, Any]) -> list[Cell]:
        """Return the cells of a record and its truth. An item without a partner has no cell for its nulls."""
        cells: list[Cell] = []
        if self.tree:
            self.walk_node(self.tree, "$", truth, found, cells)
        return cells

    def mark_unread(self, truth: Mapping[str, Any]) -> list[Cell]:
        """Return the cells of a document that has no record."""
        empty = dict.fromkeys(truth)
        return [cell._replace(outcome=Outcome.UNREAD, is_normalized=False, similarity=0.0) for cell in self.compare_rows(truth, empty)]

    def walk_node(self, node: FieldNode, path: str, truth: Any, found: Any, cells: list[Cell]) -> None:
        """Append the cells of a value; `path` is the record's."""
        if node.is_list:
            self.walk_list(node, path, truth or [], found or [], cells)
        elif node.is_struct:
            for member in node.members:
                key = self.keys[member.step]
                self.walk_node(member, path + member.step, truth.get(key) if truth else None, found.get(key) if found else None, cells)
        else:
            cells.append(Cell(node.field, path, truth, found, *self.judge_value(node.is_json, truth, found)))

    def walk_list(self, node: FieldNode, path: str, truth: list[Any], found: list[Any], cells: list[Cell]) -> None:
        item = node.members[0]
        true_keys, found_keys = ([self.freeze_value(item, value) for value in values] for values in (truth, found))

        def rate_pair(i: int, j: int) -> float:
            inner: list[Cell] = []
            self.walk_node(item, path, truth[i], found[j], inner)
            return sum(cell.similarity for cell in inner if cell.outcome is not Outcome.BOTH_NULL)

        for i, j in align_items(true_keys, found_keys, rate_pair):
            inner: list[Cell] = []
            place = f"{path}[{'-' if j is None else j}]"
            self.walk_node(item, place, None if i is None else truth[i], None if j is None else found[j], inner)
            cells += inner if None not in (i, j) else [cell for cell in inner if cell.outcome is not Outcome.BOTH_NULL]

    def freeze_value(self, node: FieldNode, value: Any) -> Hashable:
        """Return the compared values inside a value as a key, by which equal items are found."""
        if node.is_list:
            return tuple(self.freeze_value(node.members[0], item) for item in value or ())
        if node.is_struct:
            return tuple(self.freeze_value(member, value and value.get(self.keys[member.step])) for member in node.members)
        return value  # type: ignore[no-any-return]  # a scalar of an Arrow column

    def judge_value(self, is_json: bool, truth: Any, found: Any) -> tuple[Outcome, bool, float]:
        """Return the outcome of one value, whether it is equal when normalised, and its similarity."""
        if truth is None or found is None:
            if truth is found:
                return Outcome.BOTH_NULL, True, 1.0
            return (Outcome.INVENTED if truth is None else Outcome.MISSING), False, 0.0
        if self.is_right(is_json, truth, found):
            return Outcome.RIGHT, True, 1.0
        is_normalized = isinstance(truth, str) and not is_json and normalize_text(truth) == normalize_text(found)
        return Outcome.WRONG, is_normalized, compute_anls(str(truth), str(found))

    def is_right(self, is_json: bool, truth: Any, found: Any) -> bool:
        """Say whether a value is the true one, numbers and dates within the tolerance. Free-form JSON is compared as such."""
        if truth == found:
            return True
        if is_json:
            return bool(parse_json(truth) == parse_json(found))
        if isinstance(truth, bool | str):
            return False
        if isinstance(truth, date):
            return bool(abs(truth - found) <= timedelta(self.tolerance.date_days)) if self.tolerance.date_days else False
        return abs(Decimal(str(truth)) - Decimal(str(found))) <= self.tolerance.number if self.tolerance.number else False


def list_keys(part: Column) -> dict[str, str]:
    """Return the name of each property in a schema by the step that it adds to a path."""
    found = {join_path("$", key).removeprefix("$"): key for key in part.fields if key}
    return {**found, **{step: key for inner in part.fields.values() for step, key in list_keys(inner).items()}}


def list_labelled(part: Column, values: Iterable[Any], field: str = "$") -> set[str]:
    """Return the fields that occur in at least one of these JSON values; where only empty lists occur, all fields of their items."""
    present = [value for value in values if value is not None]
    if part.convert:
        return {field.removeprefix("$").removeprefix(".")}
    if "" in part.fields:
        items = [item for value in present if isinstance(value, list) for item in value]
        return list_labelled(part.fields[""], items, f"{field}[]")
    labelled = set[str]()
    for key, inner in part.fields.items():
        here = [value[key] for value in present if isinstance(value, dict) and key in value]
        if here or not present:
            labelled |= list_labelled(inner, here, join_path(field, key))
    return labelled
