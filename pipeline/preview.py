"""One page of one file -> what the model sees of it and what it answers, without Ray and without an output folder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import engines, prompt, source
from pipeline.errors import DocumentError, JobError
from pipeline.job import Job
from pipeline.place import is_url
from pipeline.records import Document, Page
from pipeline.render import png
from pipeline.sandbox import Sandbox
from pipeline.stages import AskStage, access, described, render_settings


@dataclass(frozen=True, eq=False)
class Seen:
    """A page, as the model sees it."""

    page: Page
    facts: dict[str, Any]
    ask: str
    """The line after the page image."""


def look(job: Job, file: Path | str, page_no: int) -> Seen:
    """Render one page of a file as the job would.

    Raises JobError when there is no such file or page, DocumentError when it cannot be rendered.
    """
    data = bytes_of(job, file)
    with Sandbox(render_settings(job)) as sandbox:
        page_count = sandbox.open(data)
        if page_no > page_count:
            raise JobError(f"{file} has {page_count} pages, there is no page {page_no}")
        page = next(iter(sandbox.pages(page_no, page_no)))
    facts = {**described(page), "file": str(file), "page_count": page_count, "words": len(page.words)}
    return Seen(page, facts, str(prompt.build(job.system, [page.pixels])[-1].parts[-1]))


def bytes_of(job: Job, file: Path | str) -> bytes:
    """Return the bytes of a file, or of what a URL leads to. Raises JobError, DocumentError."""
    if is_url(str(file)):
        found = source.find([str(file)], job.file.parent).to_pylist()
        if len(found) > 1:
            raise JobError(f"{file} are {len(found)} files, the first is {found[0]['source']}: name one")
        return source.read(Document(**found[0]), job.file.parent, render_settings(job).max_file_bytes, access(job))
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise JobError(f"cannot read {file}: {error.strerror}") from None


def write_png(seen: Seen, file: Path) -> None:
    try:
        file.write_bytes(png(seen.page.pixels))
    except OSError as error:
        raise JobError(f"cannot write {file}: {error.strerror}") from None


def answer(job: Job, seen: Seen, on_demo: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Return what the model answers about this page alone, as the ledger would keep it.

    Raises DocumentError when there is no answer.
    """
    chosen = engines.locate(engines.choose(job, engines.gpu_count()))
    if chosen.uses_demo and not job.uses_demo and on_demo:
        on_demo(job.sections.model.name)
    engines.check(chosen)
    engine = engines.load(chosen)
    try:
        asked = {
            "key": "preview",
            "first_page": 1,
            "last_page": 1,
            "page_count": 1,
            "pages": [seen.facts],
            "pixels": [seen.page.pixels.tobytes()],
        }
        row = asyncio.run(AskStage(chosen, engine).answer(asked))
    finally:
        engine.close()
    if "answer" not in row:
        raise DocumentError(row["failure"]["kind"], row["failure"]["message"])
    names = ("status", "failure", "answer", "finish_reason", "errors", "prompt_tokens", "completion_tokens", "model", "engine", "elapsed_s")
    return {name: row[name] for name in names}
