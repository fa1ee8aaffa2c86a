"""A schema -> Arrow columns, and a valid value -> a row of them. Knows pyarrow's types only, no file and no table.

    {"type": ["number", "null"], "multipleOf": 0.01}           -> decimal128(18, 2)
    {"type": "string", "format": "date"}                       -> date32
    {"enum": ["EUR", "USD", null]}                             -> dictionary<int32, string>
    {"type": "array", "items": {"type": "object", …}}          -> list<struct<…>>
    {"type": ["string", "number"]}, a free-form object, …      -> string that holds JSON; `notes` says why

Nothing is dropped, rounded or changed in silence: `row` raises on a value that its column cannot hold exactly. Two
things count as one: null and a missing property, and date-times that name the same instant with another offset.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa

from pipeline.schema import Schema, at, dumps, in_place, resolve, shown

DIGITS = 18
"""Of a decimal column: cents up to 10^16 in 8 bytes."""
DATE_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:\d\d)(?:\.(\d+?)0*)?([Zz]|[+-]\d\d:\d\d)")
SHAPING = {"type", "format", "enum", "const", "multipleOf", "items", "prefixItems", "anyOf", "oneOf", "additionalProperties"}
SHAPING |= {"patternProperties", "unevaluatedProperties"}
"""Keywords that decide a column; two different values of one have no simple sum."""
OPEN = 'undeclared properties have no column and make a row invalid; the schema should say "additionalProperties": false'
SHIFTED = "kept in UTC, without the offset that was printed"


class UntypedError(Exception):
    """This part of the schema has no single Arrow type; the text says why."""


@dataclass(frozen=True)
class Column:
    """A property as Arrow sees it: its type and what turns a value into a cell of it."""

    type: pa.DataType
    cell: Callable[[Column, Any, str], Any]
    fields: dict[str, Column] = field(default_factory=dict)
    """A struct's fields by name; a list's items under ""."""
    note: str = ""


class ArrowPlan:
    """A schema's columns, decided once: the same for full, empty and failed shards."""

    def __init__(self, schema: Schema) -> None:
        try:
            self.root = struct(*flat(schema, schema, ()), schema)
        except UntypedError as why:
            own = {name: column(part, (), schema) for name, part in schema["properties"].items()}
            self.root = structure(own, f"{why}; {OPEN}")
        self.schema = pa.schema(list(self.root.type))
        self.notes = list(notes(self.root, "$"))
        """A sentence for each property that is JSON in a string, or whose column holds less than the schema admits."""

    def row(self, value: Any) -> dict[str, Any]:
        """Return a value as one row of `schema`, every column present.

        Raises ValueError with the path of what a column cannot hold exactly.
        """
        row: dict[str, Any] = struct_cell(self.root, value, "$")
        return row


def notes(part: Column, path: str) -> Iterator[str]:
    """Yield what a user should know of a column and of those inside it."""
    if part.note:
        yield f"{path}: {part.note}"
    for name, inner in part.fields.items():
        yield from notes(inner, at(path, name) if name else path + "[]")


# A schema's part -> its column. `seen` holds the references that led here, `root` is where they point into.


def column(given: Any, seen: tuple[str, ...], root: Schema) -> Column:
    """Return the column of a property or an item."""
    try:
        return typed(*flat(given, root, seen), root)
    except UntypedError as why:
        return Column(pa.string(), json_cell, note=f"a string that holds JSON, because {why}")


def flat(given: Any, root: Schema, seen: tuple[str, ...]) -> tuple[Schema, tuple[str, ...]]:
    """Return a part with its `$ref` followed and its `allOf` added up."""
    part, path = resolve(given, root, seen)
    if "$ref" in part:
        raise UntypedError(f"it refers to itself through {part['$ref']}")
    total = {key: value for key, value in part.items() if key != "allOf"}
    followed = set(path)
    for inner in part.get("allOf", ()):
        other, inner_path = flat(inner, root, path)
        followed.update(inner_path)
        total = both(total, other)
    return total, tuple(sorted(followed))


