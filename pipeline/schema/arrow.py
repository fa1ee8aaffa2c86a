"""Arrow columns of a schema: takes a JSON Schema and returns an `ArrowPlan`, which converts a valid value to a row.

    {"type": ["number", "null"], "multipleOf": 0.01}           -> decimal128(18, 2)
    {"type": "string", "format": "date"}                       -> date32
    pydantic's Decimal, {"anyOf": [number, string]}            -> decimal128(38, 9)
    {"enum": ["EUR", "USD", null]}                             -> dictionary<int32, string>
    {"type": "array", "items": {"type": "object", …}}          -> list<struct<…>>
    {"type": ["string", "number"]}, a free-form object, …      -> string that holds JSON; `ArrowPlan.notes` says why

Nothing is dropped, rounded or changed silently: a value that its column (`arrow_values.py`) cannot hold exactly is null in the row, and
`build_row` says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pyarrow as pa

from pipeline.schema import DECIMAL_DIGITS, Schema, arrow_values, find_decimal_number, join_path, resolve_reference, walk_in_place
from pipeline.schema.arrow_values import Column

TYPE_KEYWORDS = {"type", "format", "enum", "const", "multipleOf", "items", "prefixItems", "anyOf", "oneOf", "additionalProperties"}
TYPE_KEYWORDS |= {"patternProperties", "unevaluatedProperties"}
"""Keywords that decide the type of a column; two different values of one cannot be combined."""
UNDECLARED = "undeclared properties have no column: decoding forbids them, and where a server writes one, the record is invalid"


class UntypedError(Exception):
    """A part of the schema has no single Arrow type; the message says why."""


class ArrowPlan:
    """The columns of a schema, decided once: full, empty and failed shards have the same."""

    def __init__(self, schema: Schema) -> None:
        try:
            self.root = build_struct_column(*flatten_part(schema, schema, ()), schema)
        except UntypedError as why:
            own = {name: build_column(part, (), schema) for name, part in schema["properties"].items()}
            self.root = make_struct_column(own, f"{why}; {UNDECLARED}")
        self.schema = pa.schema(list(self.root.type))
        self.notes = list(list_notes(self.root, "$"))
        """A sentence for each property that is stored as JSON in a string, or whose column holds less than the schema allows."""

    def build_row(self, value: Any) -> tuple[dict[str, Any], list[str]]:
        """Return a value as one row of `schema`, with every column, and a sentence for each value that its column cannot hold."""
        misfits: list[str] = []
        row = arrow_values.convert_value(self.root, {} if value is None else value, "$", misfits)
        return row or dict.fromkeys(self.schema.names), misfits or ["$ is null, which is not an object"] * (value is None)


def list_notes(part: Column, path: str) -> Iterator[str]:
    """Yield the notes of a column and of the columns inside it, with their paths."""
    if part.note:
        yield f"{path}: {part.note}"
    for name, inner in part.fields.items():
        yield from list_notes(inner, join_path(path, name) if name else path + "[]")


# From a part of a schema to its column. `seen` holds the references followed so far, `root` is the schema they point into.


def build_column(given: Any, seen: tuple[str, ...], root: Schema) -> Column:
    """Return the column of a property or an item."""
    try:
        return build_typed_column(*flatten_part(given, root, seen), root)
    except UntypedError as why:
        return Column(pa.string(), arrow_values.convert_to_json, note=f"a string that holds JSON, because {why}")


def flatten_part(given: Any, root: Schema, seen: tuple[str, ...]) -> tuple[Schema, tuple[str, ...]]:
    """Return a part with its `$ref` resolved and its `allOf` merged. Raises UntypedError for a recursive part."""
    part, path = resolve_reference(given, root, seen)
    if "$ref" in part:
        raise UntypedError(f"it refers to itself through {part['$ref']}")
    total = {key: value for key, value in part.items() if key != "allOf"}
    followed = set(path)
    for inner in part.get("allOf", ()):
        other, inner_path = flatten_part(inner, root, path)
        followed.update(inner_path)
        total = combine_parts(total, other)
    return total, tuple(sorted(followed))


def combine_parts(one: Schema, other: Schema) -> Schema:
    """Return the conjunction of two parts, as far as it decides a column. Raises UntypedError if they contradict each other."""
    twice = [key for key in one if key in TYPE_KEYWORDS and other.get(key, one[key]) != one[key]]
    if twice:
        raise UntypedError(f"its allOf gives '{twice[0]}' twice")
    properties = {**one.get("properties", {}), **other.get("properties", {})}
    if any(properties[name] != part for name, part in one.get("properties", {}).items()):
        raise UntypedError("its allOf describes a property twice")
    return {**other, **one, **({"properties": properties} if properties else {})}


def build_typed_column(part: Schema, seen: tuple[str, ...], root: Schema) -> Column:
    """Return the column of a flattened part. Raises UntypedError if it has no single type."""
    if "enum" in part or "const" in part:
        return build_enum_column(part["enum"] if "enum" in part else [part["const"]])
    if number := find_decimal_number(part):
        return build_number_column(number) if "multipleOf" in number else arrow_values.DECIMAL
    given = part.get("type")
    if not given and ("anyOf" in part or "oneOf" in part):
        return build_union_column(part.get("anyOf") or part["oneOf"], seen, root)
    match sorted(({given} if isinstance(given, str) else set(given or ())) - {"null"}):
        case ["object"]:
            return build_struct_column(part, seen, root)
        case ["array"]:
            return build_array_column(part, seen, root)
        case ["string"]:
            return arrow_values.STRINGS.get(part.get("format", ""), arrow_values.TEXT)
        case ["number"] | ["integer", "number"]:
            return build_number_column(part)
        case ["integer"]:
            return arrow_values.INTEGER
        case ["boolean"]:
            return arrow_values.BOOLEAN
        case []:
            raise UntypedError("it may only be null" if given else "it has no 'type'")
        case several:
            raise UntypedError(f"it may be {' or '.join(several)}")


def build_enum_column(values: list[Any]) -> Column:
    """Return the column of an `enum`: strings as a dictionary, or the one scalar type of its values."""
    kinds = {type(value) for value in values if value is not None}
    for allowed, found in (
        ({str}, arrow_values.CHOICE),
        ({bool}, arrow_values.BOOLEAN),
        ({int}, arrow_values.INTEGER),
        ({int, float, Decimal}, arrow_values.NUMBER),
    ):
        if kinds and kinds <= allowed:
            return found
    raise UntypedError("its values are not of one scalar type")


def build_number_column(part: Schema) -> Column:
    """Return decimal for multiples of 0.1, 0.01, 0.25 …, int64 for those of a whole number, else float64."""
    if "multipleOf" not in part:
        return arrow_values.NUMBER
    decimals = -int(Decimal(str(part["multipleOf"])).normalize().as_tuple().exponent)
    if decimals >= DECIMAL_DIGITS:
        return arrow_values.NUMBER
    return Column(pa.decimal128(DECIMAL_DIGITS, decimals), arrow_values.convert_decimal) if decimals > 0 else arrow_values.INTEGER


def build_union_column(options: list[Any], seen: tuple[str, ...], root: Schema) -> Column:
    """Return the column that holds all alternatives except null. Raises UntypedError if there is none."""
    columns = [build_typed_column(*flatten_part(option, root, seen), root) for option in options if not is_null_type(option)]
    kinds = {option.convert for option in columns}
    if columns and all(option == columns[0] for option in columns):
        return columns[0]
    if kinds and kinds <= {arrow_values.convert_text, arrow_values.convert_date, arrow_values.convert_date_time}:
        return arrow_values.TEXT
    if kinds and kinds <= {arrow_values.convert_integer, arrow_values.convert_decimal, arrow_values.convert_number}:
        return arrow_values.NUMBER
    raise UntypedError("its alternatives are of several types")


def is_null_type(option: Any) -> bool:
    return isinstance(option, dict) and (option.get("type") == "null" or option.get("enum") == [None] or option.get("const", 0) is None)


def build_array_column(part: Schema, seen: tuple[str, ...], root: Schema) -> Column:
    """Return the column of an array: a list of its items' type. Raises UntypedError if the items have no declared type."""
    if "prefixItems" in part or not isinstance(part.get("items"), dict):
        raise UntypedError("its items are not of one declared type")
    item = build_column(part["items"], seen, root)
    return Column(pa.list_(item.type), fields={"": item})


def build_struct_column(part: Schema, seen: tuple[str, ...], root: Schema) -> Column:
    """Return a struct of the declared properties. Raises UntypedError if the schema describes other properties too."""
    properties = part.get("properties", {})
    if not properties:
        raise UntypedError("it is an object without declared properties")
    for key in ("additionalProperties", "unevaluatedProperties", "patternProperties"):
        if part.get(key, False) is not False:
            raise UntypedError(f"it is an object with '{key}'")
    if any(inner.get("properties", {}).keys() - properties.keys() for inner in walk_in_place(part, root, seen)):
        raise UntypedError("its alternatives have properties of their own")
    return make_struct_column({name: build_column(given, seen, root) for name, given in properties.items()})


def make_struct_column(fields: dict[str, Column], note: str = "") -> Column:
    return Column(pa.struct([(name, part.type) for name, part in fields.items()]), fields=fields, note=note)
