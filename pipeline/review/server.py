"""Review server: the review page of an output too large for one file, its page images drawn when they are looked at.

It listens on loopback alone, and answers only who knows the address that it prints, which has a random token in it.

    GET /TOKEN/            the page
    GET /TOKEN/pages/12    the pages of the document that stands at place 12 in the queue, as JSON
"""

from __future__ import annotations

import io
import json
import secrets
import threading
from contextlib import closing
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pipeline.errors import JobError
from pipeline.output.records import read_record_table
from pipeline.review.documents import list_review_documents
from pipeline.review.drawing import PageArtist, describe_pages
from pipeline.review.page import write_head, write_tail

LOOPBACK = "127.0.0.1"


class ReviewServer:
    """Serves one output's review page until it is closed."""

    def __init__(self, place: str, folder: Path | None = None, port: int = 0) -> None:
        """Raises JobError and RunError as `page.write_review_page` does, and JobError for a port that is taken."""
        records = read_record_table(place)
        self.documents = list_review_documents(records)
        self.artist, self.lock = PageArtist(records, folder), threading.Lock()
        stream = io.StringIO()
        write_head(stream, records, is_served=True)
        write_tail(stream, records, self.documents, [], is_served=True)
        self.page, self.token = stream.getvalue().encode(), secrets.token_urlsafe(24)
        try:
            self.server = ThreadingHTTPServer((LOOPBACK, port), make_handler(self))
        except OSError as error:
            raise JobError(f"cannot listen on port {port} of {LOOPBACK}: {error.strerror}", key="--port") from None
        self.hosts = {f"{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost")}

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.server.server_port}/{self.token}/"

    def serve(self) -> None:
        """Answer until Ctrl-C or `close`."""
        with closing(self.artist), self.server:
            self.server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """End `serve`, which runs in another thread."""
        self.server.shutdown()

    def find_content(self, path: str) -> tuple[bytes, str] | None:
        """Return what is at a path, and its type; None where there is nothing."""
        start, _, rest = path.removeprefix("/").partition("/")
        if not secrets.compare_digest(start.encode(), self.token.encode()):
            return None
        if not rest:
            return self.page, "text/html; charset=utf-8"
        kind, _, number = rest.partition("/")
        if kind != "pages" or not number.isascii() or not number.isdigit() or int(number) >= len(self.documents):
            return None
        with self.lock:
            images = list(self.artist.draw_document(self.documents[int(number)]))
        found = [{**about, "jpeg": image.jpeg} for about, image in zip(describe_pages(images), images, strict=True)]
        return json.dumps(found).encode(), "application/json"


def make_handler(review: ReviewServer) -> type[BaseHTTPRequestHandler]:
    """Return the class that answers a server's requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another host name is that of a page elsewhere whose name was made to lead here (DNS rebinding).
            found = review.find_content(self.path) if self.headers.get("Host") in review.hosts else None
            if found is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            content, kind = found
            self.send_response(HTTPStatus.OK)
            headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"}
            for name, value in {**headers, "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Nothing: the address is a secret."""

    return Handler
