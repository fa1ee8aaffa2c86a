"""Options and arguments that several commands have, and the job that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pipeline.job import Job


JOB = click.argument("job_file", metavar="JOB", type=click.Path(path_type=Path))
SET = click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key of the job, e.g. --set pages.dpi=150.")
OUTPUT = click.option("--output", metavar="DIR", help="Folder of the results instead of the job's.")
LIMIT = click.option("--limit", type=click.IntRange(min=1), help="Take only the first so many documents of the listing.")
RETRY = click.option("--retry", metavar="failed[:KIND]", help="Ask once more what failed, all or one kind of it (failed:timeout).")
SHARED = click.option("--shared-filesystem", is_flag=True, help="The cluster's machines have the job's local paths at the same place.")
CLUSTER = click.option("--address", metavar="ADDRESS", help="Ray cluster to join instead of the job's: auto or HOST:6379.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print data, or the error, as JSON on stdout, nothing else.")
NUMBER_TOLERANCE = click.option(
    "--number-tolerance",
    metavar="N",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Numbers up to N apart are the same as the true ones.",
)
DATE_TOLERANCE = click.option(
    "--date-tolerance-days",
    metavar="N",
    type=click.IntRange(min=0),
    default=0,
    help="Dates up to N days apart are the same as the true ones.",
)


def load_job(
    job_file: Path, settings: tuple[str, ...], output: str | None = None, address: str | None = None, shared_filesystem: bool = False
) -> Job:
    from pipeline.job import Job

    chosen = [f"ray.address={json.dumps(address)}"] * bool(address) + ["ray.shared_filesystem=true"] * shared_filesystem
    return Job.load(job_file, (*settings, *chosen), output)
