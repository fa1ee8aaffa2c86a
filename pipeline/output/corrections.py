"""Corrections: values that a person has put right, kept beside the ledger and applied whenever records are settled.

    corrections.jsonl   {"_source": "a.pdf", "_page": null, "_doc_id": "9f…", "_corrected": ["$.total"], "total": 19.99, …}

`_corrected` has the paths of the values that were put right. Of each, the column that it is in is taken from the correction, all others
from the ledger. A correction is of one content: where `_doc_id` is given, it does not apply to a document whose bytes have changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import JobError
from pipeline.output import Output
from pipeline.schema import dump_json, parse_json
from pipeline.schema.arrow import ArrowPlan

NAME = "corrections.jsonl"
FIRST_STEP = re.compile(r"\$(?:\.(\w+)|\[(\"(?:[^\"\\]|\\.)*\")\])")
CorrectionKey = tuple[str, int | None]
"""Source and page; the page is None where records are documents."""


@dataclass(frozen=True)
class Correction:
    """What a person has put right in one record."""

    source: str
    page: int | None
    doc_id: str | None
    paths: tuple[str, ...]
    values: Mapping[str, Any]
    """By column, for those that the paths are in."""

    @property
    def key(self) -> CorrectionKey:
        return self.source, self.page

    def correct_value(self, value: Any) -> dict[str, Any]:
        """Return a record's value with the corrected columns; `value` is null or an object."""
        return {**(value if isinstance(value, dict) else {}), **self.values}

    def to_json(self) -> str:
        about = {"_source": self.source, "_page": self.page, "_doc_id": self.doc_id, "_corrected": list(self.paths)}
        return dump_json({**about, **self.values})


Corrections = Mapping[CorrectionKey, Correction]


def read_corrections(output: Output) -> Corrections:
    """Return an output's corrections. Raises JobError for a file that no command has written."""
    try:
        text = output.root.read(NAME).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise JobError(f"cannot read {output.root / NAME}: {error}", str(output.root / NAME)) from None
    return {found.key: found for found in parse_corrections(text, str(output.root / NAME), None)}


def add_corrections(output: Output, file: Path, plan: ArrowPlan, sources: Iterable[str]) -> list[Correction]:
    """Add a file's corrections to an output's, in place of earlier ones of the same record, and return them.

    Raises JobError, before anything is written, for a line that is none, that names another document, or that does not fit the schema.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise JobError(f"cannot read {file}: {error}", file, "--corrections") from None
    known, added = {*sources}, []
    for found in parse_corrections(text, str(file), plan):
        if found.source not in known:
            raise JobError(f"{file} is about {found.source}, which {output.root} does not have", file, "--corrections")
        added.append(found)
    if added:
        every = {**read_corrections(output), **{found.key: found for found in added}}
        output.root.put(NAME, "".join(f"{found.to_json()}\n" for found in every.values()).encode())
    return added


def parse_corrections(text: str, place: str, plan: ArrowPlan | None) -> Iterator[Correction]:
    """Yield the corrections in JSON lines, without those of records that were found right as they are. Raises JobError.

    With a plan the values must fit its columns.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = make_correction(parse_json(line), plan)
        except ValueError as error:
            raise JobError(f"{place}, line {number}: {error}", place, "--corrections") from None
        if found.paths:
            yield found


def make_correction(given: Any, plan: ArrowPlan | None) -> Correction:
    """Return the correction in a line. Raises ValueError."""
    if not isinstance(given, dict) or not isinstance(given.get("_source"), str):
        raise ValueError("a correction is a JSON object with `_source`, the document that it is about")
    paths = given.get("_corrected")
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError('`_corrected` must be the list of the paths that were corrected, as in ["$.total"]')
    names = [find_column_name(path) for path in paths]
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"`_corrected` names {missing[0]}, of which the line has no value")
    values = {name: given[name] for name in dict.fromkeys(names)}
    if plan:
        misfits = plan.build_row(values)[1]
        if misfits:
            raise ValueError("; ".join(misfits[:3]))
    page, doc_id = given.get("_page"), given.get("_doc_id")
    if not isinstance(page, int | None) or not isinstance(doc_id, str | None):
        raise ValueError("`_page` must be a number or null, `_doc_id` a text or null")
    return Correction(given["_source"], page, doc_id, tuple(paths), values)


def find_column_name(path: str) -> str:
    """Return the column that a path begins with: `line_items` of `$.line_items[2].amount`. Raises ValueError."""
    found = FIRST_STEP.match(path)
    if not found:
        raise ValueError(f"`_corrected` has {path!r}, which is no path such as $.total or $.line_items[2].amount")
    return found[1] or str(json.loads(found[2]))


def compute_corrections_digest(corrections: Corrections) -> str:
    """Return 16 hex digits that change whenever a correction does."""
    lines = sorted(found.to_json() for found in corrections.values())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
