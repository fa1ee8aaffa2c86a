"""Rules: what CEL promises here, what is refused before a run, and what the shipped rules find."""

from __future__ import annotations

import copy
import pickle
import random
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pipeline.demo import documents
from pipeline.errors import JobError
from pipeline.schema import dump_json, load_schema, parse_json
from pipeline.schema.arrow import ArrowPlan
from pipeline.schema.rules import RecordRule, RuleSet, RuleVerdict, check_rules, combine_rules, list_schema_rules
from tests.support.scored import make_plan, parse

ROOT = Path(__file__).parents[3]
TEXT, AMOUNT = {"type": ["string", "null"]}, {"type": ["number", "null"], "multipleOf": 0.01}
DATE = {"type": ["string", "null"], "format": "date"}
PLAN = make_plan(
    {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "name": TEXT,
            "first": DATE,
            "last": DATE,
            "total": AMOUNT,
            "rate": {"type": ["number", "null"]},
            "count": {"type": ["integer", "null"]},
            "paid": {"type": ["boolean", "null"]},
            "printed": {"type": ["string", "null"], "format": "x-local-date-time"},
            "free": {"type": ["object", "null"]},
            "who": {"type": "object", "additionalProperties": False, "properties": {"id": TEXT}},
            "items": {
                "type": "array",
                "items": {"type": "object", "additionalProperties": False, "properties": {"what": TEXT, "price": AMOUNT}},
            },
        },
    }
)
RECORD = {
    "name": "Ann",
    "first": "2024-05-31",
    "last": "2024-07-01",
    "total": 19.99,
    "rate": 0.5,
    "count": 5,
    "paid": True,
    "who": {"id": "a"},
    "items": [{"what": "tea", "price": 4.99}, {"what": "milk", "price": 15}],
    "printed": "2024-05-31T14:05:00",
    "free": {"a": [1]},
}


def judge(expression: str, plan: ArrowPlan = PLAN, **changed: Any) -> str:
    """Return the result of a rule over the record, in which these values are changed."""
    return judge_all([RecordRule("r", expression, "m", (), True)], plan, RECORD | changed)["r"]


def judge_all(rules: list[RecordRule], plan: ArrowPlan, values: Any) -> dict[str, str]:
    row, misfits = plan.build_row(parse_json(dump_json(values)))
    assert not misfits
    return {row["name"]: row["result"] for row in RuleSet(rules, plan.root).judge_record(row)}


TRUE = [
    *("1 + 2 == 3", "7 / 2 == 3", "-7 / 2 == -3", "-7 % 3 == -1", "1 == 1.0", "1 < 1.5", "'a' < 'b'", "'a' + 'b' == 'ab'", "!false"),
    *("name.startsWith('A')", "name.endsWith('n')", "name.contains('n')", "name.matches('^[A-Z]')", "size(name) == 3"),
    *("'\\u00e9' == 'é'", "true || 1 / 0 == 1", "1 / 0 == 1 || true", "!(false && 1 / 0 == 1)", "!(1 / 0 == 1 && false)"),
    *("true ? true : 1 / 0 == 1", "name != null", "null == null", "first != null", "total != null", "who.id != null", "items != null"),
    *("!(total == null)", "first < last", "first <= first", "last - first == duration('744h')", "first + duration('24h') < last"),
    *("first.getFullYear() == 2024", "first.getMonth() == 4", "first.getDate() == 31", "first.getDayOfWeek() == 5"),
    *("first == timestamp('2024-05-31T00:00:00Z')", "printed > first", "printed.getHours() == 14", "total == 19.99"),
    *("total + 0.01 == 20.0", "rate == 0.5", "count + 1 == 6", "count > 4.5", "paid", "paid && total > 1.0"),
    *("items.all(i, i.price > 0.0)", "items.exists(i, i.what == 'tea')", "items.exists_one(i, i.price > 5.0)"),
    *("items[0].what == 'tea'", "size(items) == 2", "items.map(i, i.price) == [4.99, 15.0]"),
    *("items.filter(i, i.price > 5.0).size() == 1", "[].all(i, false)", "!([].exists(i, true))", "2 in [1, 2]"),
    *("'EUR' in ['EUR', 'USD']", "has(who.id)", "!has(who.gone)", "free.a[0] == 1", "double(count) == 5.0", "int(1.9) == 1"),
    *("string(count) == '5'", "type(count) == int", "[1, 2] + [3] == [1, 2, 3]", "near(sum(items.map(i, i.price)), total, 0.0)"),
    *("near(0.1 + 0.2, 0.3, 0.0)", "!near(1.0, 1.03, 0.02)", "abs(-2.5) == 2.5", "sum([]) == 0.0", "currency('EUR')"),
    *("!currency('EURO')", "iban('DE89 3704 0044 0532 0130 00')", "!iban('DE89 3704 0044 0532 0130 01')", "vat_eu('DE136695976')"),
    *("!vat_eu('DE136695977')", "!vat_eu('')", "luhn('4111 1111 1111 1111')", "!luhn('4111 1111 1111 1112')", "!luhn('x')"),
    *("isbn('978-3-16-148410-0')", "!isbn('978-3-16-148410-1')", "isbn('0-306-40615-2')"),
]
"""What docs/job.md promises of expressions."""
ERRORS = [
    "total + 1",
    "1 / 0 == 1",
    "name < 1",
    "gone == 1",
    "items[5].what == ''",
    "who.gone == 1",
    "count * 1.5 > 0.0",
    "total",
    "'a'",
    "int('x') == 1",
]
ERRORS += ["9223372036854775807 + 1 > 0", "[1, 0].all(i, 1 / i > 0)"]


