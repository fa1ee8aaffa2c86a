"""Local files: a file, a folder or a glob in, one `Document` per file out.

No file is opened here, and none is left out but dot-files: a file that cannot be read, or that lies outside the allowed folder,
is a document too. Its size is -1 and its version is the kind of failure that reading it raises.
"""

from __future__ import annotations

import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from urllib.parse import quote_from_bytes, unquote_to_bytes

from pipeline.records import Document

GLOB_CHARACTERS = re.compile(r"[*?\[]")
LOCAL_URL = "file://"
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


def walk_folder(
    top: str, root: str, allow_outside: bool, is_wanted: Predicate | None = None, depth: int | None = None
) -> Iterator[Document]:
    """Yield every file in a folder and at most `depth` levels of folders, each folder once, so that circular links end.

    A link that leads out of `top` is a document (`outside`) and not followed, unless `allow_outside`; a folder that cannot be read
    is a document too (`unreadable`).
    """
    is_forbidden = None if allow_outside else make_outside_predicate(top)
    entered: set[tuple[int, int]] = set()
    queue = deque([top])
    while queue:
        folder = queue.popleft()
        try:
            found = os.stat(folder)
            entries = scan_folder(folder) if (found.st_dev, found.st_ino) not in entered else []
        except OSError:
            yield Document(format_source(folder, root), -1, "unreadable")
            continue
        entered.add((found.st_dev, found.st_ino))
        deeper = depth is None or folder.count("/") - top.count("/") + 1 < depth
        for entry in entries:
            check = is_forbidden if entry.is_symlink() else None
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            if is_folder and not (check and check(entry.path)):
                # Linked folders come after all real ones, so that a file is listed under its real path.
                if deeper:
                    queue.append(entry.path) if entry.is_symlink() else queue.appendleft(entry.path)
            elif is_wanted is None or is_wanted(entry.path):
                yield make_local_document(entry.path, root, check)


def scan_folder(folder: str) -> list[os.DirEntry[str]]:
    """Return a folder's entries sorted by name, without dot-files."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def list_glob(pattern: str, root: str, allow_outside: bool) -> Iterator[Document]:
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
    yield from walk_folder(top, root, allow_outside, lambda path: is_glob_match(path.split("/")[fixed:], rest), depth)


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
