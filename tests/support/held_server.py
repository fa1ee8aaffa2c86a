"""HTTP server on loopback that holds its answer back until a test releases it."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

PATIENCE_S = 300


class HeldAnswer(http.server.BaseHTTPRequestHandler):
    """Answers every GET with `content` as soon as `due` is set; `asked` is set by the first one. Subclasses have events of their own."""

    asked, due = threading.Event(), threading.Event()
    content = b"<html>"

    def do_GET(self) -> None:
        self.asked.set()
        self.due.wait(PATIENCE_S)
        with suppress(OSError):  # the client is gone
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.content)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@contextmanager
def serve_held(handler: type[HeldAnswer]) -> Iterator[str]:
    """Start the server, yield its address and release its answer at the end."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        handler.due.set()
        server.shutdown()
