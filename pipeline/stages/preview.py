"""Preview: one page of one file as the model sees it, and what the model answers, without Ray and without an output folder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from pipeline import engines, sources
from pipeline.errors import DocumentError, JobError
from pipeline.job import DEMO_MARK, Job
from pipeline.records import Document, FailureRow, Page, PageFacts
from pipeline.render.images import encode_page_png
from pipeline.render.sandbox import Sandbox
from pipeline.schema import prompt
from pipeline.stages.ask import AskStage
from pipeline.stages.render import DEMO_REFUSAL, RenderPlan, describe_page
from pipeline.storage.location import hide_query, is_url
from pipeline.wording import format_count


class PreviewFacts(PageFacts):
    """What is known of a page before it is asked about."""

    file: str
    page_count: int
    words: int
    """Words of its text layer."""


@dataclass(frozen=True, eq=False)
class PreviewPage:
    """A page, as the model sees it."""

    page: Page
    facts: PreviewFacts
    ask: str
    """The line after the page image."""
    is_sample: bool
    """Whether the file carries the mark of the documents that the demonstration model reads."""


def render_preview(job: Job, file: Path | str, page_no: int) -> PreviewPage:
    """Render one page of a file as the job would.

    Raises JobError when there is no such file or page, DocumentError when it cannot be rendered.
    """
    plan, name = RenderPlan.of_job(job), hide_query(str(file))
    data = read_preview_bytes(plan, file)
    with Sandbox(replace(plan.read_settings(), text_layer=True)) as sandbox:
        page_count = sandbox.open(data)
        if page_no > page_count:
            raise JobError(f"{name} has {format_count(page_count, 'page')}, there is no page {page_no}", name, "--page")
        page = next(iter(sandbox.draw_pages(page_no, page_no)))
    facts: PreviewFacts = {**describe_page(page), "file": name, "page_count": page_count, "words": len(page.words)}
    ask = str(prompt.build_messages(job.system_message, [page.pixels])[-1].parts[-1])
    return PreviewPage(page, facts, ask, DEMO_MARK in data)


def read_preview_bytes(plan: RenderPlan, file: Path | str) -> bytes:
    """Return the bytes of a file, or of what a URL leads to. Raises JobError, DocumentError."""
    if is_url(str(file)):
        found = sources.find_documents([str(file)], plan.root).to_pylist()
        if len(found) > 1:
            raise JobError(f"{file} names {len(found)} files, the first is {found[0]['source']}: name one of them")
        return sources.read_document(Document(**found[0]), plan.root, plan.settings.max_file_bytes, plan.policy)
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise JobError(f"cannot read {file}: {error.strerror}", file) from None


def write_preview_png(preview: PreviewPage, file: Path) -> None:
    """Write the page image that the model sees. Raises JobError."""
    try:
        file.write_bytes(encode_page_png(preview.page.pixels))
    except OSError as error:
        raise JobError(f"cannot write {file}: {error.strerror}", file, "--png") from None


class PreviewAnswer(TypedDict):
    """What the model answers about one page, as the ledger would keep it."""

    status: str
    failure: FailureRow | None
    answer: str | None
    finish_reason: str | None
    errors: list[str] | None
    prompt_tokens: int | None
    completion_tokens: int | None
    model: str
    engine: str
    elapsed_s: float | None


def ask_preview(job: Job, preview: PreviewPage, on_demo: Callable[[str], None] | None = None) -> PreviewAnswer:
    """Return what the model answers about this page alone. Raises DocumentError when there is no answer, JobError, RunError."""
    resolved = engines.resolve_engine(job, engines.count_gpus())
    if resolved.uses_demo and not job.uses_demo:
        if on_demo:
            on_demo(job.sections.model.name)
        if not preview.is_sample:
            raise DocumentError("demo", DEMO_REFUSAL)
        if resolved.budget.cell_px != job.budget.cell_px:
            raise DocumentError("demo", "the page is drawn for another model than the demonstration one: add --set model.name=demo")
    engines.check_engine(resolved)
    engine = engines.load_engine(resolved)
    try:
        row = asyncio.run(AskStage(resolved, engine).ask_pages("preview", [preview.page.pixels], [], 1))
    finally:
        engine.close()
    if "answer" not in row and (failure := row["failure"]):
        raise DocumentError(failure["kind"], failure["message"])
    return {
        "status": row["status"],
        "failure": row["failure"],
        "answer": row["answer"],
        "finish_reason": row["finish_reason"],
        "errors": row["errors"],
        "prompt_tokens": row["prompt_tokens"],
        "completion_tokens": row["completion_tokens"],
        "model": engine.model,
        "engine": engine.name,
        "elapsed_s": row["elapsed_s"],
    }
