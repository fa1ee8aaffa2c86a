"""Event log: what happens in a run, as records of the logger `pipeline.events`, formatted as JSON lines.

A program that embeds a run attaches a handler of its own. `pipeline run --log FILE` writes lines like this one (`-`: to stderr,
between the messages):

    {"at": "2026-11-21T08:00:00.123+00:00", "event": "request", "key": "c1…", "source": "a.pdf", "status": "extracted", …}
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

from pipeline.errors import JobError
from pipeline.records import ReceiptRow

EVENT_LOG = logging.getLogger("pipeline.events")
EVENT_LOG.addHandler(logging.NullHandler())
REQUEST_FIELDS = "key rule attempt source doc_id first_page last_page status asks prompt_tokens completion_tokens engine elapsed_s".split()


def emit_event(name: str, **facts: Any) -> None:
    """Log an event with its facts."""
    EVENT_LOG.info(name, extra={"facts": facts})


def emit_answer_event(row: ReceiptRow) -> None:
    """Log a completed request. A row that only identifies a document is no event."""
    if row["key"] and EVENT_LOG.isEnabledFor(logging.INFO):
        failure = row.get("failure")
        why = f"{failure['stage']}/{failure['kind']}" if failure else None
        message = failure["message"] if failure else None
        emit_event("request", **{name: row.get(name) for name in REQUEST_FIELDS}, failure=why, message=message)


class JsonLinesFormatter(logging.Formatter):
    """Formats an event as one line of JSON; control characters in document names are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"at": at, "event": record.msg, **getattr(record, "facts", {})}, default=str)


class PrivateFileHandler(logging.FileHandler):
    """Appends to a file; a new one can be read by its owner alone."""

    def _open(self) -> TextIOWrapper:
        return cast(TextIOWrapper, open(self.baseFilename, self.mode, encoding=self.encoding, opener=partial(os.open, mode=0o600)))


@contextmanager
def attach_handler(handler: logging.Handler) -> Iterator[None]:
    """Attach a logging handler for the duration of the block."""
    level, spreads = EVENT_LOG.level, EVENT_LOG.propagate
    EVENT_LOG.addHandler(handler)
    EVENT_LOG.setLevel(logging.INFO)
    EVENT_LOG.propagate = False
    try:
        yield
    finally:
        EVENT_LOG.removeHandler(handler)
        handler.close()
        EVENT_LOG.setLevel(level)
        EVENT_LOG.propagate = spreads


@contextmanager
def write_events_to(file: Path | None) -> Iterator[None]:
    """Append the events of the block to a file, or write them to stderr for `-`. Raises JobError when the file cannot be written."""
    if file is None:
        yield
        return
    try:
        handler = logging.StreamHandler() if str(file) == "-" else PrivateFileHandler(file, encoding="utf-8")
    except OSError as error:
        raise JobError(f"cannot write the log {file}: {error.strerror}", file, "--log") from None
    handler.setFormatter(JsonLinesFormatter())
    with attach_handler(handler):
        yield
