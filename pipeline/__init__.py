"""Folders of PDFs and images -> typed, validated Parquet, with an open vision-language model on Ray Data.

from pipeline import Job, read, run
report = run(Job.load("jobs/invoices.yaml"))
read(report.output)     # a pandas DataFrame
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.cli.progress import show_progress
    from pipeline.export.frame import read
    from pipeline.flow.passes import run, settle
    from pipeline.job import Job


os.environ.setdefault("RAY_DEDUP_LOGS", "0")
"""Read when Ray is imported: it would hold messages back and print them to stdout at the very end, behind a command's data."""
os.environ.setdefault("MIMALLOC_PURGE_DELAY", "0")
"""Read when pyarrow is imported: its allocator gives memory back at once, so that a long listing does not add up."""
__all__ = ["Job", "__version__", "read", "run", "settle", "show_progress"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import pipeline` loads neither Ray nor torch."""
    if name == "Job":
        from pipeline.job import Job

        return Job
    if name == "read":
        from pipeline.export.frame import read

        return read
    if name == "show_progress":
        from pipeline.cli.progress import show_progress

        return show_progress
    if name in ("run", "settle"):
        from pipeline import flow

        return getattr(flow, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
