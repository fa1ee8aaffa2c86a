"""Leases that tests leave in an output folder, as if a run elsewhere held it."""

from __future__ import annotations

from dataclasses import replace

from pipeline.output.lease import NAME, LeaseHolder
from pipeline.storage.store import Store


def leave_lease(folder: Store, **changes: object) -> None:
    """Write the lease of a run on another machine, renewed just now and valid for 60 s, with these fields changed."""
    holder = replace(LeaseHolder.for_this_process(60.0), holder="other", host="worker-3", machine="another machine")
    folder.put(NAME, replace(holder, **changes).to_json())  # type: ignore[arg-type]
