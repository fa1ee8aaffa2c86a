"""Output folder of a run: the list of sources, the ledgers of requests and of OCR, the records, and small files about the run.

In: rows of these three tables, the keys of the job and the report of the run. Out: the same tables, read back from Parquet
shards, and with them the state from which a run resumes.

    out/invoices/
      sources/*.parquet     one row per source; during a run, later rows of a source complete earlier ones
      requests/*.parquet    one row per request: the ledger
      words/*.parquet       one row per page that OCR has looked at: only where `evidence.ocr` is not off
      records/*.parquet     one row per document or page, typed
      job.yaml  report.json  report.html
      listing.json          what `sources/` is the listing of, and whether the run over it has ended
      corrections.jsonl     what people have put right
      settled.json          what each shard of records was made of: one that is as it was is not written again

The folder is local, or a prefix in an object store (`storage/store.py`).
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
    """The output folder of a run; `str(output.root)` is its path or URL."""

    def __init__(self, location: Location) -> None:
        self.root = store.open_store(location)
        self.sources, self.requests, self.records = (self.root / name for name in ("sources", "requests", "records"))
        self.words = self.root / "words"

    @property
    def folders(self) -> tuple[Store, ...]:
        return self.root, self.sources, self.requests, self.records

    def create(self) -> None:
        """Create the folders and test that they can be written to. Raises JobError."""
        try:
            for folder in self.folders:
                folder.create()
            self.root.check_writable()
        except OSError as error:
            raise JobError(
                f"cannot write to the output folder {self.root}: {format_os_error(error)}", str(self.root), "output.path"
            ) from None

    def remove_leftovers(self) -> None:
        """Remove half-written files of a killed run. Must not be called while another run writes. Raises RunError."""
        for folder in self.folders:
            folder.remove_leftovers()

    def write_job(self, content: dict[str, Any]) -> None:
        self.root.put("job.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120).encode())

    def read_job(self) -> dict[str, Any] | None:
        """Return the content of `job.yaml`, or None in a new folder. Raises JobError for a file that no run has written."""
        file = f"{self.root / 'job.yaml'}"
        try:
            found = yaml.safe_load(self.root.read("job.yaml").decode("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise JobError(f"cannot read {file}: {error}", file) from None
        if found is not None and not (isinstance(found, dict) and found.keys() >= {"job", "fingerprint", "asked"}):
            raise JobError(f"{file} was not written by a run: choose another output folder", file, "output.path")
        return found

    def remove_other_records(self, names: Set[str]) -> None:
        """Remove all shards of records but these: those of an earlier settle pass."""
        self.records.remove(self.records.list_names(SHARD_SUFFIX).keys() - names)

    def write_settled(self, rows: list[dict[str, Any]]) -> None:
        self.root.put("settled.json", (json.dumps(rows) + "\n").encode())

    def read_settled(self) -> list[dict[str, Any]]:
        """Return the rows of `settled.json`; none where it is not there or cannot be read, because all records can be written again."""
        try:
            found = json.loads(self.root.read("settled.json"))
        except (OSError, ValueError):
            return []
        return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []

    def write_listing(self, facts: dict[str, Any]) -> None:
        self.root.put("listing.json", (json.dumps(facts) + "\n").encode())

    def read_listing(self) -> dict[str, Any]:
        """Return the content of `listing.json`; nothing where it is not there or cannot be read, because all can be listed again."""
        return self.read_facts("listing.json")

    def write_report(self, content: dict[str, Any]) -> None:
        self.root.put("report.json", (json.dumps(content, indent=2) + "\n").encode())

    def read_report(self) -> dict[str, Any]:
        """Return the content of `report.json`; nothing where it is not there or cannot be read."""
        return self.read_facts("report.json")

    def read_facts(self, name: str) -> dict[str, Any]:
        """Return a JSON object; an empty one where its file is not there or holds none."""
        try:
            found = json.loads(self.root.read(name))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
