"""The patterns of docs/schemas.md: each is a schema with a prompt, a grammar and columns, and its record satisfies it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.schema import check_schema, parse_json
from pipeline.schema.arrow import ArrowPlan
from pipeline.schema.grammar import check_grammar
from pipeline.schema.merge import Part, merge_parts
from pipeline.schema.prompt import build_system_message
from pipeline.schema.request_schema import build_request_schema
from pipeline.schema.rule_functions import FUNCTIONS
from pipeline.schema.validate import Validator

PAGE = (Path(__file__).parents[3] / "docs/schemas.md").read_text()
PATTERNS = [part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE) if part[0].isdigit()]
TYPES = {
    "signed_on": pa.date32(),
    "total": pa.decimal128(18, 2),
    "balance": pa.decimal128(18, 2),
    "kind": pa.dictionary(pa.int32(), pa.string()),
    "is_renewed": pa.bool_(),
}
"""What the page says of columns."""


def read_pattern(part: str) -> tuple[dict[str, Any], Any]:
    """Return the schema of a pattern, and its record."""
    properties, *definitions, record = re.findall(r"^```json\n(.*?)^```", part, re.MULTILINE | re.DOTALL)
    found = json.loads(f"{{{properties}}}")
    schema = {"title": "Documents", "type": "object", "additionalProperties": False, "required": [*found], "properties": found}
    return schema | ({"$defs": json.loads(f"{{{definitions[0]}}}")} if definitions else {}), parse_json(record)


def test_there_are_ten() -> None:
    assert [part.partition(".")[0] for part in PATTERNS] == [str(number) for number in range(1, 11)]


@pytest.mark.parametrize("part", PATTERNS, ids=lambda part: part.partition("\n")[0])
def test_its_record_satisfies_it_and_fits_the_columns(part: str) -> None:
    given, record = read_pattern(part)
    schema = check_schema(parse_json(json.dumps(given)))
    assert [*Validator(schema).find_violations(record)] == []
    plan = ArrowPlan(schema)
    columns, misfits = plan.build_row(record)
    assert (misfits, list(plan.notes)) == ([], [])
    table = pa.Table.from_pylist([columns], plan.schema)
    assert [name for name in table.column_names if TYPES.get(name, table[name].type) != table[name].type] == []
    assert table.num_columns == len(given["properties"])


@pytest.mark.parametrize("part", PATTERNS, ids=lambda part: part.partition("\n")[0])
def test_its_prompt_has_all_descriptions_and_its_grammar_all_keywords(part: str) -> None:
    given, _ = read_pattern(part)
    schema = check_schema(parse_json(json.dumps(given)))
    prompt = build_system_message(schema)
    assert [text for text in find_texts(given) if text not in prompt] == []
    assert check_grammar(build_request_schema(schema, absent=True)) == ()


def find_texts(part: Any) -> list[str]:
    """Return the descriptions anywhere in a schema."""
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    own = [part["description"].removesuffix(".")] if isinstance(part, dict) and isinstance(part.get("description"), str) else []
    return own + [text for value in inner for text in find_texts(value)]


def test_the_parts_of_a_long_document_are_merged_as_the_page_says() -> None:
    given, _ = read_pattern(PATTERNS[8])
    schema = check_schema(parse_json(json.dumps(given)))
    parts = [{"title": "A", "balance": 1, "remarks": "x"}, {"title": "B", "balance": 2, "remarks": "y"}]
    merged = merge_parts(schema, [Part(page, page, value, {}) for page, value in enumerate(parts, 1)])
    assert merged.value == {"title": "A", "balance": 2, "remarks": "x\ny"}
    assert not merged.disagreements


def test_the_rule_that_is_named_is_a_function() -> None:
    assert "`iban(iban)`" in PAGE
    assert FUNCTIONS["iban"]("DE89370400440532013000")
