"""Job bundle: a job as it is sent to a cluster's job server. A job comes in; a folder with `job.yaml`, `schema.json` and, where the job
has one, `calibration.json` goes out.

This package is sent beside it by Ray (`py_modules`). No document, no model and no password is sent: what the job names must be reachable
from the cluster, so a path on this machine is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from pipeline.errors import JobError
from pipeline.job import Job
from pipeline.schema import dump_json
from pipeline.sources.local import make_absolute
from pipeline.storage.location import has_secret, parse_scheme, redact_url

JOB_FILE, SCHEMA_FILE, CALIBRATION_FILE = "job.yaml", "schema.json", "calibration.json"


def write_bundle(job: Job, folder: Path) -> str:
    """Write what a run of the job needs into an empty folder, and return the name of the job file there. Raises JobError."""
    text = json.dumps(make_portable(job), indent=2, ensure_ascii=False)  # which is YAML, too
    (folder / JOB_FILE).write_text(text, encoding="utf-8")
    (folder / SCHEMA_FILE).write_text(dump_json(job.schema), encoding="utf-8")
    if job.sections.extract.calibration:
        shutil.copyfile(job.resolve_local_path(job.sections.extract.calibration), folder / CALIBRATION_FILE)
    return JOB_FILE


def make_portable(job: Job) -> dict[str, Any]:
    """Return the job's keys for another machine: paths absolute, the schema beside the job file, no cluster address.

    Raises JobError for a path on this machine, unless the job says that the cluster shares its file system.
    """
    keys = job.dump_keys()
    keys["extract"]["schema"] = SCHEMA_FILE
    keys["extract"]["calibration"] = CALIBRATION_FILE if job.sections.extract.calibration else None
    keys["ray"]["address"] = None
    keys["source"]["paths"] = [make_portable_path(job, "source.paths", path) for path in job.sections.source.paths]
    keys["output"]["path"] = make_portable_path(job, "output.path", str(job.output))
    for name in ("name", "lora"):
        named = getattr(job.sections.model, name)
        if named and not job.uses_demo and job.sections.model.engine != "openai" and job.is_local_path(named):
            keys["model"][name] = make_portable_path(job, f"model.{name}", named)
    return keys


def make_portable_path(job: Job, key: str, path: str) -> str:
    """Return a path that means the same on every machine: a URL as it is, any other one absolute. Raises JobError."""
    if parse_scheme(path) not in ("", "file"):
        if has_secret(path):
            raise JobError(
                f"{job.file}: {key} is {redact_url(path)!r}, which holds a password: the cluster's own environment has to have that",
                job.file,
                key,
            )
        return path
    if not job.sections.ray.shared_filesystem:
        raise JobError(
            f"{job.file}: {key} is {path!r}, a path on this machine that the cluster does not see: name an object store (s3://, gs://, "
            "az://) or an http(s) URL, or say --shared-filesystem if the cluster's machines have it at the same path",
            job.file,
            key,
        )
    return make_absolute(os.path.expanduser(path), os.path.realpath(job.file.parent))


def list_secret_variables(job: Job) -> list[str]:
    """Return the environment variables that the job names: the cluster's environment must have them, they are not sent."""
    return [name for name in (job.sections.source.password_env, job.sections.model.api_key_env) if name]