def both(one: Schema, other: Schema) -> Schema:
    """Return what holds where two parts hold, as far as it decides a column."""
    twice = [key for key in one if key in SHAPING and other.get(key, one[key]) != one[key]]
    if twice:
        raise UntypedError(f"its allOf gives '{twice[0]}' twice")
    properties = {**one.get("properties", {}), **other.get("properties", {})}
    if any(properties[name] != part for name, part in one.get("properties", {}).items()):
        raise UntypedError("its allOf describes a property twice")
    return {**other, **one, **({"properties": properties} if properties else {})}


def typed(part: Schema, seen: tuple[str, ...], root: Schema) -> Column:
    """Return the column of a part that is flat."""
    if "enum" in part or "const" in part:
        return choice(part["enum"] if "enum" in part else [part["const"]])
    given = part.get("type")
    if not given and ("anyOf" in part or "oneOf" in part):
        return union(part.get("anyOf") or part["oneOf"], seen, root)
    match sorted(({given} if isinstance(given, str) else set(given or ())) - {"null"}):
        case ["object"]:
            return struct(part, seen, root)
        case ["array"]:
            return array(part, seen, root)
        case ["string"]:
            return STRINGS.get(part.get("format", ""), TEXT)
        case ["number"] | ["integer", "number"]:
            return number(part)
        case ["integer"]:
            return INTEGER
        case ["boolean"]:
            return BOOLEAN
        case []:
            raise UntypedError("it may only be null" if given else "it has no 'type'")
        case several:
            raise UntypedError(f"it may be {' or '.join(several)}")


def choice(values: list[Any]) -> Column:
    """Return the column of an `enum`: strings as a dictionary, or the one scalar type of its values."""
    kinds = {type(value) for value in values if value is not None}
    for allowed, found in (({str}, CHOICE), ({bool}, BOOLEAN), ({int}, INTEGER), ({int, float, Decimal}, NUMBER)):
        if kinds and kinds <= allowed:
            return found
    raise UntypedError("its values are not of one scalar type")


def number(part: Schema) -> Column:
    """Return decimal for multiples of 0.1, 0.01, 0.25 …, int64 for those of a whole number, else float64."""
    if "multipleOf" not in part:
        return NUMBER
    decimals = -int(Decimal(str(part["multipleOf"])).normalize().as_tuple().exponent)
    if decimals >= DIGITS:
        return NUMBER
    return Column(pa.decimal128(DIGITS, decimals), decimal_cell) if decimals > 0 else INTEGER


def union(options: list[Any], seen: tuple[str, ...], root: Schema) -> Column:
    """Return the one column of all alternatives but null."""
    columns = [typed(*flat(option, root, seen), root) for option in options if not is_null(option)]
    cells = {option.cell for option in columns}
    if columns and all(option == columns[0] for option in columns):
        return columns[0]
    if cells and cells <= {text_cell, date_cell, date_time_cell}:
        return TEXT
    if cells and cells <= {integer_cell, decimal_cell, number_cell}:
        return NUMBER
    raise UntypedError("its alternatives are of several types")


def is_null(option: Any) -> bool:
    return isinstance(option, dict) and (option.get("type") == "null" or option.get("enum") == [None] or option.get("const", 0) is None)


def array(part: Schema, seen: tuple[str, ...], root: Schema) -> Column:
    """Return a list of whatever its items are."""
    if "prefixItems" in part or not isinstance(part.get("items"), dict):
        raise UntypedError("its items are not of one declared type")
    item = column(part["items"], seen, root)
    return Column(pa.list_(item.type), list_cell, {"": item})


def struct(part: Schema, seen: tuple[str, ...], root: Schema) -> Column:
    """Return a struct of the declared properties, if the schema speaks of no others."""
    properties = part.get("properties", {})
    if not properties:
        raise UntypedError("it is an object without declared properties")
    for key in ("additionalProperties", "unevaluatedProperties", "patternProperties"):
        if part.get(key, False) is not False:
            raise UntypedError(f"it is an object with '{key}'")
    if any(inner.get("properties", {}).keys() - properties.keys() for inner in in_place(part, root, seen)):
        raise UntypedError("its alternatives have properties of their own")
    closed = "additionalProperties" in part or "unevaluatedProperties" in part
    return structure({name: column(given, seen, root) for name, given in properties.items()}, "" if closed else OPEN)


