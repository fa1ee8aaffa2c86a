"""Starter: a job and a schema of one's own to begin with, written into a folder for a person to edit.

nothing             -> a template with one field of each kind
orders.csv, .xlsx   -> a field for each column, its type from the rows
mypackage:Order     -> the schema of a pydantic model
a draft             -> a schema that a model made of a few documents, and the model section of the job that asked it
"""

from __future__ import annotations

import csv
import io
import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import JobError
from pipeline.job.model_section import ModelSection, Section
from pipeline.job.pydantic_model import load_model_schema
from pipeline.schema import Schema, check_schema, dump_json, parse_json
from pipeline.schema.infer import infer_schema, make_root

JOB_NAME, SCHEMA_NAME, DOCUMENTS = "job.yaml", "schema.json", "documents"
MAX_ROWS = 200
"""Example rows that are looked at."""
LINE_LENGTH = 140
OPEN = ("properties", "$defs", "x-rules")
"""Keywords whose value has a line for each of its members."""
JOB_TEXT = """\
# {title} -> one typed row each.
#
#     pipeline check job.yaml                        what this file means, spelled out; starts nothing
#     pipeline preview job.yaml {documents}/FILE       one page as the model sees it, and what it answers
#     pipeline run job.yaml                          reads everything; run it again and nothing is asked twice
#
# Relative paths start at this file. Keys that are commented out show their defaults; `docs/job.md` has all of them.

name: {name}

source:
  # Files, folders (with all below them), globs, or lists of files (.txt, .csv, .jsonl, .parquet with a column `path`).
  paths: [{documents}]

extract:
  # Titles and descriptions in the schema are the prompt: say there what a colleague would have to be told.
  schema: {schema}
  per: document                      # one row per document; `page` gives one per page
  # instructions: What the schema's descriptions do not say.
  # rules:                           # what must hold in a record (docs/job.md, Rules); results are in the column `_rules`
  #   - {{name: total_adds_up, expression: "near(net + tax, total, 0.02)", message: Net and tax do not add up to the total.}}

# pages:
#   max_pixels: 1003520              # 1,280 tokens: an A4 page at about 100 dpi; double it if small print is misread
#   per_request: 4                   # a document of more pages becomes several requests, whose answers are merged

model:
{model}
output:
  path: out                          # out/records is what you read: pipeline.read("out") or pd.read_parquet("out/records")
"""
MODEL_TEXT = """\
  name: Qwen/Qwen2.5-VL-7B-Instruct-AWQ   # hub id or folder
  # Without a GPU the demonstration model answers, which reads the samples alone; `cpu` takes minutes per page.
  without_gpu: demo
"""
TEMPLATE: Schema = {
    "document_number": {
        "title": "Document number",
        "description": "As printed, with prefixes and leading zeros.",
        "type": ["string", "null"],
    },
    "date": {"title": "Date", "description": "The day the document was issued.", "type": ["string", "null"], "format": "date"},
    "kind": {"title": "Kind", "description": "What the document calls itself.", "enum": ["offer", "order", "other", None]},
    "is_signed": {"title": "Signed", "description": "Whether there is a signature.", "type": ["boolean", "null"]},
    "total": {"title": "Total", "description": "The sum to pay, tax included.", "type": ["number", "null"], "multipleOf": 0.01},
    "items": {
        "title": "Items",
        "description": "Every position, in printed order.",
        "type": "array",
        "items": {
            "type": "object",
            "additionalProperties": False,
            "required": ["description", "amount"],
            "properties": {
                "description": {"title": "Description", "type": ["string", "null"]},
                "amount": {"title": "Amount", "type": ["number", "null"], "multipleOf": 0.01},
            },
        },
    },
}
"""One property of each kind."""
TEMPLATE_COMMENT = (
    "A template: rename, remove and add properties. Each becomes a column: text, a date (format), one of several values (enum; what is not "
    "among them is null), yes or no (boolean), an amount (multipleOf 0.01 makes it exact), a list. null lets the model say that a page "
    "does not show it."
)
DRAFT_COMMENT = "A draft, its types from the rows of {}: check them, and write a description wherever a title does not say it all."


def write_starter(
    folder: Path, table: Path | None = None, model: str | None = None, draft: Schema | None = None, engine: ModelSection | None = None
) -> list[str]:
    """Write a job, its schema and an empty folder for the documents, and return the files' paths. Overwrites nothing. Raises JobError.

    `engine` is the section `model` of the job that is written; without it that is the template's.
    """
    check_unwritten(folder)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.absolute().name).strip("-.") or "documents"
    schema = draft or make_starter_schema(name, table, model)
    check_schema(parse_json(dump_json(schema)))
    title = str(schema.get("title") or name)
    text = format_section(engine) if engine else MODEL_TEXT
    job = JOB_TEXT.format(title=title, name=name, documents=DOCUMENTS, schema=SCHEMA_NAME, model=text)
    files = {folder / JOB_NAME: job, folder / SCHEMA_NAME: format_schema(schema) + "\n"}
    try:
        (folder / DOCUMENTS).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            with file.open("x", encoding="utf-8") as stream:
                stream.write(text)
    except OSError as error:
        raise JobError(f"cannot write {error.filename or folder}: {error.strerror}", error.filename or folder, "DIR") from None
    return [str(file) for file in files]


