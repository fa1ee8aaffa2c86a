"""Command `init`: a folder to begin with."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.console import print_json, print_message
from pipeline.cli.exit_codes import convert_to_exit_code
from pipeline.cli.options import JSON, load_job
from pipeline.cli.progress import show_waiting
from pipeline.wording import format_count

if TYPE_CHECKING:
    from pipeline.job.model_section import ModelSection
    from pipeline.stages.draft import DraftResult


TABLES = (".csv", ".tsv", ".txt", ".xlsx", ".xlsm")


@click.command("init")
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--from",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="CSV file or Excel workbook (extra export) whose header names the values, with example rows for their types. Or, once for each, a "
    "few documents, of which a model drafts the schema: with --endpoint or --job.",
)
@click.option("--model", metavar="NAME", help="Pydantic model whose schema is written: mypackage.models:Invoice, found from here.")
@click.option(
    "--endpoint", metavar="URL", help="Chat Completions server whose model drafts the schema. The documents' pages are sent there."
)
@click.option("--job", "job_file", type=click.Path(path_type=Path), metavar="JOB", help="Job whose section model drafts the schema.")
@click.option("--sample", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write this package's samples into.")
@JSON
@convert_to_exit_code
def init_command(
    folder: Path | None,
    files: tuple[Path, ...],
    model: str | None,
    endpoint: str | None,
    job_file: Path | None,
    sample: Path | None,
    as_json: bool,
) -> None:
    """Write a job and a schema of one's own into a folder to edit, or with --sample this package's samples to run. Overwrites nothing.

    Without --from and --model the schema is a template with one field of each kind.
    """
    if bool(folder) == bool(sample) or (sample and (files or model or endpoint or job_file)):
        raise click.UsageError("init takes either DIR, for a job of one's own, or --sample DIR; the other options go with DIR.")
    if files and model:
        raise click.UsageError("--from and --model exclude each other.")
    check_draft_options(files, endpoint, job_file)
    drafted: DraftResult | None = None
    if sample:
        from pipeline.demo.sample_folder import FIRST_JOB, write_sample_folder

        written, target, command = write_sample_folder(sample), sample, f"pipeline run {shlex.quote(str(sample / FIRST_JOB))}"
    else:
        from pipeline.job.starter import JOB_NAME, check_unwritten, write_starter

        target = Path(str(folder))
        if endpoint or job_file:
            check_unwritten(target)
            drafted, section = make_draft(files, endpoint, job_file, quiet=as_json)
            written = write_starter(target, draft=drafted.schema, engine=section)
        else:
            written = write_starter(target, files[0] if files else None, model)
        command = f"pipeline check {shlex.quote(str(target / JOB_NAME))}"
    about = {"draft": {"documents": drafted.documents, "fields": drafted.fields, "left_out": drafted.failures}} if drafted else {}
    if as_json:
        print_json({"folder": str(target), "files": written, "next": command, **about})
        return
    if drafted:
        for name, reason in drafted.failures.items():
            print_message(f"left out: {name}: {reason}")
        print_message(
            f"{written[-1]} is a DRAFT: {format_count(drafted.fields, 'field')}, as a model saw them "
            f"in {drafted.documents} of {format_count(len(files), 'document')}."
        )
        print_message("Read it: remove what you do not need, correct types and descriptions. Nothing in it is verified.")
    print_message(f"{format_count(len(written), 'file')} written to {target}; next: {command}")


def check_draft_options(files: tuple[Path, ...], endpoint: str | None, job_file: Path | None) -> None:
    """Raise click.UsageError for files and a model that do not go together."""
    if endpoint and job_file:
        raise click.UsageError("--endpoint and --job exclude each other: both name the model that drafts the schema.")
    tables = [file for file in files if file.suffix.lower() in TABLES]
    if (endpoint or job_file) and (tables or not files):
        found = f"{tables[0]} is a table" if tables else "there is none"
        raise click.UsageError(f"--endpoint and --job go with --from DOCUMENT, of which a model drafts the schema; {found}.")
    if not (endpoint or job_file) and files and (len(files) > 1 or not tables):
        raise click.UsageError(
            "--from takes one table (.csv, .tsv, .txt, .xlsx); for documents, name the model that drafts the schema: --endpoint or --job."
        )


def make_draft(files: tuple[Path, ...], endpoint: str | None, job_file: Path | None, quiet: bool) -> tuple[DraftResult, ModelSection]:
    """Return a draft of the schema of these documents, and the section `model` for the job that is written."""
    from pipeline.stages.draft import draft_schema, make_endpoint_job

    job = make_endpoint_job(endpoint) if endpoint else load_job(Path(str(job_file)), ())
    with show_waiting(f"asking a model for the fields of {format_count(len(files), 'document')}", quiet=quiet):
        drafted = draft_schema(job, files)
    section = job.sections.model
    names = {key: getattr(section, key) for key in ("name", "lora") if getattr(section, key)}
    own = {key: str(job.resolve_local_path(name)) for key, name in names.items() if job.is_local_path(name)}
    return drafted, section if section.engine == "openai" else section.model_copy(update=own)
