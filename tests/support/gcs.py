"""Google Cloud Storage on loopback: gcp-storage-emulator, which answers a listing in one page; here in pages, as the service does."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import pytest

from tests.support import buckets


@dataclass(frozen=True)
class Bucket(buckets.Bucket):
    """A bucket of the emulator."""

    storage: Any
    """The server's memory: it runs in this process."""
    scheme = "gs"

    def put(self, key: str, data: bytes) -> None:
        from gcp_storage_emulator.handlers import objects

        made = objects._make_object_resource(self.endpoint, self.name, key, "application/octet-stream", str(len(data)))
        self.storage.create_file(self.name, key, data, objects._checksums(data, made))

    def get(self, key: str) -> bytes:
        return bytes(self.storage.get_file(self.name, key))

    def keys(self, prefix: str) -> list[str]:
        return sorted(key for key in self.storage.objects.get(self.name, {}) if key.startswith(prefix))

    def has_unfinished_uploads(self) -> bool:
        return bool(self.storage.resumable)

    def make_environment(self, endpoint: str) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": endpoint}

    def skip_waits(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr("gcsfs.retry.min", lambda *_: 0, raising=False)  # of a growing wait and 32 seconds


def isolate_environment(patch: pytest.MonkeyPatch, port: int) -> None:
    """Leave one way to configure Google Cloud Storage in the environment: the emulator's address."""
    patch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    patch.setenv("NO_GCE_CHECK", "true")
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google, not the emulator, what kind of bucket it is


@contextmanager
def serve_bucket(port: int) -> Iterator[Bucket]:
    """Start the emulator with a bucket."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.handlers import objects

    emulator = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    emulator._storage._write_config_to_file = lambda: None  # all objects as JSON, at each write
    for _, methods in server.HANDLERS:
        if methods.get("GET") is objects.ls:
            methods["GET"] = list_page
    setup = server.RequestHandler.setup
    server.RequestHandler.setup = lambda handler: (setup(handler), setattr(handler, "rfile", WholeBodies(handler.rfile)))[0]
    emulator.start()
    emulator._api._httpd.handle_error = print_error
    try:
        yield Bucket(f"http://127.0.0.1:{port}", "bucket", emulator._storage)
    finally:
        emulator.stop()


def print_error(*_: object) -> None:
    """Print what went wrong in the emulator, unless its client has gone away."""
    if not isinstance(sys.exception(), ConnectionError):
        traceback.print_exc()


@dataclass(frozen=True)
class WholeBodies:
    """Reads requests. The emulator would store what has come of an upload that was cut; the service stores nothing."""

    stream: Any

    def readline(self, limit: int = -1) -> bytes:
        return bytes(self.stream.readline(limit))

    def read(self, size: int) -> bytes:
        data = bytes(self.stream.read(size))
        if len(data) < size:
            raise ConnectionError("the client has gone away")
        return data

    def close(self) -> None:
        self.stream.close()

    @property
    def closed(self) -> bool:
        return bool(self.stream.closed)


class CapturedResponse:
    """Takes the emulator's answer to a listing."""

    content: dict[str, Any] | None = None
    status = HTTPStatus.OK

    def json(self, content: dict[str, Any]) -> None:
        self.content = json.loads(json.dumps(content))


def list_page(request: Any, response: Any, storage: Any, *_: object, **__: object) -> None:
    """Answer a listing with the page that was asked for: `pageToken` is the last name of the page before."""
    from gcp_storage_emulator.handlers import objects

    objects.ls(request, captured := CapturedResponse(), storage)
    response.status = captured.status
    if captured.content is None:
        return
    most, token = int(request.query.get("maxResults", ["1000"])[0]), request.query.get("pageToken", [""])[0]
    items = {item["name"]: item for item in captured.content["items"]}
    names = sorted(name for name in [*items, *captured.content["prefixes"]] if name > token)
    page = names[:most]
    content = {"kind": "storage#objects", "prefixes": [name for name in page if name not in items]}
    content["items"] = [items[name] for name in page if name in items]
    response.json(content | ({"nextPageToken": page[-1]} if len(names) > most else {}))
