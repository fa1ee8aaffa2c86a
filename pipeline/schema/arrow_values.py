"""Conversion of valid JSON values to the values of Arrow columns, and back. A value that its column cannot hold exactly becomes null, with
a reason.

Nothing is rounded or changed silently, with three exceptions: a missing property becomes null, a date-time is kept as the instant in
UTC, without its offset, and strings are normalized to NFC, so that "é" from a scan equals "é" from a text layer.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Context, Decimal
from typing import Any

import pyarrow as pa

from pipeline.schema import LOCAL_DATE_TIME, dump_json, format_value, is_local_date_time, join_path, parse_json

DATE_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:\d\d)(?:\.(\d+?)0*)?([Zz]|[+-]\d\d:\d\d)")
DECIMAL_TEXT = re.compile(r"[+-]?([0-9]{1,60}(\.[0-9]{0,60})?|\.[0-9]{1,60})([eE][+-]?[0-9]{1,3})?", re.ASCII)
DECIMAL_TEXT_DIGITS, DECIMAL_TEXT_SCALE = 38, 9
WIDE = Context(prec=100)
"""Decimal's own context has 28 digits, fewer than a column's 38."""
UTC_NOTE = "kept in UTC, without the offset that was printed"


@dataclass(frozen=True)
class Column:
    """A property's Arrow type and the function that converts a JSON value to it."""

    type: pa.DataType
    convert: Callable[[Column, Any, str], Any] | None = None
    """Takes the column, a value other than null and its path. Raises ValueError for a misfit. None for structs and lists."""
    fields: dict[str, Column] = field(default_factory=dict)
    """The fields of a struct by name, or the items of a list under ""."""
    note: str = ""


def make_misfit_error(path: str, value: Any, why: str) -> ValueError:
    return ValueError(f"{path} is {format_value(value)}, {why}")


def convert_value(part: Column, value: Any, path: str, misfits: list[str]) -> Any:
    """Return a value as the value of its Arrow column; null, with a sentence in `misfits`, for one that the column cannot hold."""
    if value is None:
        return None
    try:
        if part.convert:
            return part.convert(part, value, path)
        return convert_list(part, value, path, misfits) if "" in part.fields else convert_struct(part, value, path, misfits)
    except ValueError as error:
        misfits.append(str(error))
        return None


def convert_struct(part: Column, value: Any, path: str, misfits: list[str]) -> dict[str, Any]:
    """Return an object with every declared property; one that is not declared is a misfit of its own."""
    if type(value) is not dict:
        raise make_misfit_error(path, value, "which is not an object")
    undeclared = [join_path(path, name) for name in value if name not in part.fields]
    misfits += [f"{inner} is not declared in the schema, so that it has no column" for inner in undeclared]
    return {name: convert_value(inner, value.get(name), join_path(path, name), misfits) for name, inner in part.fields.items()}


def convert_list(part: Column, value: Any, path: str, misfits: list[str]) -> list[Any]:
    if type(value) is not list:
        raise make_misfit_error(path, value, "which is not an array")
    return [convert_value(part.fields[""], item, join_path(path, index), misfits) for index, item in enumerate(value)]


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
    rounded = given.quantize(Decimal(1).scaleb(-part.type.scale), context=WIDE)
    if rounded != given:
        raise make_misfit_error(path, value, f"which has more than {part.type.scale} decimals")
    return rounded


def convert_decimal_text(part: Column, value: Any, path: str) -> Decimal:
    """Return a number, or a string that is one, as pydantic writes a `Decimal`."""
    if type(value) is not str:
        return convert_decimal(part, value, path)
    if not DECIMAL_TEXT.fullmatch(value):
        raise make_misfit_error(path, value, "which is not a decimal number")
    return convert_decimal(part, Decimal(value), path)


def convert_text(_: Column, value: Any, path: str) -> str:
    if type(value) is not str:
        raise make_misfit_error(path, value, "which is not a string")
    return unicodedata.normalize("NFC", value)


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


def convert_local_date_time(_: Column, value: Any, path: str) -> datetime:
    """Return a date and time without a zone, as it was printed."""
    if not is_local_date_time(text := convert_text(_, value, path)):
        raise make_misfit_error(path, value, "which is not a date and time written YYYY-MM-DDTHH:MM:SS")
    return datetime.fromisoformat(text)


def convert_to_json(_: Column, value: Any, path: str) -> str:
    return unicodedata.normalize("NFC", dump_json(value))


def make_json_value(part: Column | None, value: Any) -> Any:
    """Return a value of a Parquet file as the JSON value that a document would have; `part` is its column, None where there is none."""
    match value:
        case dict():
            return {key: make_json_value(part.fields.get(key) if part else None, inner) for key, inner in value.items()}
        case list():
            return [make_json_value(part.fields.get("") if part else None, inner) for inner in value]
        case str() if part and part.convert is convert_to_json:
            return parse_json(value)
        case float():
            return None if math.isnan(value) else Decimal(repr(value))
        case datetime() if part and pa.types.is_date(part.type) and value.time() == time():
            return value.date().isoformat()
        case date():
            return value.isoformat()
    return value


BOOLEAN = Column(pa.bool_(), convert_boolean)
INTEGER = Column(pa.int64(), convert_integer)
NUMBER = Column(pa.float64(), convert_number)
TEXT = Column(pa.string(), convert_text)
CHOICE = Column(pa.dictionary(pa.int32(), pa.string()), convert_text)
STRINGS = {
    "date": Column(pa.date32(), convert_date),
    "date-time": Column(pa.timestamp("us", tz="UTC"), convert_date_time, note=UTC_NOTE),
    LOCAL_DATE_TIME: Column(pa.timestamp("us"), convert_local_date_time),
}
"""Columns of strings by their format; any other is `TEXT`."""
DECIMAL = Column(pa.decimal128(DECIMAL_TEXT_DIGITS, DECIMAL_TEXT_SCALE), convert_decimal_text)
"""Column of a `Decimal` of pydantic's without a number of decimal places."""