def structure(fields: dict[str, Column], note: str) -> Column:
    return Column(pa.struct([(name, part.type) for name, part in fields.items()]), struct_cell, fields, note)


# A value -> its cell, or a ValueError that says what does not fit.


def misfit(path: str, value: Any, why: str) -> ValueError:
    return ValueError(f"{path} is {shown(value)}, {why}")


def cell(part: Column, value: Any, path: str) -> Any:
    """Return a value, null included, as a cell of its column."""
    return None if value is None else part.cell(part, value, path)


def struct_cell(part: Column, value: Any, path: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise misfit(path, value, "which is not an object")
    for name in value:
        if name not in part.fields:
            raise ValueError(f"{at(path, name)} is not declared in the schema, so that it has no column")
    return {name: cell(inner, value.get(name), at(path, name)) for name, inner in part.fields.items()}


def list_cell(part: Column, value: Any, path: str) -> list[Any]:
    if type(value) is not list:
        raise misfit(path, value, "which is not an array")
    return [cell(part.fields[""], item, at(path, index)) for index, item in enumerate(value)]


def boolean_cell(_: Column, value: Any, path: str) -> bool:
    if value is not True and value is not False:
        raise misfit(path, value, "which is not true or false")
    return value


def exact(value: Any, path: str) -> Decimal:
    """Return any number as a Decimal; true and false are none."""
    if type(value) not in (int, float, Decimal):
        raise misfit(path, value, "which is not a number")
    return Decimal(str(value))


def integer_cell(_: Column, value: Any, path: str) -> int:
    whole = int(exact(value, path))
    if whole != value or not -(2**63) <= whole < 2**63:
        raise misfit(path, value, "which is not a whole number of 64 bits")
    return whole


def number_cell(_: Column, value: Any, path: str) -> float:
    """Return the float that is the number, or that prints as it."""
    nearest = float(exact(value, path))
    if nearest != value and Decimal(repr(nearest)) != value:
        raise misfit(path, value, "which has more digits than a 64-bit float keeps")
    return nearest


def decimal_cell(part: Column, value: Any, path: str) -> Decimal:
    given, whole_digits = exact(value, path), part.type.precision - part.type.scale
    if given and given.adjusted() >= whole_digits:
        raise misfit(path, value, f"which has more than {whole_digits} digits before the point")
    rounded = given.quantize(Decimal(1).scaleb(-part.type.scale))
    if rounded != given:
        raise misfit(path, value, f"which has more than {part.type.scale} decimals")
    return rounded


def text_cell(_: Column, value: Any, path: str) -> str:
    if type(value) is not str:
        raise misfit(path, value, "which is not a string")
    return value


def date_cell(_: Column, value: Any, path: str) -> date:
    try:
        day = date.fromisoformat(text_cell(_, value, path))
    except ValueError:
        raise misfit(path, value, "which is not a date") from None
    if day.isoformat() != value:
        raise misfit(path, value, "which is not written YYYY-MM-DD")
    return day


def date_time_cell(_: Column, value: Any, path: str) -> datetime:
    """Return the instant in UTC. Python itself would cut off what is finer than a microsecond."""
    match = DATE_TIME.fullmatch(text_cell(_, value, path))
    day, clock, fraction, offset = match.groups("") if match else ("", "", "", "")
    if len(fraction) > 6:
        raise misfit(path, value, "which is finer than a microsecond")
    try:
        return datetime.fromisoformat(f"{day}T{clock}.{fraction:0<6}{offset.upper()}").astimezone(UTC)
    except (ValueError, OverflowError):
        raise misfit(path, value, "which is not a date and time between the years 1 and 9999") from None


def json_cell(_: Column, value: Any, path: str) -> str:
    return dumps(value)


BOOLEAN = Column(pa.bool_(), boolean_cell)
INTEGER = Column(pa.int64(), integer_cell)
NUMBER = Column(pa.float64(), number_cell)
TEXT = Column(pa.string(), text_cell)
CHOICE = Column(pa.dictionary(pa.int32(), pa.string()), text_cell)
STRINGS = {"date": Column(pa.date32(), date_cell), "date-time": Column(pa.timestamp("us", tz="UTC"), date_time_cell, note=SHIFTED)}
