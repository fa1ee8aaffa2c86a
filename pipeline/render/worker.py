"""Render worker: the child process of a `Sandbox`, started with `python -m pipeline.render.worker DESCRIPTOR`.

DESCRIPTOR is the file descriptor of a socket to the parent. The settings come in first, then one message per request:
`{}` with a document's bytes, answered by `{"page_count"}`, `{"page_no"}`, answered by that page, or `{"measure"}`, the number of a page,
answered by its measures (`protocol.py`). A worker that reads pages (`reading_worker.py`) answers `{"read", "limit_s"}`, the number of a
page, by that page with one cell of pixels and the words that it read. A failure is answered by `{"kind", "message"}`. The worker confines
itself before it reads a document, says in its first message which restrictions the system does not grant (`{"gaps"}`), and ends when the
parent closes the socket.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from pipeline.budget import PixelBudget, RenderSettings
from pipeline.errors import DocumentError
from pipeline.records import Page
from pipeline.render.confine import confine_process, limit_cpu_time
from pipeline.render.protocol import pack_page, receive_message, send_message


def serve_parent(
    descriptor: int, open_document: Callable[[bytes, RenderSettings], Any], read_page: Callable[[Page, int], Page] | None = None
) -> None:
    """Answer the parent's messages on this socket until the parent closes it. A page is read where `read_page` is given."""
    connection = socket.socket(fileno=descriptor)
    values, _ = receive_message(connection, 0)
    settings = RenderSettings(budget=PixelBudget(**values.pop("budget")), **values)
    send_message(connection, {"gaps": confine_process(settings.memory_bytes)})
    opened: Any = None
    with suppress(ConnectionError):
        while True:
            header, body = receive_message(connection, sys.maxsize)
            limit_cpu_time(header.get("limit_s", settings.timeout_s))
            try:
                if "page_no" in header:
                    send_message(connection, *pack_page(opened.draw(header["page_no"])))
                elif "read" in header and read_page:
                    send_message(connection, *pack_page(read_page(opened.draw(header["read"]), settings.budget.cell_px)))
                elif "measure" in header:
                    send_message(connection, {"measures": asdict(opened.measure(header["measure"]))})
                else:
                    opened = None
                    data = bytes(body)
                    body.clear()  # keep one copy of the document, not two
                    opened = open_document(data, settings)
                    send_message(connection, {"page_count": opened.page_count})
            except DocumentError as error:
                send_message(connection, {"kind": error.kind, "message": error.message})


if __name__ == "__main__":
    from pipeline.render.document import open_document

    serve_parent(int(sys.argv[1]), open_document)
