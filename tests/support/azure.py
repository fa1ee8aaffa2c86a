"""Azure Blob Storage on loopback: Azurite, a program for Node.js (`npm install -g azurite`)."""

from __future__ import annotations

import http.client
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support import buckets

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's own account and its published key."""
START_S = 60.0


@dataclass(frozen=True)
class Bucket(buckets.Bucket):
    """A container of Azurite."""

    container: Any
    """Azure's own client of it."""
    scheme = "az"

    def put(self, key: str, data: bytes, **metadata: str) -> None:
        self.container.upload_blob(key, data, overwrite=True, metadata=metadata)

    def put_many(self, keys: Iterable[str]) -> None:
        """Write objects of one byte. Azurite takes one after another in 2 ms each, several at once in 15."""
        from azure.storage.blob import ContainerSasPermissions, generate_container_sas

        until = datetime.now(UTC) + timedelta(hours=1)
        may = ContainerSasPermissions(write=True, create=True)
        signature = generate_container_sas(ACCOUNT, self.name, account_key=KEY, permission=may, expiry=until)
        headers = {"x-ms-blob-type": "BlockBlob", "x-ms-version": "2021-12-02"}
        with closing(http.client.HTTPConnection(self.endpoint.removeprefix("http://"))) as connection:
            for key in keys:
                connection.request("PUT", f"/{ACCOUNT}/{self.name}/{quote(key)}?{signature}", b"1", headers)
                answer = connection.getresponse()
                assert (answer.read(), answer.status)[1] == http.client.CREATED

    def get(self, key: str) -> bytes:
        return bytes(self.container.download_blob(key).readall())

    def keys(self, prefix: str) -> list[str]:
        return sorted(self.container.list_blob_names(name_starts_with=prefix))

    def has_unfinished_uploads(self) -> bool:
        return False  # blocks that belong to no blob are removed by the service

    def make_environment(self, endpoint: str) -> dict[str, str]:
        return {"AZURE_STORAGE_CONNECTION_STRING": format_connection(endpoint)}

    def skip_waits(self, patch: pytest.MonkeyPatch) -> None:
        async def skip(*_: object) -> None:
            pass

        patch.setattr("azure.storage.blob._shared.policies_async.AsyncStorageRetryPolicy.sleep", skip)


def format_connection(endpoint: str) -> str:
    return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint}/{ACCOUNT};"


def isolate_environment(patch: pytest.MonkeyPatch, port: int) -> None:
    """Leave one way to configure Azure in the environment: the connection to Azurite."""
    for name in ("ACCOUNT_NAME", "ACCOUNT_KEY", "SAS_TOKEN", "CLIENT_ID", "CLIENT_SECRET", "TENANT_ID", "ANON"):
        patch.delenv(f"AZURE_STORAGE_{name}", raising=False)
    patch.setenv("AZURE_STORAGE_CONNECTION_STRING", format_connection(f"http://127.0.0.1:{port}"))


@contextmanager
def serve_bucket(program: str, port: int, folder: Path) -> Iterator[Bucket]:
    """Start Azurite with a container."""
    from azure.storage.blob import BlobServiceClient

    options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent", "--blobPort", str(port)]
    with subprocess.Popen([program, *options], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for_server(port)
            with BlobServiceClient.from_connection_string(format_connection(f"http://127.0.0.1:{port}")) as client:
                yield Bucket(f"http://127.0.0.1:{port}", "bucket", client.create_container("bucket"))
        finally:
            server.terminate()


def wait_for_server(port: int) -> None:
    """Return when the server answers, in any way."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with suppress(OSError), closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
            connection.request("GET", "/")
            connection.getresponse().read()
            return
        time.sleep(0.1)
    raise TimeoutError(f"Azurite did not answer within {START_S:.0f} s")
