"""Fields of a form: a schema and its columns in, a tree of fields with titles, kinds and choices out.

    {"title": "Total", "type": ["number", "null"], "multipleOf": 0.01}   ->   {"name": "total", "title": "Total", "kind": "number", …}

Kinds: text, date, date_time, number, integer, boolean, choice, json, object, list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import pyarrow as pa

from pipeline.schema import Schema, walk_in_place
from pipeline.schema.arrow_values import CHOICE, Column, convert_to_json


class FormField(TypedDict, total=False):
    """One field."""

    name: str
    title: str
    help: str
    kind: str
    choices: list[str]
    decimals: int
    """Of a number, where its column has a number of them."""
    fields: list[FormField]
    """Of an object; of a list, the one field that its items are."""


def build_form(root: Column, schema: Schema) -> list[FormField]:
    """Return the fields of a record."""
    return [build_field(name, part, find_parts([schema], name, schema), schema) for name, part in root.fields.items()]


def build_field(name: str, part: Column, schemas: Sequence[Schema], root: Schema) -> FormField:
    """Return the field of a column; `schemas` are those that apply to its value."""
    found: FormField = {"name": name, "title": find_keyword(schemas, "title") or name, "help": find_keyword(schemas, "description") or ""}
    if "" in part.fields:
        items = [inner for one in schemas for inner in walk_in_place(one.get("items", {}), root)]
        return {**found, "kind": "list", "fields": [build_field("", part.fields[""], items, root)]}
    if part.fields:
        inner = [build_field(key, column, find_parts(schemas, key, root), root) for key, column in part.fields.items()]
        return {**found, "kind": "object", "fields": inner}
    found["kind"] = find_kind(part)
    if part.type == CHOICE.type:
        choices = [value for one in schemas for value in one.get("enum", [one["const"]] if "const" in one else [])]
        found["choices"] = list(dict.fromkeys(str(value) for value in choices if value is not None))
    if pa.types.is_decimal(part.type):
        found["decimals"] = part.type.scale
    return found


def find_kind(part: Column) -> str:
    """Return the kind of a single value."""
    if part.convert is convert_to_json:
        return "json"
    for kind, is_kind in (
        ("choice", pa.types.is_dictionary),
        ("date", pa.types.is_date),
        ("date_time", pa.types.is_timestamp),
        ("integer", pa.types.is_integer),
        ("boolean", pa.types.is_boolean),
        ("text", pa.types.is_string),
    ):
        if is_kind(part.type):
            return kind
    return "number"


def find_parts(schemas: Sequence[Schema], name: str, root: Schema) -> list[Schema]:
    """Return the schemas that apply to a property."""
    holders = [inner for one in schemas for inner in walk_in_place(one, root)]
    return [inner for one in holders if name in one.get("properties", {}) for inner in walk_in_place(one["properties"][name], root)]


def find_keyword(schemas: Sequence[Schema], key: str) -> Any:
    return next((one[key] for one in schemas if isinstance(one.get(key), str)), None)
