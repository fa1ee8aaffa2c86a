"""A URL in an object store -> what is there: listed, looked at, fetched whole or in pieces. Knows no run and no output.

The one door to fsspec. Credentials, region and endpoint are what the environment of the process that asks says (AWS_PROFILE,
AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, …), and travel nowhere.
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

STORE_ERROR_MODULES = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
)
"""What the stores' libraries raise beside OSError and ValueError."""


class StoreUnreachable(OSError):
    """An object store did not do what it was asked; nothing is known of what it holds."""


@contextmanager
def open_filesystem(url: str) -> Iterator[tuple[Any, str]]:
    """Give the file system of a URL and the path in it, and turn what its library raises into OSErrors.

    Never by fsspec's own reading of URLs: that takes `::` in an object's name for a way to another file system. Raises JobError
    where a library is missing or the URL has a secret in it.
    """
    scheme = parse_scheme(url)
    check_store_available(url)
    try:
        files = fsspec.filesystem(scheme, use_listings_cache=False)
        files.invalidate_cache()
        yield files, files._strip_protocol(f"{scheme}://{url.partition('://')[2]}")
    except (FileNotFoundError, StoreUnreachable):
        raise
    except list_store_errors() as error:
        raise StoreUnreachable(" ".join(format_os_error(error).split())[:300]) from None


def check_store_available(url: str) -> None:
    """Raise JobError for a URL that cannot be opened here: its library is missing, or it has a secret in it."""
    if has_secret(url):
        raise JobError(f"{redact_url(url)} has a user or a password in it: the environment holds them, no URL does")
    library, extra = STORE_PACKAGES.get(parse_scheme(url), ("", ""))
    if library and find_spec(library) is None:
        raise JobError(f"{url} needs the package {library}: pip install 'pipeline[{extra}]'")


def list_store_errors() -> tuple[type[Exception], ...]:
    """Return what the libraries that are in use raise."""
    return (OSError, ValueError, *(getattr(sys.modules[module], name) for module, name in STORE_ERROR_MODULES if module in sys.modules))


def format_os_error(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@dataclass(frozen=True)
class StoredObject:
    """An object, as it is listed."""

    url: str
    size_bytes: int
    version: str
    """Its etag, or when it was written: what tells a changed object apart."""


def list_objects(url: str, is_glob: bool = False) -> list[StoredObject]:
    """Return the objects at or below a URL, or matched by it, from one listing. Raises OSError."""
    with open_filesystem(url) as (files, path):
        found = files.glob(path, detail=True) if is_glob else files.find(path, detail=True)
        return [make_stored_objects(files, info) for name, info in found.items() if info["type"] == "file" and not name.endswith("/")]


def find_object(url: str) -> StoredObject | None:
    """Return the object of exactly this URL, if there is one. Raises OSError."""
    try:
        with open_filesystem(url) as (files, path):
            info = files.info(path)
            return make_stored_objects(files, info) if info["type"] == "file" else None
    except FileNotFoundError:
        return None


def fetch_object(url: str, size_bytes: int) -> tuple[bytes, str]:
    """Return an object's bytes, at most one more than it is listed with, and the version it had after they were read.

    Raises OSError. Had it been replaced meanwhile, its version would not be the one that was listed.
    """
    with open_filesystem(url) as (files, path):
        data = files.cat_file(path, start=0, end=size_bytes + 1) if size_bytes else b""  # of nothing no range can be had
        return data, make_stored_objects(files, files.info(path)).version


def download_object(url: str, file: Path) -> None:
    """Copy an object into a file here. Raises OSError."""
    with open_filesystem(url) as (files, path):
        files.get_file(path, str(file))


def make_stored_objects(files: Any, info: dict[str, Any]) -> StoredObject:
    given = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(key)), "")
    version = str(given.timestamp() if isinstance(given, datetime) else given)
    return StoredObject(files.unstrip_protocol(info["name"]), info["size"], version)


class RangeReader(io.RawIOBase):
    """A large object, of which only what is looked at is fetched."""

    def __init__(self, url: str, size_bytes: int) -> None:
        self.url, self.size_bytes, self.place = url, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size_bytes}[whence]
        self.place = max(0, start + offset)
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)
        stop = min(self.size_bytes, self.place + len(room))
        if stop <= self.place:
            return 0
        with open_filesystem(self.url) as (files, path):
            data: bytes = files.cat_file(path, start=self.place, end=stop)
        room[: len(data)] = data
        self.place += len(data)
        return len(data)
