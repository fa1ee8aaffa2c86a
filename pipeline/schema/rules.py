"""Rules: expressions over a typed record that its schema cannot state, such as sums and the order of dates.

    {"name": "total_adds_up", "expression": "near(subtotal + tax_amount, total, 0.02)", "message": "…", "fields": ["subtotal", …]}

The expressions are CEL (https://cel.dev). A column is a variable: decimals and floats are doubles, dates are timestamps at midnight UTC,
lists and structs are lists and maps, JSON texts are what they hold. A rule is judged where all its fields have a value:

    passed     true
    broken     false
    unknown    a field is null, or the expression is
    error      the expression cannot be evaluated; `check_rules` tries every rule before a run, so that values alone can cause it

A rule decides nothing about a record's status. What is computed here is the same for the same record.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import StrEnum
from typing import Any, TypedDict

import pyarrow as pa

from pipeline.errors import JobError
from pipeline.schema import Schema, parse_json
from pipeline.schema.arrow_values import Column, convert_to_json
from pipeline.schema.rule_functions import FUNCTIONS
from pipeline.wording import suggest_word

RULES = "x-rules"
"""The keyword at a schema's root that holds rules."""
NAME = re.compile(r"[a-z][a-z0-9_]*")
KEYS = {"name", "expression", "message", "fields", "if_null", "re_ask"}
RULE_TYPE = pa.struct([("name", pa.string()), ("result", pa.string()), ("message", pa.string()), ("fields", pa.list_(pa.string()))])
"""A rule's result, in the records."""
MAX_ERROR_LENGTH = 200
EXAMPLES: dict[Any, Any] = {pa.bool_(): True, pa.int64(): 2, pa.float64(): 1.5}
EXAMPLE_TIME = datetime(2024, 5, 31, tzinfo=UTC)


class RuleResult(StrEnum):
    """What a rule says of a record."""

    PASSED = "passed"
    BROKEN = "broken"
    UNKNOWN = "unknown"
    ERROR = "error"


@dataclass(frozen=True)
class RecordRule:
    """One rule."""

    name: str
    expression: str
    message: str
    fields: tuple[str, ...] = ()
    """Dotted names of the columns that it concerns, `line_items.amount`; by default the columns in its expression."""
    judges_null: bool = False
    """Whether it is judged also where one of its fields is null."""
    asks_again: bool = False
    """Whether an answer that breaks it is followed by a request for its fields alone."""


class RuleRow(TypedDict):
    """A rule's result as a record holds it; message and fields where it is broken or an error."""

    name: str
    result: str
    message: str | None
    fields: list[str] | None


def list_schema_rules(schema: Schema) -> list[RecordRule]:
    """Return the rules at a schema's root. Raises ValueError with the JSON pointer and what is wrong there."""
    given = schema.get(RULES, [])
    if not isinstance(given, list):
        raise ValueError(f"#/{RULES} must be a list of rules")
    return [parse_rule(rule, f"#/{RULES}/{index}") for index, rule in enumerate(given)]


def parse_rule(given: Any, pointer: str) -> RecordRule:
    """Return a rule of a schema. Raises ValueError."""
    if not isinstance(given, dict):
        raise ValueError(f"{pointer} must be an object with name, expression and message")
    if unknown := [key for key in given if key not in KEYS]:
        allowed = f"allowed are {', '.join(sorted(KEYS))}"
        raise ValueError(f"{pointer}: '{unknown[0]}' is not a key of a rule{suggest_word(unknown[0], KEYS)}; {allowed}")
    for key in ("name", "expression", "message"):
        if not isinstance(given.get(key), str) or not given[key].strip():
            raise ValueError(f"{pointer}: a rule has a text for name, expression and message; '{key}' is missing or none")
    fields = given.get("fields", [])
    if not isinstance(fields, list) or not all(isinstance(name, str) for name in fields):
        raise ValueError(f"{pointer}/fields must be a list of names of columns")
    if given.get("if_null", "skip") not in ("skip", "judge"):
        raise ValueError(f"{pointer}/if_null is '{given['if_null']}'; allowed are skip and judge")
    if not isinstance(given.get("re_ask", False), bool):
        raise ValueError(f"{pointer}/re_ask is '{given['re_ask']}'; allowed are true and false")
    if not NAME.fullmatch(given["name"]):
        raise ValueError(f"{pointer}/name is '{given['name']}'; a name has small letters, digits and underscores")
    judges_null, asks_again = given.get("if_null") == "judge", given.get("re_ask", False)
    return RecordRule(given["name"], given["expression"], given["message"], tuple(fields), judges_null, asks_again)


def combine_rules(own: Sequence[RecordRule], others: Sequence[RecordRule]) -> tuple[RecordRule, ...]:
    """Return a schema's rules and a job's, of which one replaces that of the same name. Raises ValueError for a name given twice."""
    for rules in (own, others):
        names = [rule.name for rule in rules]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the rule {twice[0]} is given twice")
    return tuple({rule.name: rule for rule in (*own, *others)}.values())


