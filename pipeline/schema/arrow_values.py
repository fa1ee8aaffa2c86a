"""A valid value -> the cell of an Arrow column, or a ValueError that says what does not fit. Knows no schema.

Nothing is rounded or changed in silence: what a column cannot hold exactly is refused. Two things count as one: null and a
missing property, and date-times that name the same instant with another offset.
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
SHIFTED = "kept in UTC, without the offset that was printed"


@dataclass(frozen=True)
class Column:
    """A property as Arrow sees it: its type and what turns a value into a cell of it."""

    type: pa.DataType
    convert: Callable[[Column, Any, str], Any]
    fields: dict[str, Column] = field(default_factory=dict)
    """A struct's fields by name; a list's items under ""."""
    note: str = ""


def make_misfit_error(path: str, value: Any, why: str) -> ValueError:
    return ValueError(f"{path} is {format_value(value)}, {why}")


def convert_value(part: Column, value: Any, path: str) -> Any:
    """Return a value, null included, as a cell of its column."""
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
    """Return any number as a Decimal; true and false are none."""
    if type(value) not in (int, float, Decimal):
        raise make_misfit_error(path, value, "which is not a number")
    return Decimal(str(value))


def convert_integer(_: Column, value: Any, path: str) -> int:
    whole = int(to_decimal(value, path))
    if whole != value or not -(2**63) <= whole < 2**63:
        raise make_misfit_error(path, value, "which is not a whole number of 64 bits")
    return whole


def convert_number(_: Column, value: Any, path: str) -> float:
    """Return the float that is the number, or that prints as it."""
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
    """Return the instant in UTC. Python itself would cut off what is finer than a microsecond."""
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
STRINGS = {"date": Column(pa.date32(), convert_date), "date-time": Column(pa.timestamp("us", tz="UTC"), convert_date_time, note=SHIFTED)}
