"""Command `init`: a folder to begin with."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from pipeline.cli.console import print_json, print_message
from pipeline.cli.exit_codes import convert_to_exit_code
from pipeline.cli.options import JSON


@click.command("init")
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--from",
    "table",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="CSV file or Excel workbook (extra export) whose header names the values, with example rows for their types.",
)
@click.option("--model", metavar="NAME", help="Pydantic model whose schema is written: mypackage.models:Invoice, found from here.")
@click.option("--sample", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write this package's samples into.")
@JSON
@convert_to_exit_code
def init_command(folder: Path | None, table: Path | None, model: str | None, sample: Path | None, as_json: bool) -> None:
    """Write a job and a schema of one's own into a folder to edit, or with --sample this package's samples to run. Overwrites nothing.

    Without --from and --model the schema is a template with one field of each kind.
    """
    if bool(folder) == bool(sample) or (sample and (table or model)):
        raise click.UsageError("init takes either DIR, for a job of one's own, or --sample DIR; --from and --model go with DIR.")
    if table and model:
        raise click.UsageError("--from and --model exclude each other.")
    if sample:
        from pipeline.demo.sample_folder import FIRST_JOB, write_sample_folder

        written, target, command = write_sample_folder(sample), sample, f"pipeline run {shlex.quote(str(sample / FIRST_JOB))}"
    else:
        from pipeline.job.starter import JOB_NAME, write_starter

        target = Path(str(folder))
        written, command = write_starter(target, table, model), f"pipeline check {shlex.quote(str(target / JOB_NAME))}"
    if as_json:
        print_json({"folder": str(target), "files": written, "next": command})
        return
    print_message(f"{len(written)} files written to {target}; next: {command}")