class RuleSet:
    """Compiled rules over the columns of one schema."""

    def __init__(self, rules: Sequence[RecordRule], root: Column) -> None:
        """Raises JobError for an expression that is not CEL and for a field that is no column."""
        self.rules, self.root = tuple(rules), root
        self.programs: list[CompiledRule] = [compile_rule(rule, root) for rule in self.rules]
        self.context = make_context() if rules else None

    def __reduce__(self) -> tuple[type[RuleSet], tuple[tuple[RecordRule, ...], Column]]:
        """Pickle the texts; compiling them takes microseconds."""
        return RuleSet, (self.rules, self.root)

    def judge_record(self, row: Mapping[str, Any]) -> list[RuleRow]:
        """Return each rule's result for a row of Arrow values."""
        if self.context is None:
            return []
        self.context.update({name: convert_for_rule(part, row.get(name)) for name, part in self.root.fields.items()})
        return [self.judge_rule(compiled, row) for compiled in self.programs]

    def judge_rule(self, compiled: CompiledRule, row: Mapping[str, Any]) -> RuleRow:
        """Return one rule's result; the context has the row's values."""
        rule = compiled.rule
        if not rule.judges_null and any(has_null(row, path) for path in compiled.paths):
            return {"name": rule.name, "result": str(RuleResult.UNKNOWN), "message": None, "fields": None}
        result, message = evaluate_program(compiled.program, self.context)
        told = result in (RuleResult.BROKEN, RuleResult.ERROR)
        fields = [".".join(path) for path in compiled.paths] if told else None
        return {"name": rule.name, "result": str(result), "message": (message or rule.message) if told else None, "fields": fields}

    def list_verdicts(self, results: Sequence[RuleRow], row: Mapping[str, Any]) -> list[RuleVerdict]:
        """Return what the rules that passed or are broken say of their fields, given their results for this row.

        A rule that concerns the items of one list alone is judged again for each item, which tells the item that breaks it.
        """
        found = list[RuleVerdict]()
        if self.context is None:
            return found
        for compiled, result in zip(self.programs, results, strict=True):
            fields = tuple(".".join(path) for path in compiled.paths)
            holds = {RuleResult.PASSED: True, RuleResult.BROKEN: False}.get(RuleResult(result["result"]))
            name = compiled.paths[0][0] if compiled.paths else ""
            used = {*self.root.fields} & {*compiled.program.variables()}
            if {path[0] for path in compiled.paths} == {name} == used and is_list_of_items(row.get(name)):
                for number, item in enumerate(row[name]):
                    alone = {**row, name: [item]}
                    self.context.update({name: convert_for_rule(self.root.fields[name], alone[name])})
                    verdict = self.judge_rule(compiled, alone)["result"]
                    if verdict in (RuleResult.PASSED, RuleResult.BROKEN):
                        found.append(RuleVerdict(compiled.rule.name, fields, verdict == RuleResult.PASSED, f"$.{name}[{number}]."))
            elif holds is not None:
                found.append(RuleVerdict(compiled.rule.name, fields, holds))
        return found


def is_list_of_items(value: Any) -> bool:
    """Say whether a value is a list of objects."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


@dataclass(frozen=True)
class RuleVerdict:
    """What a rule says of the values that it concerns."""

    rule: str
    fields: tuple[str, ...]
    holds: bool
    item: str = ""
    """How the paths of these values begin, if it is about one item."""

    def concerns(self, path: str, field: str) -> bool:
        """Say whether it is about the value at a path, whose field is that path without the numbers of items."""
        return path.startswith(self.item) and any(field == name or field.startswith(f"{name}.") for name in self.fields)


@dataclass(frozen=True)
class CompiledRule:
    """A rule, its program, and the paths of its fields."""

    rule: RecordRule
    program: Any = field(compare=False)
    paths: tuple[tuple[str, ...], ...]


def compile_rule(rule: RecordRule, root: Column) -> CompiledRule:
    """Return a compiled rule. Raises JobError."""
    import cel

    try:
        program = cel.compile(rule.expression)
    except ValueError as error:
        raise make_rule_error(rule, f"is not an expression of CEL: {shorten_error(error)}") from None
    used = [name for name in program.variables() if name in root.fields]
    paths = tuple(tuple(name.split(".")) for name in rule.fields or used)
    for path in paths:
        find_column(rule, path, root)
    if rule.asks_again and not paths:
        raise make_rule_error(rule, "has re_ask: true and concerns no column: name its fields")
    return CompiledRule(rule, program, paths)


def find_column(rule: RecordRule, path: Sequence[str], root: Column) -> Column:
    """Return the column of a field. Raises JobError for one that the schema does not have."""
    part = root
    for index, name in enumerate(path):
        while "" in part.fields:
            part = part.fields[""]
        if name not in part.fields:
            before = ".".join(path[:index])
            known = [".".join(filter(None, (before, other))) for other in part.fields]
            guess = suggest_word(".".join(path), known)
            raise make_rule_error(rule, f"has the field '{'.'.join(path)}', which is not in the schema{guess}")
        part = part.fields[name]
    return part


def make_rule_error(rule: RecordRule, what: str) -> JobError:
    return JobError(f"the rule {rule.name} {what}", key="extract.rules")


def shorten_error(error: Exception) -> str:
    """Return the first sentence of an error of the CEL library."""
    text = " ".join(str(error).split("\n")[0].split())
    return text[:MAX_ERROR_LENGTH]


def make_context() -> Any:
    """Return what expressions are evaluated in: the functions, no values yet."""
    import cel

    context = cel.Context()
    for name, function in FUNCTIONS.items():
        context.add_function(name, function)
    return context


def evaluate_program(program: Any, context: Any) -> tuple[RuleResult, str | None]:
    """Return what an expression says of the values in the context, and the error's sentence if it has one."""
    try:
        found = program.execute(context)
    except Exception as error:  # any: the library raises RuntimeError, TypeError, ValueError, OverflowError and ZeroDivisionError
        return RuleResult.ERROR, shorten_error(error)
    if found is None:
        return RuleResult.UNKNOWN, None
    if not isinstance(found, bool):
        return RuleResult.ERROR, f"it gives {found!r:.40}, which is neither true nor false"
    return (RuleResult.PASSED if found else RuleResult.BROKEN), None


