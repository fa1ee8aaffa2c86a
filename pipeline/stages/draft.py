"""Schema assistant: a few documents and a model in, a draft of their schema out, without Ray and without an output folder."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import engines, schema
from pipeline.errors import DocumentError, JobError
from pipeline.job import Job
from pipeline.job.sections import JobSections
from pipeline.records import LedgerRow, Pixels, Status
from pipeline.render.sandbox import Sandbox
from pipeline.schema.draft import FIELDS_SCHEMA, INSTRUCTIONS, SchemaDraft
from pipeline.stages.ask import AskStage
from pipeline.stages.render import RenderPlan

MAX_DOCUMENTS = 20
"""A few documents show what their kind has; each costs a request."""
ANSWER_TOKENS = 6000
"""Of a list of 80 fields."""
OPTION = "--from"


@dataclass(frozen=True)
class DraftResult:
    """A draft and what it was made from."""

    schema: schema.Schema
    fields: int
    documents: int
    failures: dict[str, str]
    """Why documents are not in it, by their names."""


def make_endpoint_job(endpoint: str) -> Job:
    """Return a job whose model is that of a Chat Completions server. Raises JobError."""
    data = {
        "name": "draft",
        "source": {"paths": ["."]},
        "extract": {"schema": "schema.json"},
        "model": {"engine": "openai", "base_url": endpoint},
        "output": {"path": "out"},
    }
    try:
        sections = JobSections.model_validate(data)
    except ValueError:
        raise JobError(
            f"--endpoint is {endpoint!r}, which is no http(s) address such as http://127.0.0.1:8000/v1", key="--endpoint"
        ) from None
    return Job(Path("draft.yaml").absolute(), sections, FIELDS_SCHEMA, Path("out").absolute())


def draft_schema(job: Job, files: Sequence[Path]) -> DraftResult:
    """Return a draft of the schema of these documents, of each of which the first `pages.per_request` pages are shown to the job's model.

    A document that cannot be read, or about which there is no usable answer, is left out. Raises JobError where none is left, where there
    are too many, and where the model cannot be used; RunError.
    """
    if len(files) > MAX_DOCUMENTS:
        raise JobError(
            f"{OPTION} names {len(files)} documents; at most {MAX_DOCUMENTS} are shown to the model: a few say it all", key=OPTION
        )
    asking = make_asking_job(job)
    gpus = 0 if asking.sections.model.engine == "openai" else engines.count_gpus()
    resolved = engines.resolve_engine(asking, gpus)
    if resolved.uses_demo:
        raise JobError(f"{job.file}: the demonstration model cannot draft a schema; name a server: --endpoint URL", job.file, "--job")
    engines.check_engine(resolved)
    failures: dict[str, str] = {}
    drawn = draw_first_pages(resolved, files, failures)
    draft, answers = SchemaDraft(), dict[str, LedgerRow]()
    if drawn:
        with closing(engines.load_engine(resolved, on_gpu=gpus > 0)) as engine:
            answers = asyncio.run(ask_each_document(AskStage(resolved, engine), drawn))
    for name, row in answers.items():
        if row["status"] == Status.EXTRACTED:
            draft.add_answer(schema.parse_json(row["answer"] or ""))
        else:
            failures[name] = row["failure"]["message"] if row["failure"] else "no answer"
    if not draft.documents:
        name, reason = next(iter(failures.items()))
        raise JobError(f"there is no answer to make a draft of; {name}: {reason}", name, OPTION)
    try:
        return DraftResult(draft.build_schema(), draft.count_fields(), draft.documents, failures)
    except ValueError as error:
        raise JobError(f"there is nothing to make a draft of: {error}", key=OPTION) from None


def make_asking_job(job: Job) -> Job:
    """Return the job that asks for fields: a job's model, pages and limits, and a schema of its own."""
    extract = job.sections.extract.model_copy(update={"instructions": INSTRUCTIONS, "rules": (), "absent": "allow", "per": "document"})
    sampling = job.sections.sampling.model_copy(update={"max_tokens": max(ANSWER_TOKENS, job.sections.sampling.max_tokens)})
    return Job(job.file, job.sections.model_copy(update={"extract": extract, "sampling": sampling}), FIELDS_SCHEMA, job.output)


def draw_first_pages(job: Job, files: Sequence[Path], failures: dict[str, str]) -> dict[str, list[Pixels]]:
    """Return the first pages of each document, and put into `failures` those that have none."""
    drawn: dict[str, list[Pixels]] = {}
    with closing(Sandbox(RenderPlan.of_job(job).read_settings())) as sandbox:
        for file in dict.fromkeys(map(str, files)):
            try:
                count = sandbox.open(Path(file).read_bytes())
                drawn[file] = [page.pixels for page in sandbox.draw_pages(1, min(count, job.pages_per_request))]
            except OSError as error:
                failures[file] = f"cannot be read: {error.strerror}"
            except DocumentError as error:
                failures[file] = error.message
    return drawn


async def ask_each_document(stage: AskStage, drawn: dict[str, list[Pixels]]) -> dict[str, Any]:
    """Return the answer about each document."""
    rows = await asyncio.gather(*(stage.ask_pages(name, pages, [], len(pages)) for name, pages in drawn.items()))
    return dict(zip(drawn, rows, strict=True))
