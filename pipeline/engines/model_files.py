"""Small files of a job's model: its config.json and its image processor's, before any weights are fetched or read.

In: a job. Out: JSON objects from the checkpoint's folder, from an object store, or from the hub or its cache. Imports no torch.
"""

from __future__ import annotations

import json
import socket
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from pipeline.budget import A4_PT, count_visual_tokens, fit_page
from pipeline.engines import checkpoint_files, model_cache
from pipeline.errors import JobError
from pipeline.evidence.boxes import FAMILIES, BoxUnits, guess_box_units
from pipeline.job import Job
from pipeline.storage import object_store
from pipeline.storage.location import is_store_url

DEMO_CHECKPOINT = Path(__file__).parents[1] / "demo" / "checkpoint"
"""The folder of the demonstration model in this package."""
HUB_REACHED_S = 5.0
LARGEST_FILE_BYTES = 4 * 2**20
"""Configurations have a few kB."""


def find_model_folder(job: Job) -> Path:
    """Return where the job's model lies, if it is a folder: relative to the job file, or in this package."""
    return DEMO_CHECKPOINT if job.uses_demo else job.resolve_local_path(job.sections.model.name)


def read_model_file(job: Job, name: str, fetch: bool) -> dict[str, Any] | None:
    """Return the object in one JSON file of the job's checkpoint; None where there is no such file, or none at hand.

    `fetch` allows asking the hub or the object store. Raises JobError for a file that is no JSON object.
    """
    model = job.sections.model
    if is_store_url(model.name):
        copy = model.revision and model_cache.find_copy_folder(model.name, model.revision)
        if not copy or not copy.is_dir():
            return read_store_file(f"{model.name.rstrip('/')}/{name}") if fetch else None
        return read_folder_file(copy / name)
    if job.uses_demo or job.is_local_path(model.name):
        return read_folder_file(find_model_folder(job) / name)
    from huggingface_hub import hf_hub_download

    fetch = fetch and is_hub_reachable()
    try:
        return read_folder_file(Path(hf_hub_download(model.name, name, revision=model.revision, local_files_only=not fetch)))
    except (OSError, ValueError):  # not in the cache, not in the repository, or no hub: what is needed is missed by `resolve_engine`
        return None


@lru_cache(maxsize=1)
def is_hub_reachable() -> bool:
    """Say whether something listens at the hub's address, or a proxy stands before it: the hub's client would try for a minute."""
    from huggingface_hub import constants

    place = urlsplit(constants.ENDPOINT)
    if getproxies().get(place.scheme):
        return True
    try:
        socket.create_connection((str(place.hostname), place.port or (443 if place.scheme == "https" else 80)), HUB_REACHED_S).close()
    except OSError:
        return False
    return True


def read_folder_file(file: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None where there is none."""
    return checkpoint_files.read_json_file(file) if file.is_file() else None


def read_store_file(url: str) -> dict[str, Any] | None:
    """Return the object in a JSON file of an object store; None where there is none. Raises JobError."""
    try:
        found = object_store.find_object(url)
        data = object_store.fetch_object(url, min(found.size_bytes, LARGEST_FILE_BYTES))[0] if found else b""
    except OSError as error:
        raise JobError(f"{url} cannot be read: {object_store.format_os_error(error)}", key="model.name") from None
    try:
        return json.loads(data) if data else None
    except ValueError as error:
        raise JobError(f"{url} is not JSON: {error}", key="model.name") from None


def read_cell_px(job: Job, fetch: bool = True) -> int | None:
    """Return the side in pixels of a visual token of the job's checkpoint: its image processor's patch times its merge of patches.

    None for a server, and where the checkpoint is not at hand. transformers reads the same two files in the same order; where only
    config.json is at hand, its vision tower says the same. Raises JobError.
    """
    if job.sections.model.engine == "openai":
        return None
    nested = (read_model_file(job, "processor_config.json", fetch) or {}).get("image_processor")
    block = nested if isinstance(nested, dict) else read_model_file(job, "preprocessor_config.json", fetch)
    merge = "merge_size"
    if block is None:
        block, merge = (read_model_file(job, "config.json", fetch) or {}).get("vision_config"), "spatial_merge_size"
    if not isinstance(block, dict):
        return None
    found = block.get("patch_size", 14), block.get(merge, 2)
    if not all(isinstance(number, int) and 0 < number <= 64 for number in found):
        raise JobError(
            f"{job.file}: the image processor of {job.sections.model.name} says patch_size {found[0]!r} and merge_size {found[1]!r}; "
            "allowed are whole numbers from 1 to 64",
            job.file,
            "model.name",
        )
    return int(found[0] * found[1])


def resolve_cell_px(job: Job, fetch: bool = True) -> Job:
    """Return the job with the size of a visual token of its checkpoint; a server, and a checkpoint that is not at hand, keep the job's.

    Raises JobError for a job that says another size, and where no page fits the budget in cells of this size.
    """
    found, given = read_cell_px(job, fetch), job.sections.model.cell_px
    if found and given and found != given:
        raise JobError(
            f"{job.file}: model.cell_px is {given}, but a visual token of {job.sections.model.name} is {found}x{found} px: leave it out",
            job.file,
            "model.cell_px",
        )
    resolved = job.with_model(cell_px=found or given)
    _ = resolved.budget  # raises where no page fits
    return resolved


def find_box_units(job: Job) -> tuple[BoxUnits, str]:
    """Return in what the job's model counts the places that it names, and how that is known: `job`, `checkpoint` or `name`.

    Asks neither hub nor store. Raises JobError for a config.json that is no JSON object.
    """
    model = job.sections.model
    if model.box_units != "auto":
        return BoxUnits(model.box_units), "job"
    config = None if model.engine == "openai" else read_model_file(job, "config.json", fetch=False)
    family = str((config or {}).get("model_type"))
    return (FAMILIES[family], "checkpoint") if family in FAMILIES else (guess_box_units(model.name), "name")


def describe_a4_page(job: Job) -> dict[str, Any]:
    """Return what an A4 page costs the job's model: its size in pixels, resolution and visual tokens, and where their size is from.

    Asks neither hub nor store. Raises JobError as `resolve_cell_px` does.
    """
    found = resolve_cell_px(job, fetch=False)
    budget = found.budget
    size = fit_page(*A4_PT, job.sections.pages.dpi, budget)
    known = read_cell_px(job, fetch=False) is not None
    source = "checkpoint" if known else "job" if job.sections.model.cell_px else "assumed"
    return {
        "cell_px": budget.cell_px,
        "cell_px_from": source,
        "width_px": size.width_px,
        "height_px": size.height_px,
        "dpi": round(72 * (size.width_px * size.height_px / (A4_PT[0] * A4_PT[1])) ** 0.5, 1),
        "visual_tokens": count_visual_tokens(size, budget.cell_px),
    }
