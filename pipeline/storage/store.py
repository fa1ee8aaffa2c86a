"""Store: lists, reads and atomically writes files by name, in a local folder or under a prefix in an object store.

    store = open_store("s3://bucket/out/invoices") / "requests"
    store.put("ab12.parquet", data)        whole or not at all, even if this process is killed meanwhile
    store.list_names(".parquet")           {"ab12.parquet": 4711}

A store holds and pickles its location alone: credentials stay in the environment of the process that uses it (`object_store.py`).
"""

from __future__ import annotations

import errno
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline.errors import RunError
from pipeline.storage.location import Location
from pipeline.storage.object_store import MAX_STREAMS, RangeReader, format_os_error, open_filesystem

MAX_FILES = 4
"""Files of a folder that are read at once."""
WHOLE_BYTES = 4 * 2**20
"""An object up to this size is fetched whole; of a larger one only the ranges that are read."""
ITEMS_PER_TASK = 50
"""Items of `map_ahead` that one task takes: a local file is looked at in less time than a task is handed over."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class Store(Protocol):
    """A folder of files."""

    def __truediv__(self, name: str) -> Store:
        """Return the subfolder with this name."""
        ...

    def __str__(self) -> str: ...

    def list_names(self, suffix: str) -> dict[str, int]:
        """Return the names with this suffix and their sizes in bytes, sorted by name, from one listing.

        A folder that does not exist has no names. Raises RunError.
        """
        ...

    def read(self, name: str) -> bytes:
        """Return a file's bytes. Raises FileNotFoundError or another OSError."""
        ...

    def open_file(self, name: str, size_bytes: int) -> Any:
        """Return a file in a form that pyarrow can open. Raises FileNotFoundError or another OSError."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """Write a file atomically: readers see the old bytes or the new ones, also after a power cut. Raises RunError."""
        ...

    def rename(self, name: str, new: str) -> None:
        """Rename a file if it exists. Raises RunError."""
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Remove files if they exist. Raises RunError."""
        ...

    def create(self) -> None:
        """Create the folder. Raises OSError."""
        ...

    def remove_leftovers(self) -> None:
        """Remove partly written files of writers that have ended. Raises RunError."""
        ...

    def check_writable(self) -> None:
        """Raise OSError if the folder cannot be written to."""
        ...


def open_store(location: Location) -> Store:
    """Return the store at a location."""
    return FolderStore(location) if isinstance(location, Path) else ObjectStore(location)


def map_concurrently(function: Callable[[Item], Result], items: Iterable[Item], streams: int = MAX_STREAMS) -> list[Result]:
    """Return the results of a function for the items, in their order; up to `streams` calls run at once."""
    with ThreadPoolExecutor(streams) as pool:
        return list(pool.map(function, items))


def map_ahead(pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield the results of a function for the items, in their order, while the pool works on those of some hundred items further on."""

    def map_batch(batch: Sequence[Item]) -> list[Result]:
        return [function(item) for item in batch]

    waiting: deque[Future[list[Result]]] = deque()
    remaining = iter(items)
    while batch := list(islice(remaining, ITEMS_PER_TASK)):
        waiting.append(pool.submit(map_batch, batch))
        while waiting and (len(waiting) > 2 * MAX_STREAMS or waiting[0].done()):
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


@contextmanager
def convert_os_errors(action: str) -> Iterator[None]:
    """Convert an OSError to a RunError that names the action."""
    try:
        yield
    except OSError as error:
        raise make_run_error(action, error) from None


def make_run_error(action: str, error: OSError) -> RunError:
    remedy = "free disk space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "fix the cause"
    return RunError(f"cannot {action}: {format_os_error(error)}; {remedy} and run the same command again")


# ---- A local folder -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderStore:
    """A folder on a local or mounted file system. What it writes has the mode 0600, whatever the umask of the process."""

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
                    with suppress(FileNotFoundError):  # removed since the listing
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
            with open(draft, "wb", opener=partial(os.open, mode=0o600)) as out:
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
        """Remove files, after an fsync of the folder, so that the files that replace them survive a power cut."""
        with suppress(OSError):  # some file systems do not support it
            folder = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        for name in names:
            with convert_os_errors(f"remove {self / name}"):
                (self.path / name).unlink(missing_ok=True)

    def create(self) -> None:
        """Create the folder with mode 0700; one that is there keeps its mode."""
        self.path.mkdir(0o700, parents=True, exist_ok=True)

    def remove_leftovers(self) -> None:
        with convert_os_errors(f"clear {self}"):
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)

    def check_writable(self) -> None:
        probe = self.path / f".probe-{os.getpid()}.tmp"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT, 0o600))
        probe.unlink()


# ---- An object store ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectStore:
    """A prefix in an object store. An object appears when its upload is complete; an interrupted upload leaves no object."""

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
            return io.BytesIO(files.cat_file(path, start=0) if size_bytes else b"")  # with `start`: one request, not two

    def put(self, name: str, content: bytes) -> None:
        with convert_os_errors(f"write {self / name}"), open_filesystem(f"{self / name}") as (files, path):
            files.pipe_file(path, content)  # one request up to 100 MB; a larger upload that fails is aborted

    def rename(self, name: str, new: str) -> None:
        """Read, write and remove: a copy within a store may still go on when it is answered, and need other rights."""
        with convert_os_errors(f"rename {self / name}"), suppress(FileNotFoundError), open_filesystem(self.url) as (files, path):
            files.pipe_file(f"{path}/{new}", files.cat_file(f"{path}/{name}"))
            files.rm_file(f"{path}/{name}")

    def remove(self, names: Iterable[str]) -> None:
        def remove_object(name: str) -> None:
            with (
                convert_os_errors(f"remove {self / name}"),
                suppress(FileNotFoundError),
                open_filesystem(f"{self / name}") as (files, path),
            ):
                files.rm_file(path)

        map_concurrently(remove_object, names)

    def create(self) -> None:
        """Do nothing: an object store has no folders."""

    def remove_leftovers(self) -> None:
        """Do nothing: an object is never partly written."""

    def check_writable(self) -> None:
        name = f".probe-{os.getpid()}.tmp"
        with open_filesystem(f"{self / name}") as (files, path):
            files.pipe_file(path, b"-")
            files.rm_file(path)
