"""Sample folder: this package's sample jobs, their schemas and documents, written where a user wants to run them.

    jobs/invoices.yaml, …   schemas/invoice.json, …   jobs/samples/invoices/invoice-01.pdf, …   jobs/samples/truth/invoices.jsonl, …

An installed wheel has these files in `sample/` beside this file (`setup.py` puts them there). A copy of the repository, and with it an
editable install, has them in the folders `jobs/` and `schemas/` beside the package.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import JobError

PATTERNS = ("jobs/*.yaml", "jobs/samples/*/*", "schemas/*.json")
FIRST_JOB = Path("jobs/invoices.yaml")


def write_sample_folder(folder: Path) -> list[str]:
    """Write the samples into a folder, which need not exist, and return their paths there. Writes nothing if one of them exists already.

    Raises JobError.
    """
    root = find_samples()
    files = sorted(file.relative_to(root) for pattern in PATTERNS for file in root.glob(pattern))
    if present := [file for file in files if (folder / file).exists()]:
        more = f" (and {len(present) - 1} more)" if len(present) > 1 else ""
        raise JobError(
            f"{folder / present[0]}{more} exists already and is not overwritten: name another folder", folder / present[0], "--sample"
        )
    try:
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            with (folder / file).open("xb") as target:
                target.write((root / file).read_bytes())
    except OSError as error:
        raise JobError(f"cannot write {error.filename or folder}: {error.strerror}", error.filename or folder, "--sample") from None
    return [str(folder / file) for file in files]


def find_samples() -> Path:
    """Return the folder that has `jobs/` and `schemas/`. Raises JobError for a package without them."""
    roots = [Path(__file__).parent / "sample", Path(__file__).parents[2]]
    for root in roots:
        if (root / FIRST_JOB).is_file():
            return root
    raise JobError(f"this copy of the package has no samples (looked for {roots[0] / FIRST_JOB}): install it with pip")
