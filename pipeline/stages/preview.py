"""One page of one file -> what the model sees of it and what it answers, without Ray and without an output folder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import engines, sources
from pipeline.errors import DocumentError, JobError
from pipeline.job import Job
from pipeline.records import Document, Page
from pipeline.render.images import encode_page_png
from pipeline.render.sandbox import Sandbox
from pipeline.schema import prompt
from pipeline.stages.ask import AskStage
from pipeline.stages.render import describe_page, make_download_policy, make_render_settings
from pipeline.storage.location import is_url


@dataclass(frozen=True, eq=False)
class PreviewPage:
    """A page, as the model sees it."""

    page: Page
    facts: dict[str, Any]
    ask: str
    """The line after the page image."""


def render_preview(job: Job, file: Path | str, page_no: int) -> PreviewPage:
    """Render one page of a file as the job would.

    Raises JobError when there is no such file or page, DocumentError when it cannot be rendered.
    """
    data = read_preview_bytes(job, file)
    with Sandbox(make_render_settings(job)) as sandbox:
        page_count = sandbox.open(data)
        if page_no > page_count:
            raise JobError(f"{file} has {page_count} pages, there is no page {page_no}")
        page = next(iter(sandbox.draw_pages(page_no, page_no)))
    facts = {**describe_page(page), "file": str(file), "page_count": page_count, "words": len(page.words)}
    return PreviewPage(page, facts, str(prompt.build_messages(job.system_message, [page.pixels])[-1].parts[-1]))


def read_preview_bytes(job: Job, file: Path | str) -> bytes:
    """Return the bytes of a file, or of what a URL leads to. Raises JobError, DocumentError."""
    if is_url(str(file)):
        found = sources.find_documents([str(file)], job.file.parent).to_pylist()
        if len(found) > 1:
            raise JobError(f"{file} are {len(found)} files, the first is {found[0]['source']}: name one")
        return sources.read_document(
            Document(**found[0]), job.file.parent, make_render_settings(job).max_file_bytes, make_download_policy(job)
        )
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise JobError(f"cannot read {file}: {error.strerror}") from None


def write_preview_png(seen: PreviewPage, file: Path) -> None:
    try:
        file.write_bytes(encode_page_png(seen.page.pixels))
    except OSError as error:
        raise JobError(f"cannot write {file}: {error.strerror}") from None


def ask_preview(job: Job, seen: PreviewPage, on_demo: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Return what the model answers about this page alone, as the ledger would keep it.

    Raises DocumentError when there is no answer.
    """
    chosen = engines.locate_model(engines.choose_model(job, engines.count_gpus()))
    if chosen.uses_demo and not job.uses_demo and on_demo:
        on_demo(job.sections.model.name)
    engines.check_engine(chosen)
    engine = engines.load_engine(chosen)
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
