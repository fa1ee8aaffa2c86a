"""What happens in a run, as it happens -> one line of JSON each. Knows neither files nor what an event means.

Events are records of Python's own logging, of the logger `pipeline.events`: a program that embeds a run takes them where it
likes; `pipeline run --log FILE` writes them as (`-`: to stderr, between the words)

    {"at": "2026-11-21T08:00:00.123+00:00", "event": "request", "key": "c1…", "source": "a.pdf", "status": "extracted", …}
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import JobError

EVENT_LOG = logging.getLogger("pipeline.events")
EVENT_LOG.addHandler(logging.NullHandler())
REQUEST_FIELDS = "key attempt source doc_id first_page last_page status asks prompt_tokens completion_tokens engine elapsed_s".split()


def emit_event(name: str, **facts: Any) -> None:
    """Tell whoever listens."""
    EVENT_LOG.info(name, extra={"facts": facts})


def emit_answer_event(row: Mapping[str, Any]) -> None:
    """Tell what became of a request; a twin of another document has none and is no event."""
    if row["key"] and are_heard():
        failure = row.get("failure") or {}
        why = f"{failure['stage']}/{failure['kind']}" if failure else None
        emit_event("request", **{name: row.get(name) for name in REQUEST_FIELDS}, failure=why, message=failure.get("message"))


class JsonLinesFormatter(logging.Formatter):
    """Events as lines of JSON. What stands in a document's name cannot break a line."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"at": at, "event": record.msg, **getattr(record, "facts", {})}, default=str)


class CallbackHandler(logging.Handler):
    """Events as they are, for somebody else to tell."""

    def __init__(self, tell: Callable[[str, dict[str, Any]], object]) -> None:
        super().__init__()
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(record.msg, getattr(record, "facts", {}))


def are_heard() -> bool:
    """Say whether anybody listens."""
    return EVENT_LOG.isEnabledFor(logging.INFO)


@contextmanager
def attach_handler(handler: logging.Handler) -> Iterator[None]:
    """Let a handler have the events of this while."""
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
    """Append the events of this while to a file, or to stderr for `-`; nothing without one. Raises JobError when it cannot be written."""
    if file is None:
        yield
        return
    try:
        handler = logging.StreamHandler() if str(file) == "-" else logging.FileHandler(file, encoding="utf-8")
    except OSError as error:
        raise JobError(f"cannot write the log {file}: {error.strerror}") from None
    handler.setFormatter(JsonLinesFormatter())
    with attach_handler(handler):
        yield
