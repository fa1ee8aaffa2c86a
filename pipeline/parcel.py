"""This package -> a copy of its own files, to be sent to a cluster. Knows neither cluster nor job.

Of a checkout with its documents, outputs and models nothing else goes along.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pipeline
from pipeline.errors import JobError

PACKAGE = Path(pipeline.__file__).parent
MOST_BYTES = 64 * 2**20
"""The package has 7 MiB, nearly all of them the demonstration model. Ray's own limit is 500 MiB, kept in its head's memory."""


def pack(folder: Path, package: Path = PACKAGE) -> Path:
    """Copy the package into a folder and return where it stands there. Raises JobError when it is too large to be itself alone."""
    files = own_files(package)
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


def own_files(package: Path) -> list[Path]:
    """Return the files of a package; what Python compiled and what is hidden are none, nor what a link leads to."""
    found = (file for file in package.rglob("*") if file.is_file() and not file.is_symlink())
    return sorted(f for f in found if not any(p.startswith(".") or p == "__pycache__" for p in f.relative_to(package).parts))
