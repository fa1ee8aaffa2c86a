"""Object store client on fsspec: takes a URL and finds an object, or fetches its bytes, whole or in ranges.

Credentials, region and endpoint come from the environment of the calling process (AWS_PROFILE, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, …) and are never sent to another process.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec

from pipeline.errors import JobError
from pipeline.storage.location import STORE_PACKAGES, has_secret, parse_scheme, redact_url
from pipeline.version import DISTRIBUTION

STORE_ERROR_MODULES = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
)
"""The exceptions of the stores' libraries other than OSError and ValueError."""


MAX_STREAMS = 16
"""Concurrent requests to an object store: each waits 10 to 100 ms and needs little CPU."""


class StoreUnreachable(OSError):
    """A request to an object store failed, which says nothing about whether the object exists."""


@contextmanager
def open_filesystem(url: str) -> Iterator[tuple[Any, str]]:
    """Yield the fsspec file system of a URL and the path in it, and convert the exceptions of its library to OSErrors.

    `fsspec.core.url_to_fs` is not used: it reads `::` in an object's name as a chain of file systems. Raises JobError
    if a library is missing or the URL contains a secret.
    """
    scheme = parse_scheme(url)
    check_store_available(url)
    try:
        files = fsspec.filesystem(scheme, use_listings_cache=False)
        files.invalidate_cache()
        if scheme == "s3" and files.session is None:
            files.session = make_s3_session()
        yield files, files._strip_protocol(f"{scheme}://{url.partition('://')[2]}")
    except (FileNotFoundError, StoreUnreachable):
        raise
    except list_store_errors() as error:
        raise StoreUnreachable(" ".join(format_os_error(error).split())[:300]) from None


def make_s3_session() -> Any:
    """Return a session whose answers are parsed in a fifth of the time: botocore takes 60 µs for the time in each row of a listing."""
    from aiobotocore.session import AioSession
    from botocore.utils import parse_timestamp

    def parse_time(value: Any) -> Any:
        try:
            return datetime.fromisoformat(value) if "T" in value else parse_timestamp(value)
        except (TypeError, ValueError):
            return parse_timestamp(value)

    session = AioSession()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parse_time)
    return session


def check_store_available(url: str) -> None:
    """Raise JobError for a URL whose library is not installed or that contains a secret."""
    if has_secret(url):
        raise JobError(f"{redact_url(url)} contains a user or a password; set them in the environment")
    library, extra = STORE_PACKAGES.get(parse_scheme(url), ("", ""))
    if library and find_spec(library) is None:
        raise JobError(f"{url} needs the package {library}: pip install '{DISTRIBUTION}[{extra}]'")


def list_store_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of the libraries that are loaded."""
    return (OSError, ValueError, *(getattr(sys.modules[module], name) for module, name in STORE_ERROR_MODULES if module in sys.modules))


def format_os_error(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@dataclass(frozen=True)
class StoredObject:
    """An object as a listing describes it."""

    url: str
    size_bytes: int
    version: str
    """The etag or the time of the last write, by which a changed object is detected."""


def find_object(url: str) -> StoredObject | None:
    """Return the object with exactly this URL, None if it does not exist. Raises OSError."""
    try:
        with open_filesystem(url) as (files, path):
            info = files.info(path)
            return make_stored_object(parse_scheme(url), info) if info["type"] == "file" else None
    except FileNotFoundError:
        return None


def fetch_object(url: str, size_bytes: int) -> tuple[bytes, str]:
    """Return an object's bytes, at most one more than its listed size, and its version after they were read.

    If the object was replaced in the meantime, the version differs from the listed one. Raises OSError.
    """
    with open_filesystem(url) as (files, path):
        data = files.cat_file(path, start=0, end=size_bytes + 1) if size_bytes else b""  # an empty object has no ranges
        return data, make_stored_object(parse_scheme(url), files.info(path)).version


def download_object(url: str, file: Path) -> None:
    """Copy an object to a local file. Raises OSError."""
    with open_filesystem(url) as (files, path):
        files.get_file(path, str(file))


def make_stored_object(scheme: str, info: dict[str, Any]) -> StoredObject:
    """Return an object from what its file system says of it; it keeps the scheme that its URL was given with.

    Azure puts quotation marks around the etag of one blob, and none around those of a listing.
    """
    version = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(key)), "")
    text = str(version.timestamp() if isinstance(version, datetime) else version)
    return StoredObject(f"{scheme}://{info['name']}", info["size"], text.strip('"') if scheme in ("az", "abfs") else text)


class RangeReader(io.RawIOBase):
    """A large object as a file, of which only the ranges that are read are fetched."""

    def __init__(self, url: str, size_bytes: int) -> None:
        self.url, self.size_bytes, self.position = url, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size_bytes}[whence]
        self.position = max(0, start + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer)
        stop = min(self.size_bytes, self.position + len(target))
        if stop <= self.position:
            return 0
        with open_filesystem(self.url) as (files, path):
            data: bytes = files.cat_file(path, start=self.position, end=stop)
        target[: len(data)] = data
        self.position += len(data)
        return len(data)
