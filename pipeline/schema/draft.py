"""Draft of a schema: the fields that a model has seen in a few documents in, one schema for a person to prune out.

    a.pdf  {"fields": [{"name": "Invoice No.", "title": "Invoice number", "kind": "text", "table": null, "example": "A-7", …}, …]}
    b.pdf  {"fields": [{"name": "invoice_no", …}, {"name": "amount", "kind": "amount", "table": "items", …}]}
      ->  {"invoice_no": {"title": "Invoice number", "$comment": "Seen in 2 of 2 documents.", …}, "items": {"type": "array", …}}

What a model writes is a suggestion: names become columns' names, types that differ become one that holds both, and no text of it is taken
for an instruction or a control token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from pipeline.schema import Schema, check_schema, dump_json, parse_json
from pipeline.schema.infer import EXAMPLES, EXAMPLES_KEPT, make_property_name, make_root
from pipeline.schema.prompt import CONTROL_TOKEN
from pipeline.wording import format_count, truncate_text

KINDS: dict[str, Schema] = {
    "text": {"type": ["string", "null"]},
    "date": {"type": ["string", "null"], "format": "date"},
    "amount": {"type": ["number", "null"], "multipleOf": Decimal("0.01")},
    "integer": {"type": ["integer", "null"]},
    "number": {"type": ["number", "null"]},
    "yes_no": {"type": ["boolean", "null"]},
}
"""The kinds of values that a model may choose from."""
NUMBERS = ("integer", "amount", "number")
"""Kinds of which a later one holds the values of those before it."""
MAX_FIELDS, MAX_NAME, MAX_TITLE, MAX_TEXT = 80, 40, 80, 240
FIELDS_SCHEMA: Schema = {
    "title": "Fields",
    "description": "The fields that documents of this kind have, in the order in which they are printed.",
    "type": "object",
    "additionalProperties": False,
    "required": ["document_kind", "fields"],
    "properties": {
        "document_kind": {
            "title": "Document kind",
            "description": "What such a document is called, in the singular.",
            "type": ["string", "null"],
            "maxLength": MAX_TITLE,
        },
        "fields": {
            "title": "Fields",
            "description": "Each piece of information that documents of this kind state, once.",
            "type": "array",
            "maxItems": MAX_FIELDS,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name", "title", "kind", "description", "example", "table"],
                "properties": {
                    "name": {
                        "description": "In English, small letters and underscores.",
                        "type": "string",
                        "minLength": 1,
                        "maxLength": MAX_NAME,
                    },
                    "title": {"description": "What people call it.", "type": "string", "maxLength": MAX_TITLE},
                    "kind": {"description": "amount for money, yes_no for a box that is ticked.", "enum": list(KINDS)},
                    "description": {
                        "description": "How to tell it from other values of the page.",
                        "type": ["string", "null"],
                        "maxLength": MAX_TEXT,
                    },
                    "example": {"description": "Its value here, as printed.", "type": ["string", "null"], "maxLength": MAX_TITLE},
                    "table": {
                        "description": "Where it is a column of a table or list: that list's name. null for what is stated once.",
                        "type": ["string", "null"],
                        "maxLength": MAX_NAME,
                    },
                },
            },
        },
    },
}
"""What a model answers about one document."""
INSTRUCTIONS = (
    "Do not extract the values for their own sake: describe which fields documents of this kind have, so that a table can have a column "
    "for each. Leave out printed advice, slogans and legal text. Each column of a table is one field, not one for each row."
)
DRAFT_NOTE = (
    "A draft, from what a model saw in {}: remove what you do not need, correct the types, and write descriptions as you would tell a "
    "colleague. Each property becomes a column."
)


@dataclass
class DraftField:
    """A field as several documents have it."""

    title: str
    kind: str
    description: str
    examples: list[str] = field(default_factory=list)
    documents: set[int] = field(default_factory=set)

    def add(self, found: DraftField) -> None:
        """Take what another document says of this field."""
        self.kind = widen_kind(self.kind, found.kind)
        self.description = self.description or found.description
        self.examples = list(dict.fromkeys([*self.examples, *found.examples]))[:EXAMPLES_KEPT]
        self.documents |= found.documents


class SchemaDraft:
    """Collects the fields of documents."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, DraftField]] = {"": {}}
        """The fields of each table by their names; those that are stated once under ""."""
        self.kinds: list[str] = []
        self.documents = 0

    def add_answer(self, answer: Any) -> None:
        """Take what a model says of one document, an instance of `FIELDS_SCHEMA`."""
        number, self.documents = self.documents, self.documents + 1
        if kind := clean_line(answer["document_kind"], MAX_TITLE):
            self.kinds.append(kind)
        titles: dict[str, dict[str, str]] = {}
        for given in answer["fields"]:
            table = clean_line(given["table"], MAX_NAME)
            table = make_property_name(table, {}) if table else ""
            name = clean_line(given["name"], MAX_NAME) or clean_line(given["title"], MAX_TITLE)
            if not any(letter.isalnum() for letter in name):
                continue
            title = clean_line(given["title"], MAX_TITLE) or name.replace("_", " ").capitalize()
            taken = titles.setdefault(table, {})
            # the title's where two fields of one document have the same name
            names = (make_property_name(name, {}), make_property_name(title, {}))
            name = next((one for one in names if taken.get(one, title) == title), None) or make_property_name(name, taken)
            taken[name] = title
            example = clean_line(given["example"], MAX_TITLE)
            found = DraftField(title, given["kind"], clean_line(given["description"], MAX_TEXT), [example] if example else [], {number})
            known = self.tables.setdefault(table, {})
            if name in known:
                known[name].add(found)
            else:
                known[name] = found

    def count_fields(self) -> int:
        """Return how many fields there are, those of tables included."""
        return sum(map(len, self.tables.values()))

    def build_schema(self) -> Schema:
        """Return the draft. Raises ValueError where the documents have no field."""
        properties = {name: self.build_property(found) for name, found in self.tables[""].items()}
        for table, fields in self.tables.items():
            if table:
                inner = {name: self.build_property(found) for name, found in fields.items()}
                items = {"type": "object", "additionalProperties": False, "required": list(inner), "properties": inner}
                about = {"title": table.replace("_", " ").capitalize(), "description": "Every row, in printed order."}
                properties[make_property_name(table, properties)] = {**about, "type": "array", "items": items}
        if not properties:
            raise ValueError("the model names no field of these documents")
        title = max(self.kinds, key=self.kinds.count, default="Document")
        note = DRAFT_NOTE.format(format_count(self.documents, "document"))
        return check_schema(parse_json(dump_json({"$comment": note, **make_root(title, properties)})))

    def build_property(self, found: DraftField) -> Schema:
        """Return the schema of a field."""
        seen = f"Seen in {len(found.documents)} of {format_count(self.documents, 'document')}."
        about = {"title": found.title, **({"description": found.description} if found.description else {}), "$comment": seen}
        return {**about, **KINDS[found.kind], **({EXAMPLES: found.examples} if found.examples else {})}


def widen_kind(one: str, other: str) -> str:
    """Return the kind that holds the values of both."""
    if one == other:
        return one
    return max(one, other, key=NUMBERS.index) if {one, other} <= {*NUMBERS} else "text"


def clean_line(text: Any, length: int) -> str:
    """Return a model's text as one line that a prompt may hold; "" for null."""
    printable = "".join(letter if letter.isprintable() else " " for letter in CONTROL_TOKEN.sub(" ", str(text or "")))
    return truncate_text(" ".join(printable.split()), length)
