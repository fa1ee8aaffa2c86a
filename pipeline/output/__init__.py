"""Rows -> Parquet shards that are whole or absent, and back: the sources, the ledger of requests, the records.

    out/invoices/
      sources/*.parquet     one row per source listed; while a run goes on, later rows of one source complete earlier ones
      requests/*.parquet    one row per request: the ledger
      records/*.parquet     one row per document or page, typed
      job.yaml  report.json

The folder is one here or a prefix in an object store (`store.py`), where a shard is there when it is whole. Its name is made
from its rows' keys, so that writing it twice leaves one file. Knows neither Ray nor what a row means.
"""

from __future__ import annotations

import json
from collections.abc import Set
from typing import Any

import yaml

from pipeline.errors import JobError
from pipeline.storage import store
from pipeline.storage.location import Location
from pipeline.storage.object_store import format_os_error
from pipeline.storage.store import Store

SHARD_SUFFIX = ".parquet"


class Output:
    """A run's folder."""

    def __init__(self, place: Location) -> None:
        self.path, self.root = place, store.open_store(place)
        self.sources, self.requests, self.records = (self.root / name for name in ("sources", "requests", "records"))

    @property
    def folders(self) -> tuple[Store, ...]:
        return self.root, self.sources, self.requests, self.records

    def create(self) -> None:
        """Create the folders, and prove that they can be written to. Raises JobError, before anything else has happened."""
        try:
            for folder in self.folders:
                folder.create()
            self.root.check_writable()
        except OSError as error:
            raise JobError(f"cannot write to the output folder {self.path}: {format_os_error(error)}") from None

    def remove_leftovers(self) -> None:
        """Remove what a killed run left half-written; not while another one writes. Raises RunError."""
        for folder in self.folders:
            folder.remove_leftovers()

    def write_job(self, content: dict[str, Any]) -> None:
        self.root.put("job.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120).encode())

    def read_job(self) -> dict[str, Any] | None:
        """Return what `job.yaml` says, or None in a fresh folder. Raises JobError when someone else wrote that file."""
        file = f"{self.root / 'job.yaml'}"
        try:
            found = yaml.safe_load(self.root.read("job.yaml").decode("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise JobError(f"cannot read {file}: {error}") from None
        if found is not None and not (isinstance(found, dict) and found.keys() >= {"job", "fingerprint", "asked"}):
            raise JobError(f"{file} was not written by a run: choose another output folder")
        return found

    def keep_records(self, names: Set[str]) -> None:
        """Remove the shards of an earlier settling."""
        self.records.remove(self.records.list_names(SHARD_SUFFIX).keys() - names)

    def write_report(self, content: dict[str, Any]) -> None:
        self.root.put("report.json", (json.dumps(content, indent=2) + "\n").encode())
