"""S3 server on loopback (moto's), and a proxy that cuts the connection to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SECRET = "wJalrXUtnFEMI/EXAMPLEKEY"
CONFIG = """\
[default]
region = us-east-1
aws_access_key_id = AKIDEXAMPLE
aws_secret_access_key = {secret}
endpoint_url = {endpoint}
"""


@dataclass(frozen=True)
class Bucket:
    """A bucket, read and written without the code under test."""

    endpoint: str
    name: str

    def url(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def put(self, key: str, data: bytes) -> None:
        self.backend.put_object(self.name, key, data)

    def get(self, key: str) -> bytes:
        return bytes(self.backend.get_object(self.name, key).value)

    def keys(self, prefix: str) -> list[str]:
        """Return the keys that begin so."""
        return sorted(key for key in self.backend.buckets[self.name].keys if key.startswith(prefix))

    def contents(self, prefix: str) -> dict[str, bytes]:
        return {key: self.get(key) for key in self.keys(prefix)}

    def rows(self, url: str) -> list[dict[str, Any]]:
        """Return the rows of the shards below a URL."""
        found = self.contents(url.removeprefix(self.url("")) + "/")
        return [row for key, data in found.items() if key.endswith(".parquet") for row in pq.read_table(pa.BufferReader(data)).to_pylist()]

    @property
    def backend(self) -> Any:
        """The server's memory: it runs in this process."""
        from moto.s3.models import s3_backends

        return s3_backends["123456789012"]["aws"]


def isolate_environment(patch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Leave one way to configure S3 in the environment, a file that does not exist yet, and return its path."""
    for name in (
        "AWS_PROFILE",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
    ):
        patch.delenv(name, raising=False)
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "none"))
    patch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("AWS_MAX_ATTEMPTS", "1")  # s3fs tries five times by itself
    return folder / "config"


@contextmanager
def serve_bucket(config: Path) -> Iterator[Bucket]:
    """Start a server with a bucket, and write its address into the file."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    bucket = Bucket("http://{}:{}".format(*server.get_host_and_port()), "bucket")
    config.write_text(CONFIG.format(secret=SECRET, endpoint=bucket.endpoint))
    with urlopen(Request(f"{bucket.endpoint}/{bucket.name}", method="PUT")):
        pass
    try:
        yield bucket
    finally:
        server.stop()


@contextmanager
def serve_until_cut(bucket: Bucket, most_bytes: int) -> Iterator[str]:
    """Yield an address at which every connection to the server breaks off after this many bytes to it."""
    there = bucket.endpoint.removeprefix("http://").split(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept_connections, args=(listener, (there[0], int(there[1])), most_bytes), daemon=True).start()
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
