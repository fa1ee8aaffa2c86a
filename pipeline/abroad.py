"""A job -> the same job for other machines: what is sent to them, and what they must have. Knows no cluster.

What is sent is the job with all its keys, its schema and this package, a few MiB. No document, no model and no password goes
along: what the job names must be there, too, so a place on this machine is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pipeline import engines, folders, parcel
from pipeline.errors import JobError
from pipeline.job import Job
from pipeline.place import has_secret, scheme_of, shown

JOB_FILE, SCHEMA_FILE = "job.yaml", "schema.json"


def stage(job: Job, folder: Path) -> str:
    """Place what a run of the job needs in an empty folder, and return the name of the job's file there. Raises JobError."""
    text = json.dumps(portable(job), indent=2, ensure_ascii=False)  # which is YAML, too
    parcel.pack(folder)
    (folder / JOB_FILE).write_text(text, encoding="utf-8")
    schema = job.file.parent / job.sections.extract.schema_file.expanduser()
    (folder / SCHEMA_FILE).write_bytes(schema.read_bytes())
    return JOB_FILE


def portable(job: Job) -> dict[str, Any]:
    """Return the job's keys as they are read elsewhere: the places it names absolute, its schema beside it, no cluster named.

    Raises JobError for a place on this machine, unless the job says that the cluster shares its file system.
    """
    keys = job.resolved()
    keys["extract"]["schema"] = SCHEMA_FILE
    keys["ray"]["address"] = None
    keys["source"]["paths"] = [everywhere(job, "source.paths", path) for path in job.sections.source.paths]
    keys["output"]["path"] = everywhere(job, "output.path", str(job.output))
    for name in ("name", "lora"):
        named = getattr(job.sections.model, name)
        if named and not job.uses_demo and job.sections.model.engine != "openai" and engines.is_place(job, named):
            keys["model"][name] = everywhere(job, f"model.{name}", named)
    return keys


def everywhere(job: Job, key: str, path: str) -> str:
    """Return a path that means the same on every machine: a URL as it is, another one absolute. Raises JobError."""
    if scheme_of(path) not in ("", "file"):
        if has_secret(path):
            raise JobError(f"{job.file}: {key} is {shown(path)!r}, which holds a password: the cluster's own environment has to have that")
        return path
    if not job.sections.ray.shared_filesystem:
        raise JobError(
            f"{job.file}: {key} is {path!r}, a place on this machine that the cluster does not see: name an object store (s3://, gs://, "
            "az://) or an http(s) URL, or say --shared-filesystem if the cluster's machines have it at the same path"
        )
    return folders.absolute(os.path.expanduser(path), os.path.realpath(job.file.parent))


def secrets(job: Job) -> list[str]:
    """Return the environment variables that the job names: the cluster must have them, they are not sent."""
    return [name for name in (job.sections.source.password_env, job.sections.model.api_key_env) if name]
