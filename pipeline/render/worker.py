"""The child's side: answer the parent until it hangs up. Knows no file format: its renderer does."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pipeline.budget import PixelBudget, RenderSettings
from pipeline.errors import DocumentError
from pipeline.render.confine import confine_process, limit_cpu_time
from pipeline.render.protocol import pack_page, receive_message, send_message


def serve_parent(descriptor: int, open_document: Callable[[bytes, RenderSettings], Any]) -> None:
    """Answer the parent's messages on this socket until it closes it."""
    connection = socket.socket(fileno=descriptor)
    given, _ = receive_message(connection, 0)
    settings = RenderSettings(budget=PixelBudget(**given.pop("budget")), **given)
    confine_process(settings.memory_bytes)
    send_message(connection, {})
    opened: Any = None
    with suppress(ConnectionError):
        while True:
            header, body = receive_message(connection, sys.maxsize)
            limit_cpu_time(settings.timeout_s)
            try:
                if "page_no" in header:
                    page = opened.draw(header["page_no"])
                    send_message(connection, pack_page(page), memoryview(page.pixels).cast("B"))
                else:
                    opened = None
                    data = bytes(body)
                    body.clear()  # one copy is enough
                    opened = open_document(data, settings)
                    send_message(connection, {"page_count": opened.page_count})
            except DocumentError as error:
                send_message(connection, {"kind": error.kind, "message": error.message})


if __name__ == "__main__":
    from pipeline.render.document import open_document

    serve_parent(int(sys.argv[1]), open_document)
