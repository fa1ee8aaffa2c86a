"""The child's side: answer the parent until it hangs up. Knows no file format: its renderer does."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from typing import Any

from pipeline.budget import PixelBudget, RenderSettings
from pipeline.errors import DocumentError
from pipeline.sandbox.confine import confine, limit_cpu
from pipeline.sandbox.wire import pack, receive, send


def serve(descriptor: int, renderer: Any) -> None:
    """Answer the parent until it hangs up. `renderer` is `pipeline.render`, or has its `inspect`."""
    connection = socket.socket(fileno=descriptor)
    given, _ = receive(connection, 0)
    settings = RenderSettings(budget=PixelBudget(**given.pop("budget")), **given)
    confine(settings.memory_bytes)
    send(connection, {})
    opened: Any = None
    with suppress(ConnectionError):
        while True:
            header, body = receive(connection, sys.maxsize)
            limit_cpu(settings.timeout_s)
            try:
                if "page_no" in header:
                    page = opened.draw(header["page_no"])
                    send(connection, pack(page), memoryview(page.pixels).cast("B"))
                else:
                    opened = None
                    data = bytes(body)
                    body.clear()  # one copy is enough
                    opened = renderer.inspect(data, settings)
                    send(connection, {"page_count": opened.page_count})
            except DocumentError as error:
                send(connection, {"kind": error.kind, "message": error.message})
