"""A folder to work in: a small job, its schema and its documents, and an engine that says what a test tells it to."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.demo import documents, drawing
from pipeline.job import Job
from pipeline.records import Completion, FinishReason, Request, Usage

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
"""So narrow that whatever a model writes under its grammar is short and valid: these tests judge no model's reading."""
VALID = '{"currency":"EUR","total":19.99,"lines":[]}'
INVALID = '{"currency":"EUR","total":-1,"lines":[]}'
JOB = """\
name: slips
source: {paths: [in]}
extract: {schema: schema.json}
model: {name: demo}
sampling: {max_tokens: 64}
output: {path: out}
"""


class Desk:
    """A job's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.inputs = folder, folder / "job.yaml", folder / "in"
        self.inputs.mkdir(parents=True)
        self.file.write_text(JOB)
        (folder / "schema.json").write_text(json.dumps(SCHEMA))

    def put(self, name: str, data: bytes | None = None) -> Path:
        """Place a document; one page of its own, unless told what."""
        file = self.inputs / name
        file.write_bytes(slip(sum(name.encode())) if data is None else data)
        return file

    def job(self, *settings: str) -> Job:
        return Job.load(self.file, settings)


@cache
def slip(*seeds: int) -> bytes:
    """Return a PDF of one small page per seed: 448x448 px, 256 visual tokens."""
    return drawing.pdf([documents.sample(documents.HELD_OUT + seed, "receipt").sheets[0] for seed in seeds])


def completion(text: str = VALID, finish_reason: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(text, finish_reason, Usage(300, 20))


CUT = completion(finish_reason=FinishReason.LENGTH)
"""Cut by max_tokens, although what came is valid as it stands."""
Say = Completion | Exception | Callable[[Request], Completion]


class Scripted:
    """An engine that says what it is told, in that order, the last of it for ever, and remembers what it was asked.

    What a real model answers is beside the point of these tests, and which of its answers are wrong could not be arranged.
    """

    name, model = "scripted", "script-1"

    def __init__(self, *says: Say) -> None:
        self.says: list[Say] = list(says) or [completion()]
        self.asked: list[Request] = []

    async def complete(self, request: Request) -> Completion:
        self.asked.append(request)
        say = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        if isinstance(say, Exception):
            raise say
        return say if isinstance(say, Completion) else say(request)

    def close(self) -> None:
        """Nothing to release."""


class Ink(Scripted):
    """Reads how dark the first page is: a page's answer is its own, and no model has to be loaded, which takes seconds each time."""

    async def complete(self, request: Request) -> Completion:
        pixels = request.messages[1].parts[0]
        assert not isinstance(pixels, str)
        return completion(f'{{"currency":"EUR","total":{int((pixels < 128).sum()) / 100},"lines":[]}}')


def texts(request: Request) -> list[str]:
    """Return the texts of a conversation, its page images left out."""
    return [part for message in request.messages for part in message.parts if isinstance(part, str)]


def listed(file: Path, root: Path) -> dict[str, Any]:
    """Return a file as a listing's row."""
    found = file.stat()
    return {"source": str(file.relative_to(root)), "size_bytes": found.st_size, "version": str(found.st_mtime_ns)}
