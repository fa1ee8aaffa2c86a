"""A schema -> Arrow columns, and a valid value -> a row of them. Knows pyarrow's types only, no file and no table.

    {"type": ["number", "null"], "multipleOf": 0.01}           -> decimal128(18, 2)
    {"type": "string", "format": "date"}                       -> date32
    {"enum": ["EUR", "USD", null]}                             -> dictionary<int32, string>
    {"type": "array", "items": {"type": "object", …}}          -> list<struct<…>>
    {"type": ["string", "number"]}, a free-form object, …      -> string that holds JSON; `notes` says why

Nothing is dropped, rounded or changed in silence: `row` raises on a value that its column (`cells.py`) cannot hold exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pyarrow as pa

from pipeline.schema import Schema, arrow_values, join_path, resolve_reference, walk_in_place
from pipeline.schema.arrow_values import Column

DIGITS = 18
"""Of a decimal column: cents up to 10^16 in 8 bytes."""
SHAPING = {"type", "format", "enum", "const", "multipleOf", "items", "prefixItems", "anyOf", "oneOf", "additionalProperties"}
SHAPING |= {"patternProperties", "unevaluatedProperties"}
"""Keywords that decide a column; two different values of one have no simple sum."""
OPEN_KEYWORDS = 'undeclared properties have no column and make a row invalid; the schema should say "additionalProperties": false'


class UntypedError(Exception):
    """This part of the schema has no single Arrow type; the text says why."""


class ArrowPlan:
    """A schema's columns, decided once: the same for full, empty and failed shards."""

    def __init__(self, schema: Schema) -> None:
        try:
            self.root = build_struct_column(*flatten_part(schema, schema, ()), schema)
        except UntypedError as why:
            own = {name: build_column(part, (), schema) for name, part in schema["properties"].items()}
            self.root = make_struct_column(own, f"{why}; {OPEN_KEYWORDS}")
        self.schema = pa.schema(list(self.root.type))
        self.notes = list(list_notes(self.root, "$"))
        """A sentence for each property that is JSON in a string, or whose column holds less than the schema admits."""

    def build_row(self, value: Any) -> dict[str, Any]:
        """Return a value as one row of `schema`, every column present.

        Raises ValueError with the path of what a column cannot hold exactly.
        """
        row: dict[str, Any] = arrow_values.convert_struct(self.root, value, "$")
        return row


def list_notes(part: Column, path: str) -> Iterator[str]:
    """Yield what a user should know of a column and of those inside it."""
    if part.note:
        yield f"{path}: {part.note}"
    for name, inner in part.fields.items():
        yield from list_notes(inner, join_path(path, name) if name else path + "[]")


# A schema's part -> its column. `seen` holds the references that led here, `root` is where they point into.


def build_column(given: Any, seen: tuple[str, ...], root: Schema) -> Column:
    """Return the column of a property or an item."""
    try:
        return build_typed_column(*flatten_part(given, root, seen), root)
    except UntypedError as why:
        return Column(pa.string(), arrow_values.convert_to_json, note=f"a string that holds JSON, because {why}")


def flatten_part(given: Any, root: Schema, seen: tuple[str, ...]) -> tuple[Schema, tuple[str, ...]]:
    """Return a part with its `$ref` followed and its `allOf` added up."""
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
    """Return what holds where two parts hold, as far as it decides a column."""
    twice = [key for key in one if key in SHAPING and other.get(key, one[key]) != one[key]]
    if twice:
        raise UntypedError(f"its allOf gives '{twice[0]}' twice")
    properties = {**one.get("properties", {}), **other.get("properties", {})}
    if any(properties[name] != part for name, part in one.get("properties", {}).items()):
        raise UntypedError("its allOf describes a property twice")
    return {**other, **one, **({"properties": properties} if properties else {})}


def build_typed_column(part: Schema, seen: tuple[str, ...], root: Schema) -> Column:
    """Return the column of a part that is flat."""
    if "enum" in part or "const" in part:
        return build_enum_column(part["enum"] if "enum" in part else [part["const"]])
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
    if decimals >= DIGITS:
        return arrow_values.NUMBER
    return Column(pa.decimal128(DIGITS, decimals), arrow_values.convert_decimal) if decimals > 0 else arrow_values.INTEGER


def build_union_column(options: list[Any], seen: tuple[str, ...], root: Schema) -> Column:
    """Return the one column of all alternatives but null."""
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
    """Return a list of whatever its items are."""
    if "prefixItems" in part or not isinstance(part.get("items"), dict):
        raise UntypedError("its items are not of one declared type")
    item = build_column(part["items"], seen, root)
    return Column(pa.list_(item.type), arrow_values.convert_list, {"": item})


def build_struct_column(part: Schema, seen: tuple[str, ...], root: Schema) -> Column:
    """Return a struct of the declared properties, if the schema speaks of no others."""
    properties = part.get("properties", {})
    if not properties:
        raise UntypedError("it is an object without declared properties")
    for key in ("additionalProperties", "unevaluatedProperties", "patternProperties"):
        if part.get(key, False) is not False:
            raise UntypedError(f"it is an object with '{key}'")
    if any(inner.get("properties", {}).keys() - properties.keys() for inner in walk_in_place(part, root, seen)):
        raise UntypedError("its alternatives have properties of their own")
    closed = "additionalProperties" in part or "unevaluatedProperties" in part
    return make_struct_column(
        {name: build_column(given, seen, root) for name, given in properties.items()}, "" if closed else OPEN_KEYWORDS
    )


def make_struct_column(fields: dict[str, Column], note: str) -> Column:
    return Column(pa.struct([(name, part.type) for name, part in fields.items()]), arrow_values.convert_struct, fields, note)