@pytest.mark.parametrize("expression", TRUE)
def test_an_expression_means_what_cel_says(expression: str) -> None:
    assert (judge(expression), judge(f"!({expression})")) == ("passed", "broken")


@pytest.mark.parametrize("expression", ERRORS)
def test_what_cel_refuses_is_an_error_of_the_rule(expression: str) -> None:
    assert judge(expression) == "error"


def test_size_of_a_text_counts_bytes() -> None:
    """The library's deviation from CEL that docs/job.md names: a fix of it should be noticed."""
    assert judge("size(name) == 5", name="héé") == "passed"


@pytest.mark.parametrize(
    "expression", ["near(total, 1.0, 0.1)", "sum(items.map(i, i.price)) == null ? null : true", "iban(name)", "abs(total)"]
)
def test_a_function_of_null_is_unknown(expression: str) -> None:
    assert judge(expression, total=None, name=None, items=[{"what": "a", "price": None}]) == "unknown"


def test_null_comparisons_must_be_said() -> None:
    assert judge("first < last", last=None) == "error"
    assert judge("last == null || first < last", last=None) == "passed"


@pytest.mark.parametrize(("field", "result"), [("last", "unknown"), ("who.id", "unknown"), ("items.price", "unknown"), ("count", "passed")])
def test_a_rule_is_not_judged_where_its_field_is_null(field: str, result: str) -> None:
    values = RECORD | {"last": None, "who": {"id": None}, "items": [{"what": "a", "price": 1}, {"what": "b", "price": None}]}
    assert judge_all([RecordRule("r", "true", "m", (field,))], PLAN, values) == {"r": result}


def test_its_fields_are_by_default_its_columns() -> None:
    (row,) = RuleSet([RecordRule("r", "items.all(i, i.price > total)", "too cheap")], PLAN.root).judge_record(
        PLAN.build_row(parse(RECORD))[0]
    )
    assert row == {"name": "r", "result": "broken", "message": "too cheap", "fields": ["items", "total"]}


def test_values_have_types() -> None:
    row = PLAN.build_row(parse(RECORD))[0]
    assert (row["first"], row["total"]) == (date(2024, 5, 31), Decimal("19.99"))


def test_rules_can_be_sent_to_other_processes() -> None:
    rules = RuleSet([RecordRule("r", "first < last", "m")], PLAN.root)
    assert pickle.loads(pickle.dumps(rules)).judge_record(PLAN.build_row(parse(RECORD))[0])[0]["result"] == "passed"


# ---- What is refused before a run -----------------------------------------------------------------------------------

REFUSED = {
    "1 +": r"the rule r is not an expression of CEL: Failed to parse",
    "total + 1 > 0.0": r"the rule r fails on a record with all values: Unsupported operation: float \+ int",
    "gone == 1": r"the rule r fails on a record with all values: Undefined variable or function: 'gone'",
    "total": r"the rule r fails on a record with all values: it gives 19\.5, which is neither true nor false",
    "items[0].price > 0.0": r"the rule r fails on a record with empty lists",
    "items.all(i, i.price > 0.0)": r"the rule r fails on a record with nulls in all but its fields: .*; let it say what null means",
}


