"""A place -> what is in it, by name: a folder here, or a prefix in an object store. Knows no Parquet, no job and no document.

    store = at("s3://bucket/out/invoices") / "requests"
    store.put("ab12.parquet", data)        whole or not at all, whatever ends this process meanwhile
    store.list_names(".parquet")                {"ab12.parquet": 4711}

A store carries its place alone: what opens an object store is in the environment of the process that uses it (`objects.py`).
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline.errors import RunError
from pipeline.storage.location import Location
from pipeline.storage.object_store import RangeReader, format_os_error, open_filesystem

MAX_STREAMS = 16
"""So many requests to an object store are under way at once: each is a wait of 10 to 100 ms, and little work."""
WHOLE_BYTES = 4 * 2**20
"""An object up to this size is fetched in one piece; of a larger one, what is looked at."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class Store(Protocol):
    """A folder of named contents."""

    def __truediv__(self, name: str) -> Store:
        """Return the folder of this name within."""
        ...

    def __str__(self) -> str: ...

    def list_names(self, suffix: str) -> dict[str, int]:
        """Return the names with this ending and their bytes, sorted, from one listing; none where there is no such folder.

        Raises RunError.
        """
        ...

    def read(self, name: str) -> bytes:
        """Return a content whole. Raises FileNotFoundError, or another OSError."""
        ...

    def open_file(self, name: str, size_bytes: int) -> Any:
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

    def create(self) -> None:
        """Make the folder. Raises OSError."""
        ...

    def remove_leftovers(self) -> None:
        """Remove what was left half-written by who writes here no more. Raises RunError."""
        ...

    def check_writable(self) -> None:
        """Prove that it can be written to. Raises OSError."""
        ...


def open_store(place: Location) -> Store:
    """Return the store at a place."""
    return FolderStore(place) if isinstance(place, Path) else ObjectStore(place)


def map_concurrently(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return what some work makes of each item, in their order, several under way at once."""
    with ThreadPoolExecutor(MAX_STREAMS) as pool:
        return list(pool.map(work, items))


@contextmanager
def convert_os_errors(doing: str) -> Iterator[None]:
    """Turn an OSError into a RunError that names what was being done."""
    try:
        yield
    except OSError as error:
        raise make_run_error(doing, error) from None


def make_run_error(doing: str, error: OSError) -> RunError:
    cure = "free the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "put that right"
    return RunError(f"cannot {doing}: {format_os_error(error)}; {cure} and run the same command again")


# ---- A folder here ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderStore:
    """A folder of this machine, or of one that is mounted here."""

    path: Path

    def __truediv__(self, name: str) -> FolderStore:
        return FolderStore(self.path / name)

    def __str__(self) -> str:
        return str(self.path)

    def list_names(self, suffix: str) -> dict[str, int]:
        found = {}
        with convert_os_errors(f"list {self}"), suppress(FileNotFoundError), os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.endswith(suffix):
                    with suppress(FileNotFoundError):  # gone meanwhile
                        found[entry.name] = entry.stat().st_size
        return dict(sorted(found.items()))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def open_file(self, name: str, size_bytes: int) -> Any:
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
            raise make_run_error(f"write {file}", error) from None

    def rename(self, name: str, new: str) -> None:
        with convert_os_errors(f"rename {self / name}"), suppress(FileNotFoundError):
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
            with convert_os_errors(f"remove {self / name}"):
                (self.path / name).unlink(missing_ok=True)

    def create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def remove_leftovers(self) -> None:
        with convert_os_errors(f"clear {self}"):
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)

    def check_writable(self) -> None:
        probe = self.path / f".probe-{os.getpid()}.tmp"
        probe.write_bytes(b"")
        probe.unlink()


# ---- An object store ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectStore:
    """A prefix in an object store. An object appears when its upload is complete; one that is cut leaves nothing to see."""

    url: str

    def __truediv__(self, name: str) -> ObjectStore:
        return ObjectStore(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def list_names(self, suffix: str) -> dict[str, int]:
        found: list[dict[str, Any]] = []
        with convert_os_errors(f"list {self}"), suppress(FileNotFoundError), open_filesystem(self.url) as (files, path):
            found = files.ls(path, detail=True)
        names = {info["name"].rpartition("/")[2]: info["size"] for info in found if info["type"] == "file"}
        return {name: names[name] for name in sorted(names) if name.endswith(suffix)}

    def read(self, name: str) -> bytes:
        with open_filesystem(f"{self / name}") as (files, path):
            data: bytes = files.cat_file(path)
        return data

    def open_file(self, name: str, size_bytes: int) -> io.IOBase:
        if size_bytes > WHOLE_BYTES:
            return RangeReader(f"{self / name}", size_bytes)
        with open_filesystem(f"{self / name}") as (files, path):
            return io.BytesIO(files.cat_file(path, start=0) if size_bytes else b"")  # from its start: one request, not two

    def put(self, name: str, content: bytes) -> None:
        with convert_os_errors(f"write {self / name}"), open_filesystem(f"{self / name}") as (files, path):
            files.pipe_file(path, content)  # one request up to 100 MB; a larger upload that breaks off is taken back

    def rename(self, name: str, new: str) -> None:
        with convert_os_errors(f"rename {self / name}"), suppress(FileNotFoundError), open_filesystem(self.url) as (files, path):
            files.cp_file(f"{path}/{name}", f"{path}/{new}")
            files.rm_file(f"{path}/{name}")

    def remove(self, names: Iterable[str]) -> None:
        def one(name: str) -> None:
            with (
                convert_os_errors(f"remove {self / name}"),
                suppress(FileNotFoundError),
                open_filesystem(f"{self / name}") as (files, path),
            ):
                files.rm_file(path)

        map_concurrently(one, names)

    def create(self) -> None:
        """Nothing: folders are but names."""

    def remove_leftovers(self) -> None:
        """Nothing: no object is half-written."""

    def check_writable(self) -> None:
        name = f".probe-{os.getpid()}.tmp"
        with open_filesystem(f"{self / name}") as (files, path):
            files.pipe_file(path, b"-")
            files.rm_file(path)