def check_unwritten(folder: Path) -> None:
    """Raise JobError where a folder has one of the files that a starter writes."""
    for file in (folder / JOB_NAME, folder / SCHEMA_NAME):
        if file.exists():
            raise JobError(f"{file} exists already and is not overwritten: name another folder", file, "DIR")


def format_section(section: Section) -> str:
    """Return the keys of a section that are not defaults as YAML, indented."""
    text = yaml.safe_dump(section.model_dump(mode="json", exclude_defaults=True), allow_unicode=True, sort_keys=False)
    return textwrap.indent(text, "  ")


def make_starter_schema(name: str, table: Path | None, model: str | None) -> Schema:
    """Return the schema of a starter. Raises JobError."""
    if model:
        return load_model_schema(model, Path.cwd())
    if not table:
        return {"$comment": TEMPLATE_COMMENT, **make_root(name, TEMPLATE)}
    header, rows = read_table(table)
    if not any(str(title).strip() for title in header):
        raise JobError(f"{table} has no header: its first line must name the columns", table, "--from")
    return {"$comment": DRAFT_COMMENT.format(table.name), **infer_schema(table.stem.replace("_", " ").capitalize(), header, rows)}


def read_table(file: Path) -> tuple[list[str], list[list[Any]]]:
    """Return the header and the first rows of a CSV file or of a workbook's first sheet. Raises JobError."""
    try:
        rows = read_workbook(file) if file.suffix.lower() in (".xlsx", ".xlsm") else read_delimited(file)
    except OSError as error:
        raise JobError(f"cannot read {file}: {error.strerror or error}", file, "--from") from None
    if not rows:
        raise JobError(f"{file} is empty: its first line must name the columns", file, "--from")
    return ["" if cell is None else str(cell) for cell in rows[0]], rows[1:]


def read_delimited(file: Path) -> list[list[Any]]:
    """Return the first rows of a text file with commas, semicolons, tabs or bars between its cells. Raises JobError."""
    if file.suffix.lower() not in (".csv", ".tsv", ".txt"):
        raise JobError(f"{file} ends in {file.suffix or 'nothing'}; allowed are .csv, .tsv, .txt and .xlsx", file, "--from")
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")  # what Excel writes
    first = text.partition("\n")[0]
    delimiter = max(",;\t|", key=first.count)
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        return [row for row, _ in zip(rows, range(MAX_ROWS + 1), strict=False)]
    except csv.Error as error:
        raise JobError(f"{file} is not CSV: {error}", file, "--from") from None


def read_workbook(file: Path) -> list[list[Any]]:
    """Return the first rows of a workbook's first sheet. Raises JobError."""
    from openpyxl import load_workbook

    try:
        book = load_workbook(file, read_only=True, data_only=True)
    except OSError:
        raise
    except Exception as error:  # any: zipfile, xml and openpyxl itself have several classes for what is no workbook
        raise JobError(f"{file} is not a workbook: {' '.join(str(error).split())[:200]}", file, "--from") from None
    rows = [list(row) for row in book.worksheets[0].iter_rows(max_row=MAX_ROWS + 1, values_only=True)]
    book.close()
    return [row for row in rows if any(cell is not None for cell in row)]


def format_schema(value: Any, indent: int = 0, room: int = 0, is_open: bool = True) -> str:
    """Return JSON for a person to edit: what fits a line is one, properties stand below each other."""
    line = json_line(value)
    fits = indent + room + len(line) <= LINE_LENGTH and '"properties"' not in line
    if not isinstance(value, dict | list) or (fits and not is_open):
        return line
    inner = " " * (indent + 2)
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + format_schema(item, indent + 2, is_open=False) for item in value) + "\n" + " " * indent + "]"
    names = {key: json.dumps(key, ensure_ascii=False) + ": " for key in value}
    parts = [inner + names[key] + format_schema(value[key], indent + 2, len(names[key]), key in OPEN) for key in value]
    return "{\n" + ",\n".join(parts) + "\n" + " " * indent + "}"


def json_line(value: Any) -> str:
    """Return JSON on one line with spaces after commas and colons."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {json_line(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(json_line(item) for item in value) + "]"
    return dump_json(value)