@pytest.mark.parametrize("expression", REFUSED)
def test_a_rule_that_errors_is_refused(expression: str) -> None:
    with pytest.raises(JobError, match=REFUSED[expression]) as error:
        check_rules(RuleSet([RecordRule("r", expression, "m")], PLAN.root))
    assert error.value.key == "extract.rules"


def test_a_rule_that_judges_null_is_tried_on_null() -> None:
    check_rules(RuleSet([RecordRule("r", "first < last", "m")], PLAN.root))
    with pytest.raises(JobError, match="fails on a record with nulls"):
        check_rules(RuleSet([RecordRule("r", "first < last", "m", (), True)], PLAN.root))
    check_rules(RuleSet([RecordRule("r", "first == null || last == null || first < last", "m", (), True)], PLAN.root))


def test_a_field_that_is_no_column_is_refused() -> None:
    with pytest.raises(JobError, match=r"the field 'items\.prise', which is not in the schema; did you mean 'items\.price'\?"):
        RuleSet([RecordRule("r", "true", "m", ("items.prise",))], PLAN.root)


GOOD = {"name": "r", "expression": "true", "message": "m"}
WRONG_RULES: list[tuple[Any, str]] = [
    ({}, "#/x-rules must be a list"),
    (["r"], "#/x-rules/0 must be an object"),
    ([{**GOOD, "feilds": []}], "'feilds' is not a key of a rule; did you mean 'fields'"),
    ([{**GOOD, "message": " "}], "'message' is missing or none"),
    ([{**GOOD, "name": "A B"}], "#/x-rules/0/name is 'A B'"),
    ([{**GOOD, "fields": "a"}], "#/x-rules/0/fields must be a list"),
    ([{**GOOD, "if_null": "no"}], "#/x-rules/0/if_null is 'no'; allowed are skip and judge"),
]


@pytest.mark.parametrize(("given", "message"), WRONG_RULES)
def test_a_misspelt_rule_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_schema_rules({"x-rules": given})


def test_a_jobs_rule_replaces_the_schemas() -> None:
    one, other, third = RecordRule("a", "true", "1"), RecordRule("a", "false", "2"), RecordRule("b", "true", "3")
    assert combine_rules([one, third], [other]) == (other, third)
    with pytest.raises(ValueError, match="the rule a is given twice"):
        combine_rules([one, other], [])


# ---- The shipped rules ----------------------------------------------------------------------------------------------


def load_shipped(name: str) -> tuple[list[RecordRule], ArrowPlan]:
    schema = load_schema(ROOT / f"schemas/{name}.json")
    return list_schema_rules(schema), ArrowPlan(schema)


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "schemas").glob("*.json")))
def test_every_schema_has_rules_that_pass_the_check(name: str) -> None:
    rules, plan = load_shipped(name)
    assert rules
    check_rules(RuleSet(rules, plan.root))


def find_blamed(rules: list[RecordRule], plan: ArrowPlan, values: Any) -> set[str]:
    found = judge_all(rules, plan, values)
    assert "error" not in found.values()
    return {name for name, result in found.items() if result == "broken"}


@pytest.mark.parametrize("form", ["invoice", "receipt"])
def test_none_of_a_hundred_right_documents_is_blamed(form: documents.Form) -> None:
    rules, plan = load_shipped(form)
    right = [documents.draw_sample(documents.HELD_OUT + seed, form).truth for seed in range(100)]
    assert [find_blamed(rules, plan, values) for values in right] == [set()] * 100


def spoil(values: Any, rng: random.Random) -> tuple[Any, str] | None:
    """Return a record with one fault that a reader makes, and the rule that must notice; None where it has nothing to spoil."""
    found, line = copy.deepcopy(values), rng.randrange(max(1, len(values["line_items"])))
    fault = rng.choice(["amount", "total", "tax", "dates", "currency", "dropped"])
    taxed = found["subtotal"] is not None
    if fault == "amount" and found["line_items"]:
        found["line_items"][line]["amount"] = Decimal(str(found["line_items"][line]["amount"])) * 10
        return found, "line_amounts"
    if fault == "total":
        found["total"] = Decimal(str(found["total"])) + Decimal("0.9")
        return found, "total_adds_up" if taxed else "total_without_tax"
    if fault == "tax" and taxed:
        found["tax_amount"] = Decimal(str(found["tax_amount"])) + 7
        return found, "total_adds_up"
    if fault == "dates" and found["due_date"]:
        found["due_date"] = "1999-01-01"
        return found, "dates_in_order"
    if fault == "currency":
        return {**found, "currency": None}, "currency_given"
    if fault == "dropped" and len(found["line_items"]) > 1:
        del found["line_items"][line]
        return found, "lines_add_up" if taxed else "total_without_tax"
    return None


