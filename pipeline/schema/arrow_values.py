"""Conversion of valid JSON values to the values of Arrow columns; a value that its column cannot hold exactly is a ValueError.

Nothing is rounded or changed silently, with two exceptions: a missing property becomes null, and a date-time is kept as the
instant in UTC, without its offset.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa

from pipeline.schema import dump_json, format_value, join_path

DATE_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:\d\d)(?:\.(\d+?)0*)?([Zz]|[+-]\d\d:\d\d)")
UTC_NOTE = "kept in UTC, without the offset that was printed"


@dataclass(frozen=True)
class Column:
    """A property's Arrow type and the function that converts a JSON value to it."""

    type: pa.DataType
    convert: Callable[[Column, Any, str], Any]
    """Takes the column, a value other than null and its path. Raises ValueError for a value that does not fit."""
    fields: dict[str, Column] = field(default_factory=dict)
    """The fields of a struct by name, or the items of a list under ""."""
    note: str = ""


def make_misfit_error(path: str, value: Any, why: str) -> ValueError:
    return ValueError(f"{path} is {format_value(value)}, {why}")


def convert_value(part: Column, value: Any, path: str) -> Any:
    """Return a value, which may be null, as the value of its Arrow column."""
    return None if value is None else part.convert(part, value, path)


def convert_struct(part: Column, value: Any, path: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise make_misfit_error(path, value, "which is not an object")
    for name in value:
        if name not in part.fields:
            raise ValueError(f"{join_path(path, name)} is not declared in the schema, so that it has no column")
    return {name: convert_value(inner, value.get(name), join_path(path, name)) for name, inner in part.fields.items()}


def convert_list(part: Column, value: Any, path: str) -> list[Any]:
    if type(value) is not list:
        raise make_misfit_error(path, value, "which is not an array")
    return [convert_value(part.fields[""], item, join_path(path, index)) for index, item in enumerate(value)]


def convert_boolean(_: Column, value: Any, path: str) -> bool:
    if value is not True and value is not False:
        raise make_misfit_error(path, value, "which is not true or false")
    return value


def to_decimal(value: Any, path: str) -> Decimal:
    """Return a number as a Decimal. Raises ValueError for other values, true and false among them."""
    if type(value) not in (int, float, Decimal):
        raise make_misfit_error(path, value, "which is not a number")
    return Decimal(str(value))


def convert_integer(_: Column, value: Any, path: str) -> int:
    whole = int(to_decimal(value, path))
    if whole != value or not -(2**63) <= whole < 2**63:
        raise make_misfit_error(path, value, "which is not a whole number of 64 bits")
    return whole


def convert_number(_: Column, value: Any, path: str) -> float:
    """Return the float that equals the number or prints as it."""
    nearest = float(to_decimal(value, path))
    if nearest != value and Decimal(repr(nearest)) != value:
        raise make_misfit_error(path, value, "which has more digits than a 64-bit float keeps")
    return nearest


def convert_decimal(part: Column, value: Any, path: str) -> Decimal:
    given, whole_digits = to_decimal(value, path), part.type.precision - part.type.scale
    if given and given.adjusted() >= whole_digits:
        raise make_misfit_error(path, value, f"which has more than {whole_digits} digits before the point")
    rounded = given.quantize(Decimal(1).scaleb(-part.type.scale))
    if rounded != given:
        raise make_misfit_error(path, value, f"which has more than {part.type.scale} decimals")
    return rounded


def convert_text(_: Column, value: Any, path: str) -> str:
    if type(value) is not str:
        raise make_misfit_error(path, value, "which is not a string")
    return value


def convert_date(_: Column, value: Any, path: str) -> date:
    try:
        day = date.fromisoformat(convert_text(_, value, path))
    except ValueError:
        raise make_misfit_error(path, value, "which is not a date") from None
    if day.isoformat() != value:
        raise make_misfit_error(path, value, "which is not written YYYY-MM-DD")
    return day


def convert_date_time(_: Column, value: Any, path: str) -> datetime:
    """Return the instant in UTC. Python's parser alone would cut digits after the microseconds."""
    match = DATE_TIME.fullmatch(convert_text(_, value, path))
    day, clock, fraction, offset = match.groups("") if match else ("", "", "", "")
    if len(fraction) > 6:
        raise make_misfit_error(path, value, "which is finer than a microsecond")
    try:
        return datetime.fromisoformat(f"{day}T{clock}.{fraction:0<6}{offset.upper()}").astimezone(UTC)
    except (ValueError, OverflowError):
        raise make_misfit_error(path, value, "which is not a date and time between the years 1 and 9999") from None


def convert_to_json(_: Column, value: Any, path: str) -> str:
    return dump_json(value)


BOOLEAN = Column(pa.bool_(), convert_boolean)
INTEGER = Column(pa.int64(), convert_integer)
NUMBER = Column(pa.float64(), convert_number)
TEXT = Column(pa.string(), convert_text)
CHOICE = Column(pa.dictionary(pa.int32(), pa.string()), convert_text)
STRINGS = {"date": Column(pa.date32(), convert_date), "date-time": Column(pa.timestamp("us", tz="UTC"), convert_date_time, note=UTC_NOTE)}
