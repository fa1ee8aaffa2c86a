"""Local files: a file, a folder or a glob in, one `Document` per file out.

No file is opened here, and none is left out but dot-files: a file that cannot be read, or that lies outside the allowed folder,
is a document too. Its size is -1 and its version is the kind of failure that reading it raises.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from urllib.parse import quote_from_bytes, unquote_to_bytes

from pipeline.records import Document
from pipeline.storage.location import GLOB_CHARACTERS
from pipeline.storage.store import map_ahead

LOCAL_URL = "file://"
MAX_AHEAD = 64
"""Folders whose entries are read before it is their turn: on a mounted file system each call waits for a server."""
Predicate = Callable[[str], bool]
"""A test of an absolute path."""


def make_local_document(path: str, root: str, is_forbidden: Predicate | None = None) -> Document:
    """Return one file with its present size and mtime; a forbidden one is not looked at."""
    source = format_source(path, root)
    try:
        if is_forbidden and is_forbidden(path):
            return Document(source, -1, "outside")
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return Document(source, -1, "vanished")
    except OSError:
        return Document(source, -1, "unreadable")
    if not stat.S_ISREG(found.st_mode):
        return Document(source, -1, "unreadable")
    return Document(source, found.st_size, str(found.st_mtime_ns))


@dataclass(frozen=True, slots=True)
class FolderEntry:
    """What a folder holds under one name."""

    path: str
    is_link: bool = False
    is_folder: bool = True
    """It is entered: a folder, or a link to one that may be followed."""


@dataclass(frozen=True)
class FolderScan:
    """A folder as it was read, without dot-files: names alone, because there may be a million of them."""

    path: str
    identity: tuple[int, int]
    """Device and inode."""
    names: list[str]
    links: frozenset[str]
    folders: frozenset[str]
    """Those that are entered."""

    def list_entries(self) -> Iterator[FolderEntry]:
        """Yield the entries, sorted by name."""
        for name in self.names:
            yield FolderEntry(os.path.join(self.path, name), name in self.links, name in self.folders)


def scan_folder(folder: str, is_forbidden: Predicate | None) -> FolderScan:
    """Read a folder. Raises OSError."""
    found = os.stat(folder)
    names, links, folders = [], set(), set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            names.append(entry.name)
            is_link = entry.is_symlink()
            if is_link:
                links.add(entry.name)
            is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
            if is_folder and not (is_link and is_forbidden and is_forbidden(entry.path)):
                folders.add(entry.name)
    names.sort()
    return FolderScan(folder, (found.st_dev, found.st_ino), names, frozenset(links), frozenset(folders))


def walk_folder(
    top: str, root: str, allow_outside: bool, pool: ThreadPoolExecutor, is_wanted: Predicate | None = None, depth: int | None = None
) -> Iterator[Document]:
    """Yield every file in a folder and at most `depth` levels of folders, each folder once, so that circular links end.

    A link that leads out of `top` is a document (`outside`) and not followed, unless `allow_outside`; a folder that cannot be read
    is a document too (`unreadable`). The pool reads folders and looks at files ahead; their order is that of one after another.
    """
    is_forbidden = None if allow_outside else make_outside_predicate(top)

    def make_document(entry: FolderEntry) -> Document:
        if entry.is_folder:
            return Document(format_source(entry.path, root), -1, "unreadable")
        return make_local_document(entry.path, root, is_forbidden if entry.is_link else None)

    found = walk_entries(top, pool, is_forbidden, depth)
    yield from map_ahead(pool, make_document, (entry for entry in found if entry.is_folder or is_wanted is None or is_wanted(entry.path)))


def walk_entries(top: str, pool: ThreadPoolExecutor, is_forbidden: Predicate | None, depth: int | None) -> Iterator[FolderEntry]:
    """Yield the files below a folder, and the folders that cannot be read."""
    entered: set[tuple[int, int]] = set()
    ahead: dict[str, Future[FolderScan]] = {}
    queue = deque([FolderEntry(top)])
    while queue:
        for following in islice(queue, MAX_AHEAD):
            if len(ahead) < MAX_AHEAD and not following.is_link and following.path not in ahead:
                ahead[following.path] = pool.submit(scan_folder, following.path, is_forbidden)
        folder = queue.popleft()
        try:
            scan = ahead.pop(folder.path).result() if folder.path in ahead else scan_folder(folder.path, is_forbidden)
        except OSError:
            yield folder
            continue
        if scan.identity in entered:
            continue
        entered.add(scan.identity)
        deeper = depth is None or folder.path.count("/") - top.count("/") + 1 < depth
        for entry in scan.list_entries():
            if not entry.is_folder:
                yield entry
            elif deeper:
                # Linked folders come after all real ones, so that a file is listed under its real path.
                queue.append(entry) if entry.is_link else queue.appendleft(entry)


def list_glob(pattern: str, root: str, allow_outside: bool, pool: ThreadPoolExecutor) -> Iterator[Document]:
    """Yield the files that a glob matches; `**` stands for any number of folders. Folders that it matches are not entered.

    The part of the pattern that is the job's folder is taken literally: that name may contain brackets.
    """
    parts = pattern.split("/")
    shared = len(os.path.commonpath([pattern, root]).rstrip("/").split("/"))
    fixed = next(i for i, part in enumerate(parts) if i >= shared and GLOB_CHARACTERS.search(part))
    top, rest = "/".join(parts[:fixed]) or "/", parts[fixed:]
    if not os.path.isdir(top):
        return
    depth = None if "**" in rest else len(rest)
    yield from walk_folder(top, root, allow_outside, pool, lambda path: is_glob_match(path.split("/")[fixed:], rest), depth)


def is_glob_match(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Say whether a path's parts match a glob's."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(is_glob_match(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and is_glob_match(parts[1:], pattern[1:])


def make_absolute(path: str, folder: str) -> str:
    """Return the absolute path of a path or `file://` URL. Links are resolved only in a path that contains `..`."""
    joined = os.path.join(folder, convert_file_url(path))
    return os.path.realpath(joined) if ".." in joined.split("/") and "\0" not in joined else os.path.normpath(joined)


def make_outside_predicate(folder: str) -> Predicate:
    """Return a predicate: whether a path, its links resolved, lies outside a folder. Results are cached per parent folder."""
    limit = os.path.realpath(folder)
    known: dict[str, bool] = {}

    def resolves_outside(path: str) -> bool:
        return os.path.commonpath([os.path.realpath(path), limit]) != limit

    def is_outside(path: str) -> bool:
        if os.path.islink(path):
            return resolves_outside(path)
        parent = os.path.dirname(path)
        if parent not in known:
            known[parent] = resolves_outside(parent)
        return known[parent]

    return is_outside


def format_source(path: str, root: str) -> str:
    """Return the `source` of an absolute path: relative to `root` if inside, a `file://` URL if it is not UTF-8."""
    relative = path[len(root) :].lstrip("/") if path.startswith(root.rstrip("/") + "/") else path
    try:
        relative.encode("utf-8")
    except UnicodeEncodeError:
        return LOCAL_URL + quote_from_bytes(os.fsencode(path))
    return relative


def convert_file_url(path: str) -> str:
    """Return the local path of a `file://` URL; any other path unchanged."""
    return os.fsdecode(unquote_to_bytes(path[len(LOCAL_URL) :])) if path.startswith(LOCAL_URL) else path
