"""A place -> what is in it, by name: a folder here, or a prefix in an object store. Knows no Parquet, no job and no document.

    store = at("s3://bucket/out/invoices") / "requests"
    store.put("ab12.parquet", data)        whole or not at all, whatever ends this process meanwhile
    store.names(".parquet")                {"ab12.parquet": 4711}

The one door to fsspec. A store carries its place alone: credentials, region and endpoint are what the environment of the
process that uses it says (AWS_PROFILE, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, …), and travel nowhere.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec

from pipeline.errors import JobError, RunError
from pipeline.place import EXTRAS, Place, has_secret, scheme_of, shown

STREAMS = 16
"""So many requests to an object store are under way at once: each is a wait of 10 to 100 ms, and little work."""
WHOLE_BYTES = 4 * 2**20
"""An object up to this size is fetched in one piece; of a larger one, what is looked at."""
FAMILIES = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
)
"""What the stores' libraries raise beside OSError and ValueError."""
T = TypeVar("T")
R = TypeVar("R")


class Unreachable(OSError):
    """An object store did not do what it was asked; nothing is known of what it holds."""


class Store(Protocol):
    """A folder of named contents."""

    def __truediv__(self, name: str) -> Store:
        """Return the folder of this name within."""
        ...

    def __str__(self) -> str: ...

    def names(self, suffix: str) -> dict[str, int]:
        """Return the names with this ending and their bytes, sorted, from one listing; none where there is no such folder.

        Raises RunError.
        """
        ...

    def read(self, name: str) -> bytes:
        """Return a content whole. Raises FileNotFoundError, or another OSError."""
        ...

    def opened(self, name: str, size_bytes: int) -> Any:
        """Return a content as pyarrow opens it. Raises FileNotFoundError, or another OSError."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """Write a content so that readers, and a power cut, find the old one or the new. Raises RunError."""
        ...

    def rename(self, name: str, new: str) -> None:
        """Give a content another name, if it is there. Raises RunError."""
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Remove contents, if they are there. Raises RunError."""
        ...

    def make(self) -> None:
        """Make the folder. Raises OSError."""
        ...

    def clear(self) -> None:
        """Remove what was left half-written by who writes here no more. Raises RunError."""
        ...

    def probe(self) -> None:
        """Prove that it can be written to. Raises OSError."""
        ...


def at(place: Place) -> Store:
    """Return the store at a place."""
    return Folder(place) if isinstance(place, Path) else Objects(place)


def each(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return what some work makes of each item, in their order, several under way at once."""
    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(work, items))


@contextmanager
def stopping(doing: str) -> Iterator[None]:
    """Turn an OSError into a RunError that names what was being done."""
    try:
        yield
    except OSError as error:
        raise stop(doing, error) from None


def stop(doing: str, error: OSError) -> RunError:
    cure = "free the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "put that right"
    return RunError(f"cannot {doing}: {said(error)}; {cure} and run the same command again")


# ---- A folder here ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """A folder of this machine, or of one that is mounted here."""

    path: Path

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.path / name)

    def __str__(self) -> str:
        return str(self.path)

    def names(self, suffix: str) -> dict[str, int]:
        found = {}
        with stopping(f"list {self}"), suppress(FileNotFoundError), os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.endswith(suffix):
                    with suppress(FileNotFoundError):  # gone meanwhile
                        found[entry.name] = entry.stat().st_size
        return dict(sorted(found.items()))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def opened(self, name: str, size_bytes: int) -> Any:
        return self.path / name

    def put(self, name: str, content: bytes) -> None:
        file = self.path / name
        draft = file.with_name(f".{name}.{os.getpid()}.tmp")
        try:
            with draft.open("wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            draft.replace(file)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise stop(f"write {file}", error) from None

    def rename(self, name: str, new: str) -> None:
        with stopping(f"rename {self / name}"), suppress(FileNotFoundError):
            (self.path / name).rename(self.path / new)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, when those that stand in their place are on the disk by name, too."""
        with suppress(OSError):  # some file systems cannot
            folder = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        for name in names:
            with stopping(f"remove {self / name}"):
                (self.path / name).unlink(missing_ok=True)

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        with stopping(f"clear {self}"):
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)

    def probe(self) -> None:
        probe = self.path / f".probe-{os.getpid()}.tmp"
        probe.write_bytes(b"")
        probe.unlink()


