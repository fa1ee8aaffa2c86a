"""Folder of a small job: its YAML file, its schema and its documents."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.demo import documents, drawing
from pipeline.job import Job

SCHEMA = {
    "title": "Slip",
    "type": "object",
    "additionalProperties": False,
    "required": ["currency", "total", "lines"],
    "properties": {
        "currency": {"enum": ["EUR", "USD", None]},
        "total": {"type": ["number", "null"], "multipleOf": 0.01, "minimum": 0, "maximum": 99_999},
        "lines": {
            "type": "array",
            "maxItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["amount"],
                "properties": {"amount": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 999}},
            },
        },
    },
}
"""So narrow that every answer under its grammar is short and valid: what a model reads does not matter to these tests."""
PASSWORD = "open sesame"
"""Of encrypted documents, in the variable SLIP_PASSWORD of Ray's workers."""
JOB = """\
name: slips
source: {paths: [in]}
extract: {schema: schema.json}
model: {name: demo}
sampling: {max_tokens: 64}
output: {path: out}
"""


class Workspace:
    """A job's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.inputs = folder, folder / "job.yaml", folder / "in"
        self.inputs.mkdir(parents=True)
        self.file.write_text(JOB)
        (folder / "schema.json").write_text(json.dumps(SCHEMA))

    def put(self, name: str, data: bytes | None = None) -> Path:
        """Write a document, by default of one page that depends on its name, and return its path."""
        file = self.inputs / name
        file.write_bytes(draw_slip(sum(name.encode())) if data is None else data)
        return file

    def job(self, *settings: str) -> Job:
        return Job.load(self.file, settings)


@cache
def draw_slip(*seeds: int) -> bytes:
    """Return a PDF of one small page per seed: 448x448 px, 256 visual tokens."""
    return drawing.draw_pdf([documents.draw_sample(documents.HELD_OUT + seed, "receipt").sheets[0] for seed in seeds])


def make_listing_row(file: Path, root: Path) -> dict[str, Any]:
    """Return a file as a listing's row."""
    found = file.stat()
    return {"source": str(file.relative_to(root)), "size_bytes": found.st_size, "version": str(found.st_mtime_ns)}