def convert_for_rule(part: Column | None, value: Any) -> Any:
    """Return a value of an Arrow column as the value of an expression's variable."""
    match value:
        case dict():
            return {name: convert_for_rule(part.fields.get(name) if part else None, inner) for name, inner in value.items()}
        case list():
            return [convert_for_rule(part.fields.get("") if part else None, inner) for inner in value]
        case str() if part and part.convert is convert_to_json:
            return convert_for_rule(None, parse_json(value))
        case Decimal():
            return float(value)
        case datetime():
            return value if value.tzinfo else value.replace(tzinfo=UTC)
        case date():
            return datetime.combine(value, time(), UTC)
    return value


def has_null(value: Any, path: Sequence[str]) -> bool:
    """Say whether the value at a path is null, or one of the values where lists are on the way."""
    if value is None:
        return True
    if isinstance(value, list) and path:
        return any(has_null(item, path) for item in value)
    return bool(path) and has_null(value.get(path[0]), path[1:])


# ---- Trial ----------------------------------------------------------------------------------------------------------


def check_rules(rules: RuleSet) -> None:
    """Raise JobError for a rule that errors on a record that it may meet: with all values, with nulls, and with empty lists."""
    for compiled in rules.programs:
        for title, row in make_trial_records(compiled, rules.root):
            found = RuleSet([compiled.rule], rules.root).judge_record(row)[0]
            if found["result"] == RuleResult.ERROR:
                hint = "" if title == "all values" else "; let it say what null means, as in `due_date == null || …`"
                raise make_rule_error(compiled.rule, f"fails on a record with {title}: {found['message']}{hint}")


def make_trial_records(compiled: CompiledRule, root: Column) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield records to try a rule on, each with a title. Null is what the rule is judged with: nothing that its fields exclude."""
    fields = [".".join(path) for path in compiled.paths]

    def is_field(path: str) -> bool:
        return any(name == path or name.startswith(f"{path}.") for name in fields)

    def is_given(path: str) -> bool:
        return True

    def is_absent(path: str) -> bool:
        return False

    yield "all values", make_example_struct(root, "", is_given, 2)
    yield "empty lists", make_example_struct(root, "", is_given, 0)
    yield "nulls in all but its fields", make_example_struct(root, "", is_field, 2)
    if compiled.rule.judges_null:
        yield "nulls only", make_example_struct(root, "", is_absent, 0)
        for name in root.fields:
            yield f"null as {name}", make_example_struct(root, "", is_given, 2) | {name: None}


def make_example_struct(part: Column, path: str, is_given: Callable[[str], bool], items: int) -> dict[str, Any]:
    """Return a struct of which the values at given paths are not null."""
    inner = {name: (f"{path}.{name}" if path else name, column) for name, column in part.fields.items()}
    return {name: make_example(column, to, is_given, items) if is_given(to) else None for name, (to, column) in inner.items()}


def make_example(part: Column, path: str, is_given: Callable[[str], bool], items: int) -> Any:
    """Return a value of a column, a list with so many items."""
    if "" in part.fields:
        return [make_example(part.fields[""], path, is_given, items) for _ in range(items)]
    if part.fields:
        return make_example_struct(part, path, is_given, items)
    if pa.types.is_decimal(part.type):
        return Decimal("19.5")
    if pa.types.is_date(part.type):
        return EXAMPLE_TIME.date()
    if pa.types.is_timestamp(part.type):
        return EXAMPLE_TIME
    return EXAMPLES.get(part.type, "null" if part.convert is convert_to_json else "A1")
