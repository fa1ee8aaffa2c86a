"""pandas DataFrame of an output's records."""

from __future__ import annotations

import os
from typing import Any

import pandas as pd
import pyarrow as pa

from pipeline.export.tables import explode_table
from pipeline.output.records import read_record_table

NULLABLE: dict[pa.DataType, Any] = {pa.bool_(): pd.BooleanDtype(), pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype()}


def read(output: str | os.PathLike[str], explode: str | None = None) -> pd.DataFrame:
    """Return the records in an output folder, or at its URL, sorted by source and page.

    Dates are `date32[day][pyarrow]`, amounts `decimal128(18, 2)[pyarrow]`, enums categories, whole numbers `Int64`, truth values `boolean`,
    lists and structs Arrow's. `explode` names an array, `line_items` or `tables.rows`: then there is a row for each of its items, with
    its number in `_item` and a column for each of its properties; a record without items keeps one row. Raises JobError and RunError.
    """
    table = read_record_table(os.fspath(output)).table
    return convert_to_frame(explode_table(table, explode) if explode else table)


def convert_to_frame(table: pa.Table) -> pd.DataFrame:
    """Return a table with pandas' types, none of which changes a value: no date becomes a timestamp, no decimal a float."""
    frame: pd.DataFrame = table.unify_dictionaries().to_pandas(types_mapper=choose_pandas_type)
    return frame


def choose_pandas_type(kind: pa.DataType) -> Any:
    """Return pandas' type for a column; None for its default."""
    if pa.types.is_date(kind) or pa.types.is_decimal(kind) or (pa.types.is_nested(kind) and not pa.types.is_dictionary(kind)):
        return pd.ArrowDtype(kind)
    return NULLABLE.get(kind)