def test_thirty_planted_faults_are_found() -> None:
    rules, plan = load_shipped("invoice")
    rng, seen = random.Random(7), 0
    for seed in range(200):
        if seen == 30:
            break
        if spoilt := spoil(documents.draw_sample(documents.HELD_OUT + seed, "invoice").truth, rng):
            seen += 1
            assert spoilt[1] in find_blamed(rules, plan, spoilt[0]), spoilt
    assert seen == 30


ORDER = {
    "order_date": "2024-05-01",
    "delivery_date": "2024-05-20",
    "currency": "EUR",
    "subtotal": 30,
    "shipping": None,
    "tax_amount": 5.7,
    "total": 35.7,
    "buyer": {"tax_id": "DE136695976"},
    "supplier": {"tax_id": "20-2725494"},
    "line_items": [{"quantity": 2.5, "unit_price": 12.0001, "amount": 30, "delivery_date": "2024-05-02"}],
}
FORM = {"fields": [{"label": "a", "value": None, "handwritten": None}], "signatures": [{"signed": False, "date": None}]}
TABLE = {"tables": [{"columns": ["a", "b"], "rows": [["1", None], ["2", "3"]]}, {"columns": [], "rows": [["1"]]}]}
FAULTS: list[tuple[str, Any, str]] = [
    ("purchase_order", {"line_items": [{**ORDER["line_items"][0], "amount": 31}]}, "line_amounts"),  # type: ignore[index]
    ("purchase_order", {"subtotal": 31}, "lines_add_up"),
    ("purchase_order", {"shipping": 9}, "total_adds_up"),
    ("purchase_order", {"delivery_date": "2024-04-30"}, "dates_in_order"),
    ("purchase_order", {"order_date": "2024-05-03"}, "line_dates_in_order"),
    ("purchase_order", {"buyer": {"tax_id": "DE136695977"}}, "buyer_vat_number"),
    ("purchase_order", {"supplier": {"tax_id": "ATU1234567"}}, "supplier_vat_number"),
    ("form", {"fields": [{"label": "a", "value": None, "handwritten": True}]}, "handwriting_has_text"),
    ("form", {"signatures": [{"signed": False, "date": "2024-05-31"}]}, "signed_where_dated"),
    ("table", {"tables": [{"columns": ["a", "b"], "rows": [["1", "2"], ["3"]]}]}, "rows_fit_columns"),
]
RIGHT: dict[str, Any] = {"purchase_order": ORDER, "form": FORM, "table": TABLE}


@pytest.mark.parametrize(("name", "changed", "rule"), FAULTS)
def test_a_fault_of_another_schema_is_found(name: str, changed: Any, rule: str) -> None:
    rules, plan = load_shipped(name)
    assert find_blamed(rules, plan, RIGHT[name]) == set()
    assert rule in find_blamed(rules, plan, RIGHT[name] | changed)


def test_a_rule_about_items_tells_the_item_that_breaks_it() -> None:
    plan = ArrowPlan(load_schema(ROOT / "schemas" / "invoice.json"))
    rules = RuleSet(list_schema_rules(load_schema(ROOT / "schemas" / "invoice.json")), plan.root)
    item = {"description": "Tea", "quantity": 2, "unit_price": 3, "amount": 6}
    row, _ = plan.build_row(parse({"line_items": [item, {**item, "amount": 7}], "subtotal": 13, "tax_amount": 1, "total": 15}))
    results = rules.judge_record(row)
    verdicts = {(one.rule, one.item): one for one in rules.list_verdicts(results, row)}
    assert {key: one.holds for key, one in verdicts.items() if key[0] in ("line_amounts", "lines_add_up", "total_adds_up")} == {
        ("line_amounts", "$.line_items[0]."): True,
        ("line_amounts", "$.line_items[1]."): False,
        ("lines_add_up", ""): True,
        ("total_adds_up", ""): False,
    }
    broken = verdicts["line_amounts", "$.line_items[1]."]
    assert broken.concerns("$.line_items[1].amount", "line_items.amount")
    assert not broken.concerns("$.line_items[0].amount", "line_items.amount")
    assert not RuleVerdict("r", ("total",), True).concerns("$.total_tax", "total_tax")
    assert rules.judge_record(row) == results
