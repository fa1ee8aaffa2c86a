"""Schema from example rows: the header and some rows of a table in, a draft for a person to edit out.

    Invoice No.  Date        Total       ->  {"invoice_no": {"title": "Invoice No.", "type": ["string", "null"]},
    A-0012       31.05.2024  1.234,50         "date": {…, "format": "date"}, "total": {"type": ["number", "null"], "multipleOf": 0.01}}

Every value may be null, and all are required: a document that lacks one says so. Examples stand under `x-examples`, which no prompt has: a
model must not copy them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from pipeline.schema import LATEST_DRAFT, Schema

DATES = (r"\d{4}-\d\d?-\d\d?", r"\d\d?\.\d\d?\.\d{4}", r"\d\d?/\d\d?/\d{4}", r"\d{4}/\d\d?/\d\d?", r"\d\d? [A-Za-z]{3,9}\.? \d{4}")
DAY = re.compile("|".join(DATES))
WHOLE = re.compile(r"[+-]?(0|[1-9]\d{0,14})")
NUMBER = re.compile(r"[+-]?(\d{1,3}([., '\u00a0\u202f]\d{3})*|\d+)([.,](?P<fraction>\d{1,6}))?")
CURRENCY = re.compile(r"^[A-Z]{3}\s|\s?[A-Z]{3}$|[€$£¥]")
TRUTH = {"true", "false", "yes", "no", "ja", "nein", "oui", "non", "si", "sí"}
MIN_ROWS, MAX_CHOICES, MAX_CHOICE_LENGTH = 20, 6, 30
"""A column becomes a choice if at least so many rows have at most so many different values: what is not among them could not be read."""
EXAMPLES_KEPT = 3
EXAMPLES = "x-examples"


def infer_schema(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Schema:
    """Return a schema with a property for each column of a table."""
    properties: Schema = {}
    for index, name in enumerate(header):
        if str(name).strip():
            values = [row[index] for row in rows if index < len(row) and row[index] not in (None, "")]
            properties[make_property_name(str(name), properties)] = infer_property(str(name).strip(), values)
    return make_root(title, properties)


def make_root(title: str, properties: Schema) -> Schema:
    """Return the schema of an object with these properties, all required."""
    about = {"$schema": f"https://{LATEST_DRAFT}", "title": title, "type": "object", "additionalProperties": False}
    return {**about, "required": list(properties), "properties": properties}


def make_property_name(title: str, taken: Mapping[str, Any]) -> str:
    """Return a name in small letters and underscores for a column's title that no other column has."""
    plain = unicodedata.normalize("NFKD", title.replace("ß", "ss")).encode("ascii", "ignore").decode()
    name = re.sub(r"[^a-z0-9]+", "_", plain.lower()).strip("_") or re.sub(r"\s+", "_", title.strip()).lstrip("_") or "column"
    name = f"column_{name}" if name[0].isdigit() else name
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    return unique


def infer_property(title: str, values: Sequence[Any]) -> Schema:
    """Return the schema of a column's values."""
    found: Schema = {"title": title, **infer_type(values)}
    examples = list(dict.fromkeys(format_example(value) for value in values))[:EXAMPLES_KEPT]
    return found | ({EXAMPLES: examples} if examples and "enum" not in found else {})


def infer_type(values: Sequence[Any]) -> Schema:
    """Return the keywords that say what type these values have; text where they differ or there are none."""
    texts = [str(value).strip() for value in values]
    if not values:
        return {"type": ["string", "null"]}
    if all(isinstance(value, date) for value in values) or all(DAY.fullmatch(text) for text in texts):
        return {"type": ["string", "null"], "format": "date"}
    if all(isinstance(value, bool) for value in values) or {text.lower() for text in texts} <= TRUTH:
        return {"type": ["boolean", "null"]}
    if all(WHOLE.fullmatch(text) for text in texts):
        return {"type": ["integer", "null"]}
    found = [NUMBER.fullmatch(CURRENCY.sub("", text).strip()) for text in texts]
    if all(found) and not any(re.match(r"[+-]?0\d", text) for text in texts):
        decimals = max(len(match["fraction"] or "") for match in found if match)
        return {"type": ["number", "null"], **({"multipleOf": Decimal(1).scaleb(-decimals)} if decimals else {})}
    choices = list(dict.fromkeys(texts))
    if len(values) >= MIN_ROWS and len(choices) <= MAX_CHOICES and all(len(text) <= MAX_CHOICE_LENGTH for text in choices):
        return {"enum": [*choices, None]}
    return {"type": ["string", "null"]}


def format_example(value: Any) -> str:
    if isinstance(value, datetime):
        value = value.date()
    return value.isoformat() if isinstance(value, date) else str(value).strip()
