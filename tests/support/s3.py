"""S3 server on loopback: moto's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.support import buckets

SECRET = "wJalrXUtnFEMI/EXAMPLEKEY"
CONFIG = """\
[default]
region = us-east-1
aws_access_key_id = AKIDEXAMPLE
aws_secret_access_key = {secret}
endpoint_url = {endpoint}
"""


@dataclass(frozen=True)
class Bucket(buckets.Bucket):
    """A bucket of moto's server."""

    scheme = "s3"

    def put(self, key: str, data: bytes) -> None:
        self.backend.put_object(self.name, key, data)

    def get(self, key: str) -> bytes:
        return bytes(self.backend.get_object(self.name, key).value)

    def keys(self, prefix: str) -> list[str]:
        return sorted(key for key in self.backend.buckets[self.name].keys if key.startswith(prefix))

    def has_unfinished_uploads(self) -> bool:
        return bool(self.backend.buckets[self.name].multiparts)

    def make_environment(self, endpoint: str) -> dict[str, str]:
        return {"AWS_ENDPOINT_URL": endpoint}

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
