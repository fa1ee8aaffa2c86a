"""Buckets on servers of this machine, read and written without the code under test; and a proxy that cuts the connection to one."""

from __future__ import annotations

import shutil
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SCHEMES = ("s3", "gs", "az")
FIXTURES = {"s3": "bucket", "gs": "gcs_bucket", "az": "azure_bucket"}
"""The fixture that starts each store's server."""


@dataclass(frozen=True)
class Bucket(ABC):
    """A bucket."""

    endpoint: str
    name: str
    scheme: ClassVar[str]

    def url(self, key: str) -> str:
        return f"{self.scheme}://{self.name}/{key}"

    @abstractmethod
    def put(self, key: str, data: bytes) -> None: ...

    def put_many(self, keys: Iterable[str]) -> None:
        """Write objects of one byte."""
        for key in keys:
            self.put(key, b"1")

    @abstractmethod
    def get(self, key: str) -> bytes: ...

    @abstractmethod
    def keys(self, prefix: str) -> list[str]:
        """Return the keys that begin so, sorted."""

    @abstractmethod
    def has_unfinished_uploads(self) -> bool: ...

    @abstractmethod
    def make_environment(self, endpoint: str) -> dict[str, str]:
        """Return the variables that lead the code under test to this address."""

    def contents(self, prefix: str) -> dict[str, bytes]:
        return {key: self.get(key) for key in self.keys(prefix)}

    def rows(self, url: str) -> list[dict[str, Any]]:
        """Return the rows of the shards below a URL."""
        found = self.contents(url.removeprefix(self.url("")) + "/")
        return [row for key, data in found.items() if key.endswith(".parquet") for row in pq.read_table(pa.BufferReader(data)).to_pylist()]

    @contextmanager
    def redirect(self, endpoint: str) -> Iterator[None]:
        """Lead the code under test to another address during the block, and let no library wait before it tries again."""
        kind = fsspec.get_filesystem_class(self.scheme)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.make_environment(endpoint).items():
                patch.setenv(name, value)
            self.skip_waits(patch)
            kind.clear_instance_cache()
            yield
        kind.clear_instance_cache()

    def skip_waits(self, patch: pytest.MonkeyPatch) -> None:
        """Let the library of this store try again at once, where the environment does not say so."""
        return


def start_bucket(request: pytest.FixtureRequest, scheme: str) -> Bucket:
    """Return the bucket of a store, whose server is started once; the test is skipped where the server is not installed."""
    found = request.getfixturevalue(FIXTURES[scheme])
    assert isinstance(found, Bucket)
    return found


def require_program(name: str) -> str:
    """Return the path of a program; the test is skipped where it is not installed."""
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def serve_until_cut(bucket: Bucket, most_bytes: int) -> Iterator[str]:
    """Yield an address at which every connection to the server breaks off after this many bytes to it."""
    host, _, port = bucket.endpoint.removeprefix("http://").partition("/")[0].partition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept_connections, args=(listener, (host, int(port)), most_bytes), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def accept_connections(listener: socket.socket, there: tuple[str, int], most_bytes: int) -> None:
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            threading.Thread(target=relay_requests, args=(client, there, most_bytes), daemon=True).start()


def relay_requests(client: socket.socket, there: tuple[str, int], most_bytes: int) -> None:
    """Relay what a client sends until it is too much, and every answer before that."""
    with client, socket.create_connection(there) as server, suppress(OSError):
        threading.Thread(target=relay_answers, args=(server, client), daemon=True).start()
        while most_bytes > 0 and (data := client.recv(min(65_536, most_bytes))):
            server.sendall(data)
            most_bytes -= len(data)
        for end in (client, server):
            end.shutdown(socket.SHUT_RDWR)


def relay_answers(server: socket.socket, client: socket.socket) -> None:
    with suppress(OSError):
        while data := server.recv(65_536):
            client.sendall(data)