# ---- An object store ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objects:
    """A prefix in an object store. An object appears when its upload is complete; one that is cut leaves nothing to see."""

    url: str

    def __truediv__(self, name: str) -> Objects:
        return Objects(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def names(self, suffix: str) -> dict[str, int]:
        found: list[dict[str, Any]] = []
        with stopping(f"list {self}"), suppress(FileNotFoundError), asking(self.url) as (files, path):
            found = files.ls(path, detail=True)
        names = {info["name"].rpartition("/")[2]: info["size"] for info in found if info["type"] == "file"}
        return {name: names[name] for name in sorted(names) if name.endswith(suffix)}

    def read(self, name: str) -> bytes:
        with asking(f"{self / name}") as (files, path):
            data: bytes = files.cat_file(path)
        return data

    def opened(self, name: str, size_bytes: int) -> io.IOBase:
        if size_bytes > WHOLE_BYTES:
            return Distant(f"{self / name}", size_bytes)
        with asking(f"{self / name}") as (files, path):
            return io.BytesIO(files.cat_file(path, start=0) if size_bytes else b"")  # from its start: one request, not two

    def put(self, name: str, content: bytes) -> None:
        with stopping(f"write {self / name}"), asking(f"{self / name}") as (files, path):
            files.pipe_file(path, content)  # one request up to 100 MB; a larger upload that breaks off is taken back

    def rename(self, name: str, new: str) -> None:
        with stopping(f"rename {self / name}"), suppress(FileNotFoundError), asking(self.url) as (files, path):
            files.cp_file(f"{path}/{name}", f"{path}/{new}")
            files.rm_file(f"{path}/{name}")

    def remove(self, names: Iterable[str]) -> None:
        def one(name: str) -> None:
            with stopping(f"remove {self / name}"), suppress(FileNotFoundError), asking(f"{self / name}") as (files, path):
                files.rm_file(path)

        each(one, names)

    def make(self) -> None:
        """Nothing: folders are but names."""

    def clear(self) -> None:
        """Nothing: no object is half-written."""

    def probe(self) -> None:
        name = f".probe-{os.getpid()}.tmp"
        with asking(f"{self / name}") as (files, path):
            files.pipe_file(path, b"-")
            files.rm_file(path)


class Distant(io.RawIOBase):
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
        with asking(self.url) as (files, path):
            data: bytes = files.cat_file(path, start=self.place, end=stop)
        room[: len(data)] = data
        self.place += len(data)
        return len(data)


@contextmanager
def asking(url: str) -> Iterator[tuple[Any, str]]:
    """Give the file system of a URL and the path in it, and turn what its library raises into OSErrors.

    Never by fsspec's own reading of URLs: that takes `::` in an object's name for a way to another file system. Raises JobError
    where a library is missing or the URL has a secret in it.
    """
    scheme = scheme_of(url)
    need(url)
    try:
        files = fsspec.filesystem(scheme, use_listings_cache=False)
        files.invalidate_cache()
        yield files, files._strip_protocol(f"{scheme}://{url.partition('://')[2]}")
    except (FileNotFoundError, Unreachable):
        raise
    except foreign() as error:
        raise Unreachable(" ".join(said(error).split())[:300]) from None


def need(url: str) -> None:
    """Raise JobError for a URL that cannot be opened here: its library is missing, or it has a secret in it."""
    if has_secret(url):
        raise JobError(f"{shown(url)} has a user or a password in it: the environment holds them, no URL does")
    library, extra = EXTRAS.get(scheme_of(url), ("", ""))
    if library and find_spec(library) is None:
        raise JobError(f"{url} needs the package {library}: pip install 'pipeline[{extra}]'")


def foreign() -> tuple[type[Exception], ...]:
    """Return what the libraries that are in use raise."""
    return (OSError, ValueError, *(getattr(sys.modules[module], name) for module, name in FAMILIES if module in sys.modules))


def said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# ---- Objects by URL -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """An object, as it is listed."""

    url: str
    size_bytes: int
    version: str
    """Its etag, or when it was written: what tells a changed object apart."""


def find(url: str, is_glob: bool = False) -> list[Found]:
    """Return the objects at or below a URL, or matched by it, from one listing. Raises OSError."""
    with asking(url) as (files, path):
        found = files.glob(path, detail=True) if is_glob else files.find(path, detail=True)
        return [seen(files, info) for name, info in found.items() if info["type"] == "file" and not name.endswith("/")]


def look(url: str) -> Found | None:
    """Return the object of exactly this URL, if there is one. Raises OSError."""
    try:
        with asking(url) as (files, path):
            info = files.info(path)
            return seen(files, info) if info["type"] == "file" else None
    except FileNotFoundError:
        return None


def fetch(url: str, size_bytes: int) -> tuple[bytes, str]:
    """Return an object's bytes, at most one more than it is listed with, and the version it had after they were read.

    Raises OSError. Had it been replaced meanwhile, its version would not be the one that was listed.
    """
    with asking(url) as (files, path):
        data = files.cat_file(path, start=0, end=size_bytes + 1) if size_bytes else b""  # of nothing no range can be had
        return data, seen(files, files.info(path)).version


def download(url: str, file: Path) -> None:
    """Copy an object into a file here. Raises OSError."""
    with asking(url) as (files, path):
        files.get_file(path, str(file))


def seen(files: Any, info: dict[str, Any]) -> Found:
    given = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(key)), "")
    version = str(given.timestamp() if isinstance(given, datetime) else given)
    return Found(files.unstrip_protocol(info["name"]), info["size"], version)
