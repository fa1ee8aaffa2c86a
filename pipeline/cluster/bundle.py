"""A job -> the same job for other machines: what is sent to them, and what they must have. Knows no cluster.

What is sent is the job with all its keys, its schema and this package, a few MiB. No document, no model and no password goes
along: what the job names must be there, too, so a place on this machine is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pipeline
from pipeline.cluster import bundle
from pipeline.errors import JobError
from pipeline.job import Job
from pipeline.sources import local
from pipeline.storage.location import has_secret, parse_scheme, redact_url

JOB_FILE, SCHEMA_FILE = "job.yaml", "schema.json"


def write_bundle(job: Job, folder: Path) -> str:
    """Place what a run of the job needs in an empty folder, and return the name of the job's file there. Raises JobError."""
    text = json.dumps(make_portable(job), indent=2, ensure_ascii=False)  # which is YAML, too
    bundle.copy_package(folder)
    (folder / JOB_FILE).write_text(text, encoding="utf-8")
    schema = job.file.parent / job.sections.extract.schema_file.expanduser()
    (folder / SCHEMA_FILE).write_bytes(schema.read_bytes())
    return JOB_FILE


def make_portable(job: Job) -> dict[str, Any]:
    """Return the job's keys as they are read elsewhere: the places it names absolute, its schema beside it, no cluster named.

    Raises JobError for a place on this machine, unless the job says that the cluster shares its file system.
    """
    keys = job.dump_keys()
    keys["extract"]["schema"] = SCHEMA_FILE
    keys["ray"]["address"] = None
    keys["source"]["paths"] = [check_portable_path(job, "source.paths", path) for path in job.sections.source.paths]
    keys["output"]["path"] = check_portable_path(job, "output.path", str(job.output))
    for name in ("name", "lora"):
        named = getattr(job.sections.model, name)
        if named and not job.uses_demo and job.sections.model.engine != "openai" and job.is_local_path(named):
            keys["model"][name] = check_portable_path(job, f"model.{name}", named)
    return keys


def check_portable_path(job: Job, key: str, path: str) -> str:
    """Return a path that means the same on every machine: a URL as it is, another one absolute. Raises JobError."""
    if parse_scheme(path) not in ("", "file"):
        if has_secret(path):
            raise JobError(
                f"{job.file}: {key} is {redact_url(path)!r}, which holds a password: the cluster's own environment has to have that"
            )
        return path
    if not job.sections.ray.shared_filesystem:
        raise JobError(
            f"{job.file}: {key} is {path!r}, a place on this machine that the cluster does not see: name an object store (s3://, gs://, "
            "az://) or an http(s) URL, or say --shared-filesystem if the cluster's machines have it at the same path"
        )
    return local.make_absolute(os.path.expanduser(path), os.path.realpath(job.file.parent))


def list_secret_variables(job: Job) -> list[str]:
    """Return the environment variables that the job names: the cluster must have them, they are not sent."""
    return [name for name in (job.sections.source.password_env, job.sections.model.api_key_env) if name]


PACKAGE = Path(pipeline.__file__).parent
MOST_BYTES = 64 * 2**20
"""The package has 7 MiB, nearly all of them the demonstration model. Ray's own limit is 500 MiB, kept in its head's memory."""


def copy_package(folder: Path, package: Path = PACKAGE) -> Path:
    """Copy the package into a folder and return where it stands there. Raises JobError when it is too large to be itself alone."""
    files = list_package_files(package)
    sizes = {file: file.stat().st_size for file in files}
    if sum(sizes.values()) > MOST_BYTES:
        largest = max(files, key=lambda file: sizes[file])
        raise JobError(
            f"the package in {package} has {sum(sizes.values())} bytes, and {MOST_BYTES} are sent to a cluster at most; the largest file "
            f"is {largest}: what does not belong to the package does not belong there"
        )
    copy = folder / package.name
    for file in files:
        place = copy / file.relative_to(package)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    return copy


def list_package_files(package: Path) -> list[Path]:
    """Return the files of a package; what Python compiled and what is hidden are none, nor what a link leads to."""
    found = (file for file in package.rglob("*") if file.is_file() and not file.is_symlink())
    return sorted(f for f in found if not any(p.startswith(".") or p == "__pycache__" for p in f.relative_to(package).parts))
