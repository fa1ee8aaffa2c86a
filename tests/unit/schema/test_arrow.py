"""Arrow columns: a value that `build_row` converts must be the same after a Parquet file and the conversion back (`restore_value`)."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import schema as schemas
from pipeline.schema.arrow import ArrowPlan
from pipeline.schema.arrow_values import Column, convert_date_time, convert_decimal_text, convert_number, convert_to_json
from pipeline.schema.validate import Validator

ROOT = Path(__file__).parents[3]
MASKBENCH = ROOT.parent / "shared/corpora/schemas/maskbench"
ITEM = {"type": "object", "additionalProperties": False, "properties": {"name": {"type": "string"}, "n": {"type": ["integer", "null"]}}}


def make_plan(**properties: Any) -> ArrowPlan:
    return ArrowPlan({"type": "object", "additionalProperties": False, "properties": properties})


def build_whole_row(columns: ArrowPlan, value: Any) -> dict[str, Any]:
    """Return a value's row. Raises ValueError for a value with something that its column cannot hold."""
    row, misfits = columns.build_row(value)
    if misfits:
        raise ValueError(misfits[0])
    return row


def write_and_read(columns: ArrowPlan, rows: list[dict[str, Any]]) -> pa.Table:
    """Return rows after they were written to a Parquet file and read back."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=columns.schema), file)
    return pq.read_table(file)


def restore_value(column: Column, cell: Any) -> Any:
    """Return the JSON value of an Arrow value, without properties that are null."""
    if cell is None:
        return None
    if pa.types.is_struct(column.type):
        return {name: restore_value(inner, cell[name]) for name, inner in column.fields.items() if cell[name] is not None}
    if pa.types.is_list(column.type):
        return [restore_value(column.fields[""], item) for item in cell]
    if column.convert is convert_to_json:
        return schemas.parse_json(cell)
    return cell.isoformat() if isinstance(cell, date) else cell


def is_same(column: Column, value: Any, back: Any) -> bool:
    """Return whether two values are the same; null equals a missing property, and an instant has several spellings."""
    if value is None or back is None:
        return value is back
    if pa.types.is_struct(column.type):
        names = {name for name, item in value.items() if item is not None}
        return names == back.keys() and all(is_same(column.fields[name], value[name], back[name]) for name in names)
    if pa.types.is_list(column.type):
        return len(value) == len(back) and all(is_same(column.fields[""], *pair) for pair in zip(value, back, strict=True))
    if column.convert is convert_date_time:
        return datetime.fromisoformat(value.upper()) == datetime.fromisoformat(back)
    if column.convert is convert_decimal_text:
        return Decimal(value) == back
    if column.convert is convert_number:
        return value in (back, Decimal(repr(back)))
    if column.convert is convert_to_json:
        return schemas.dump_json(value) == schemas.dump_json(back)
    return bool(value == back) and isinstance(value, bool) == isinstance(back, bool)


def is_restored(columns: ArrowPlan, values: list[Any]) -> bool:
    cells = write_and_read(columns, [build_whole_row(columns, value) for value in values]).to_pylist()
    return all(is_same(columns.root, value, restore_value(columns.root, cell)) for value, cell in zip(values, cells, strict=True))


# --- which type a part becomes

DECIMAL = pa.decimal128(18, 2)
CHOICE = pa.dictionary(pa.int32(), pa.string())
DECIMAL_UNION = {"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "null"}], "title": "A Decimal of pydantic's"}
STRUCT = pa.struct([("name", pa.string()), ("n", pa.int64())])


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "boolean"}, pa.bool_()),
        ({"type": ["integer", "null"]}, pa.int64()),
        ({"type": "number"}, pa.float64()),
        ({"type": ["integer", "number"]}, pa.float64()),
        ({"type": ["number", "null"], "multipleOf": Decimal("0.01")}, DECIMAL),
        ({"type": "number", "multipleOf": 0.01}, DECIMAL),
        ({"type": "number", "multipleOf": Decimal("0.0010")}, pa.decimal128(18, 3)),
        ({"type": "number", "multipleOf": Decimal("0.25")}, DECIMAL),
        ({"type": "number", "multipleOf": 1}, pa.int64()),
        ({"type": "number", "multipleOf": Decimal("1e-18")}, pa.float64()),
        ({"type": "string", "format": "date"}, pa.date32()),
        ({"type": "string", "format": "date-time"}, pa.timestamp("us", tz="UTC")),
        ({"type": "string", "format": "x-local-date-time"}, pa.timestamp("us")),
        ({"type": "string", "format": "time"}, pa.string()),
        (DECIMAL_UNION, pa.decimal128(38, 9)),
        ({"enum": ["EUR", "USD", None]}, CHOICE),
        ({"type": "string", "const": "invoice"}, CHOICE),
        ({"enum": [1, 2, None]}, pa.int64()),
        ({"enum": [1, Decimal("2.5")]}, pa.float64()),
        ({"type": "array", "items": ITEM}, pa.list_(STRUCT)),
        ({"anyOf": [ITEM, {"type": "null"}]}, STRUCT),
        ({"oneOf": [{"type": "null"}, {"type": "string", "format": "date"}]}, pa.date32()),
        ({"oneOf": [{"const": "a", "title": "A"}, {"const": "b"}]}, CHOICE),
        ({"anyOf": [{"type": "string", "format": "date"}, {"type": "string"}]}, pa.string()),
        ({"anyOf": [{"type": "integer"}, {"type": "number"}]}, pa.float64()),
        ({"allOf": [ITEM], "description": "described"}, STRUCT),
        ({"allOf": [ITEM, {"properties": {"n": {"type": ["integer", "null"]}}}]}, STRUCT),
        ({**ITEM, "anyOf": [{"required": ["name"]}, {"required": ["n"]}]}, STRUCT),
    ],
)
def test_a_part_has_its_type(part: dict[str, Any], expected: pa.DataType) -> None:
    columns = make_plan(x=part)
    assert columns.schema.field("x").type == expected
    assert not any("JSON" in note for note in columns.notes)


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ({"type": "object"}, "without declared properties"),
        ({**ITEM, "additionalProperties": True}, "'additionalProperties'"),
        ({**ITEM, "additionalProperties": {}}, "'additionalProperties'"),
        ({**ITEM, "patternProperties": {"^x": {}}}, "'patternProperties'"),
        ({**ITEM, "oneOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, "properties of their own"),
        ({"type": ["string", "number"]}, "number or string"),
        ({"anyOf": [{"type": "string"}, {"type": "boolean"}]}, "several types"),
        ({"enum": ["a", 1]}, "one scalar type"),
        ({"allOf": [{"type": "string"}, {"type": "number"}]}, "'type' twice"),
        ({"allOf": [ITEM, {"properties": {"name": {"type": "integer"}}}]}, "a property twice"),
        ({"type": "array", "prefixItems": [{"type": "string"}]}, "items"),
        ({"type": "array"}, "items"),
        ({"type": "null"}, "only be null"),
        ({}, "no 'type'"),
        (True, "no 'type'"),
    ],
)
def test_a_part_without_one_type_is_json_and_the_note_says_why(part: Any, why: str) -> None:
    columns = make_plan(x=part)
    assert columns.schema.field("x").type == pa.string()
    assert len(columns.notes) == 1
    assert columns.notes[0].startswith("$.x: a string that holds JSON, because ")
    assert why in columns.notes[0]


def test_references_are_followed() -> None:
    money = {"type": "number", "multipleOf": Decimal("0.01")}
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/money", "title": "X"}}, "$defs": {"money": money}}
    assert ArrowPlan(schema).schema.field("x").type == DECIMAL


def test_a_recursion_ends_in_json_and_loses_nothing() -> None:
    node = {"type": "object", "additionalProperties": False, "properties": {"n": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}}
    root = {"type": "object", "additionalProperties": False, "properties": {"head": {"$ref": "#/$defs/node"}}, "$defs": {"node": node}}
    columns = ArrowPlan(root)
    assert columns.schema.field("head").type == pa.struct([("n", pa.int64()), ("next", pa.string())])
    assert columns.notes[0] == "$.head.next: a string that holds JSON, because it refers to itself through #/$defs/node"
    assert is_restored(columns, [{"head": {"n": 1, "next": {"n": 2, "next": {"n": 3}}}}])


def test_a_part_used_twice_is_no_recursion() -> None:
    person = {"type": "object", "additionalProperties": False, "properties": {"name": {"type": "string"}}}
    refs = {"seller": {"$ref": "#/$defs/person"}, "buyers": {"type": "array", "items": {"$ref": "#/$defs/person"}}}
    columns = ArrowPlan({"type": "object", "additionalProperties": False, "properties": refs, "$defs": {"person": person}})
    assert columns.notes == []


def test_json_inside_a_list_is_noted_with_its_path() -> None:
    columns = make_plan(x={"type": "array", "items": {"type": "object"}})
    assert columns.schema.field("x").type == pa.list_(pa.string())
    assert columns.notes[0].startswith("$.x[]: ")


def test_an_object_that_does_not_say_whether_it_is_closed_is_a_struct() -> None:
    columns = make_plan(x={"type": "object", "properties": {"name": {"type": "string"}}})
    assert columns.schema.field("x").type == pa.struct([("name", pa.string())])
    assert columns.notes == []


def test_a_root_that_has_no_struct_keeps_its_own_columns_and_says_so() -> None:
    columns = ArrowPlan({"type": "object", "additionalProperties": True, "properties": {"a": {"type": "string"}}})
    assert columns.schema.names == ["a"]
    assert "'additionalProperties'; undeclared properties have no column" in columns.notes[0]


def test_the_shipped_schemas_need_no_notes() -> None:
    for path in (ROOT / "schemas").glob("*.json"):
        assert ArrowPlan(schemas.load_schema(path)).notes == [], path


# --- what comes back

DATES = st.dates().map(date.isoformat)
OFFSETS = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
INSTANTS = st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=OFFSETS).map(datetime.isoformat)
FLOATS = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False).map(lambda number: schemas.parse_json(repr(number)))
NUMBERS = st.integers(-(2**53), 2**53) | FLOATS
DECIMALS = st.decimals(allow_nan=False, allow_infinity=False).filter(lambda number: abs(number.adjusted()) <= schemas.MAX_EXPONENT)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
LEAVES = [
    ({"type": "boolean"}, st.booleans()),
    ({"type": "integer"}, st.integers(-(2**63), 2**63 - 1)),
    ({"type": "number"}, NUMBERS),
    ({"type": "number", "multipleOf": Decimal("0.01")}, st.decimals(-(10**15), 10**15, places=2)),
    ({"type": "string"}, st.text()),
    ({"type": "string", "format": "date"}, DATES),
    ({"type": "string", "format": "date-time"}, INSTANTS),
    ({"enum": ["EUR", "ÄÖ", ""]}, st.sampled_from(["EUR", "ÄÖ", ""])),
    ({}, ANYTHING),
    ({"type": ["object", "null"]}, st.none() | st.dictionaries(st.text(max_size=5), ANYTHING, max_size=3)),
    ({"type": ["string", "integer"]}, st.text() | st.integers()),
]
NAMES = st.text("abc ä.[\"'/~$", min_size=1, max_size=4)


@st.composite
def nest_schema(draw: st.DrawFn, inner: Any) -> tuple[dict[str, Any], st.SearchStrategy[Any]]:
    """Return a schema around others, and a strategy for its values."""
    part, values = draw(inner)
    match draw(st.sampled_from(["nullable", "array", "object", "allOf"])):
        case "nullable":
            return {"anyOf": [part, {"type": "null"}]}, values | st.none()
        case "array":
            return {"type": "array", "items": part}, st.lists(values, max_size=4)
        case "allOf":
            return {"allOf": [part]}, values
    parts = draw(st.dictionaries(NAMES, inner, min_size=1, max_size=4))
    schema = {"type": "object", "properties": {name: part for name, (part, _) in parts.items()}}
    closed = {"additionalProperties": False} if draw(st.booleans()) else {}
    return {**schema, **closed}, st.fixed_dictionaries({}, optional={name: values for name, (_, values) in parts.items()})


PARTS = st.recursive(st.sampled_from(LEAVES), nest_schema, max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_is_valid_comes_back_unchanged(data: st.DataObject) -> None:
    part, values = data.draw(PARTS)
    columns, validator = make_plan(x=part), Validator({"type": "object", "properties": {"x": part}})
    drawn = [{"x": value} for value in data.draw(st.lists(values, max_size=4))]
    assert not any(validator.find_violations(value) for value in drawn)
    assert is_restored(columns, drawn)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(LEAVES), ANYTHING | DECIMALS | DATES | INSTANTS)
def test_any_value_comes_back_unchanged_or_is_refused_with_its_path(leaf: tuple[Any, Any], value: Any) -> None:
    columns = make_plan(x=leaf[0])
    try:
        build_whole_row(columns, {"x": value})
    except ValueError as error:
        assert str(error).startswith("$.x is ")  # noqa: PT017  # both outcomes are right
    else:
        assert is_restored(columns, [{"x": value}])


def read_corpus_values(path: Path) -> tuple[ArrowPlan, list[Any]]:
    """Return the columns of one schema of the corpus, and its valid instances."""
    case = schemas.parse_json(path.read_text("utf-8"))
    schema = schemas.check_schema({**case["schema"], "$schema": "https://" + schemas.LATEST_DRAFT})
    validator = Validator(schema)
    return ArrowPlan(schema), [test["data"] for test in case["tests"] if not validator.find_violations(test["data"])]


@pytest.mark.skipif(not MASKBENCH.exists(), reason="the shared corpus is absent")
def test_real_instances_come_back_unchanged() -> None:
    seen: Counter[str] = Counter()
    for path in sorted(MASKBENCH.glob("*.json"))[::4]:
        try:
            columns, values = read_corpus_values(path)
        except ValueError:
            continue  # `check_schema` refuses it
        for value in values:
            try:
                seen["unchanged" if is_restored(columns, [value]) else "changed"] += 1
            except ValueError:
                seen["refused"] += 1
    assert seen["changed"] == 0
    assert seen["refused"] <= 3  # properties that the schema does not declare
    assert seen["unchanged"] > 350


# --- what is refused


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ({"type": "integer"}, 2**63, "$.x is 9223372036854775808, which is not a whole number of 64 bits"),
        ({"type": "integer"}, True, "$.x is true, which is not a number"),
        ({"type": "integer"}, "7", '$.x is "7", which is not a number'),
        ({"type": "boolean"}, 1, "$.x is 1, which is not true or false"),
        ({"type": "number"}, Decimal("0.12345678901234567891"), "$.x is 0.12345678901234567891, which has more digits than a 64-bit float"),
        ({"type": "number"}, 10**400, "which has more digits than a 64-bit float keeps"),
        ({"multipleOf": Decimal("0.01"), "type": "number"}, Decimal("1.005"), "$.x is 1.005, which has more than 2 decimals"),
        ({"multipleOf": Decimal("0.01"), "type": "number"}, Decimal("1e16"), "1E+16, which has more than 16 digits before the point"),
        ({"type": "string", "format": "date"}, "2024-02-30", '$.x is "2024-02-30", which is not a date'),
        ({"type": "string", "format": "date"}, "20240229", '$.x is "20240229", which is not written YYYY-MM-DD'),
        ({"type": "string", "format": "date-time"}, "2024-01-01T00:00:00.1234567Z", "finer than a microsecond"),
        ({"type": "string", "format": "date-time"}, "0001-01-01T00:00:00+01:00", "between the years 1 and 9999"),
        ({"type": "string", "format": "date-time"}, "2024-01-01T00:00:00", "which is not a date and time"),
        ({"type": "string"}, ["a"], '$.x is ["a"], which is not a string'),
        ({"type": "array", "items": {"type": "string"}}, "a", "which is not an array"),
        ({"type": "array", "items": {"type": "integer"}}, [1, "b"], '$.x[1] is "b", which is not a number'),
        (ITEM, [], "$.x is [], which is not an object"),
        (ITEM, {"name": "a", "other": 1}, "$.x.other is not declared in the schema"),
        (DECIMAL_UNION, "1.234,56", '$.x is "1.234,56", which is not a decimal number'),
        ({"type": "string", "format": "x-local-date-time"}, "2024-02-30T10:00:00", "which is not a date and time written"),
    ],
)
def test_what_a_column_cannot_hold_is_refused_with_path_and_reason(part: dict[str, Any], value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the text is compared below
        build_whole_row(make_plan(x=part), {"x": value})
    assert message in str(error.value)


def test_a_misfit_empties_its_own_cell_and_no_other() -> None:
    columns = make_plan(n={"type": "integer"}, total={"type": "number"}, items={"type": "array", "items": ITEM})
    row, misfits = columns.build_row({"n": 2**70, "total": 2, "items": [{"name": "tea", "n": 2**70}, {"name": "milk", "x": 1}], "y": 0})
    assert row == {"n": None, "total": 2.0, "items": [{"name": "tea", "n": None}, {"name": "milk", "n": None}]}
    assert [misfit.partition(" is ")[0] for misfit in misfits] == ["$.y", "$.n", "$.items[0].n", "$.items[1].x"]


def test_a_root_that_is_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\$ is null, which is not an object"):
        build_whole_row(make_plan(x=ITEM), None)


def test_a_float_that_prints_as_the_number_or_is_it_is_taken() -> None:
    assert is_restored(make_plan(x={"type": "number"}), [{"x": Decimal("0.1")}, {"x": 2**60}, {"x": Decimal("1e22")}, {"x": 5}])


def test_a_decimal_is_padded_and_never_rounded() -> None:
    row = build_whole_row(make_plan(x={"type": "number", "multipleOf": Decimal("0.01")}), {"x": Decimal("19.9")})
    assert str(row["x"]) == "19.90"


def test_a_decimal_of_pydantic_may_be_a_number_or_a_string() -> None:
    columns = make_plan(x=DECIMAL_UNION)
    cells = [columns.build_row({"x": value})[0]["x"] for value in ("19.90", Decimal("19.9"), "1E+3", 7, "+.5", None)]
    assert cells == [Decimal("19.9"), Decimal("19.9"), 1000, 7, Decimal("0.5"), None]


def test_a_local_date_and_time_has_no_zone() -> None:
    row, misfits = make_plan(x={"type": "string", "format": "x-local-date-time"}).build_row({"x": "2024-05-31T14:05:00.5"})
    assert (row["x"], misfits) == (datetime(2024, 5, 31, 14, 5, 0, 500_000), [])


def test_strings_are_normalized() -> None:
    columns = make_plan(x={"type": "string"}, y={"type": "object", "additionalProperties": {"type": "string"}})
    row, _ = columns.build_row({"x": "Cafe\u0301", "y": {"name": "Cafe\u0301"}})
    assert row == {"x": "Caf\u00e9", "y": '{"name":"Caf\u00e9"}'}


def test_an_instant_is_kept_in_utc() -> None:
    row = build_whole_row(make_plan(x={"type": "string", "format": "date-time"}), {"x": "2024-01-01t12:00:00.5+02:00"})
    assert row["x"] == datetime(2024, 1, 1, 10, 0, 0, 500_000, tzinfo=UTC)


# --- shards and their readers


def make_invoice() -> tuple[ArrowPlan, dict[str, Any]]:
    item = {"description": "Tea", "quantity": 2, "unit_price": Decimal("1.5"), "amount": 3}
    value = {"invoice_date": "2024-02-29", "currency": "EUR", "line_items": [item, item], "total": Decimal("19.99")}
    return ArrowPlan(schemas.load_schema(ROOT / "schemas/invoice.json")), value


def test_full_failed_and_empty_shards_have_one_schema() -> None:
    columns, value = make_invoice()
    full, failed, empty = (
        write_and_read(columns, rows) for rows in ([build_whole_row(columns, value)], [build_whole_row(columns, {})], [])
    )
    assert full.schema.equals(columns.schema)
    assert failed.schema.equals(columns.schema)
    assert empty.schema.equals(columns.schema)
    assert pa.concat_tables([full, failed, empty]).num_rows == 2


def test_pandas_reads_dates_decimals_and_structs() -> None:
    columns, value = make_invoice()
    frame = write_and_read(columns, [build_whole_row(columns, value)]).to_pandas()
    first = frame.iloc[0]
    assert first["invoice_date"] == date(2024, 2, 29)
    assert first["total"] == Decimal("19.99")
    assert first["line_items"][1]["unit_price"] == Decimal("1.50")
    assert isinstance(frame["currency"].dtype, pd.CategoricalDtype)


def test_a_plan_travels() -> None:
    columns, value = make_invoice()
    other = pickle.loads(pickle.dumps(columns))
    assert other.schema.equals(columns.schema)
    assert build_whole_row(other, value) == build_whole_row(columns, value)
