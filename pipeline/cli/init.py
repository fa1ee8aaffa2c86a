"""Command `init`: a folder to begin with."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from pipeline.cli.console import print_json, print_message
from pipeline.cli.exit_codes import convert_to_exit_code
from pipeline.cli.options import JSON


@click.command("init")
@click.option(
    "--sample", type=click.Path(path_type=Path), metavar="DIR", required=True, help="Folder to write this package's samples into."
)
@JSON
@convert_to_exit_code
def init_command(sample: Path, as_json: bool) -> None:
    """Write sample jobs, their schemas and documents into a folder, to run and to copy from. Overwrites nothing."""
    from pipeline.demo.sample_folder import FIRST_JOB, write_sample_folder

    written = write_sample_folder(sample)
    command = f"pipeline run {shlex.quote(str(sample / FIRST_JOB))}"
    if as_json:
        print_json({"folder": str(sample), "files": written, "next": command})
        return
    print_message(f"{len(written)} files written to {sample}; next: {command}")
