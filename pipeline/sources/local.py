"""A folder, a glob or a file of this machine -> its documents, one each. Knows no job, no manifest and no other file system.

Nothing is opened here and no file is left out but dot-files: what cannot be read, or leads out of where it may lead, is a
document too, whose size is -1 and whose version is the kind of failure that reading it raises.
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


def make_local_document(path: str, root: str, forbidden: Predicate | None = None) -> Document:
    """Return one file as it stands, without looking at it where it is forbidden."""
    source = format_source(path, root)
    try:
        if forbidden and forbidden(path):
            return Document(source, -1, "outside")
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return Document(source, -1, "vanished")
    except OSError:
        return Document(source, -1, "unreadable")
    if not stat.S_ISREG(found.st_mode):
        return Document(source, -1, "unreadable")
    return Document(source, found.st_size, str(found.st_mtime_ns))


def walk_folder(top: str, root: str, allow_outside: bool, wanted: Predicate | None = None, depth: int | None = None) -> Iterator[Document]:
    """Yield every file in a folder and the folders below, each folder once, so that links in a circle end.

    A link that leads out of `top` is a row and not followed, unless that is allowed; so is a folder that cannot be read.
    """
    forbidden = None if allow_outside else make_outside_predicate(top)
    entered: set[tuple[int, int]] = set()
    ahead = deque([top])
    while ahead:
        folder = ahead.popleft()
        try:
            found = os.stat(folder)
            entries = scan_folder(folder) if (found.st_dev, found.st_ino) not in entered else []
        except OSError:
            yield Document(format_source(folder, root), -1, "unreadable")
            continue
        entered.add((found.st_dev, found.st_ino))
        deeper = depth is None or folder.count("/") - top.count("/") + 1 < depth
        for e in entries:
            check = forbidden if e.is_symlink() else None
            is_folder = os.path.isdir(e.path) if e.is_symlink() else e.is_dir()
            if is_folder and not (check and check(e.path)):
                # Links wait behind all real folders, so that a file goes by its real name.
                if deeper:
                    ahead.append(e.path) if e.is_symlink() else ahead.appendleft(e.path)
            elif wanted is None or wanted(e.path):
                yield make_local_document(e.path, root, check)


def scan_folder(folder: str) -> list[os.DirEntry[str]]:
    """Return what stands in a folder, dot-files left out."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def list_glob(pattern: str, root: str, allow_outside: bool) -> Iterator[Document]:
    """Yield the files that a glob matches; `**` stands for any folders. Folders that it matches are not entered.

    What it shares with the job's folder is meant as it stands: that may have brackets in its name.
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
    """Return the absolute path of a path or `file://` URL. Only `..` makes the links before it be resolved."""
    joined = os.path.join(folder, convert_file_url(path))
    return os.path.realpath(joined) if ".." in joined.split("/") and "\0" not in joined else os.path.normpath(joined)


def make_outside_predicate(folder: str) -> Predicate:
    """Return what says whether a path's real place is outside a folder."""
    limit = os.path.realpath(folder)
    known: dict[str, bool] = {}

    def is_out(path: str) -> bool:
        return os.path.commonpath([os.path.realpath(path), limit]) != limit

    def forbidden(path: str) -> bool:
        if os.path.islink(path):
            return is_out(path)
        parent = os.path.dirname(path)
        if parent not in known:
            known[parent] = is_out(parent)
        return known[parent]

    return forbidden


def format_source(path: str, root: str) -> str:
    """Return the `source` text of an absolute path."""
    inside = path[len(root) :].lstrip("/") if path.startswith(root.rstrip("/") + "/") else path
    try:
        inside.encode("utf-8")
    except UnicodeEncodeError:
        return LOCAL_URL + quote_from_bytes(os.fsencode(path))
    return inside


def convert_file_url(path: str) -> str:
    """Return the local path that a `file://` URL stands for; any other path as it is."""
    return os.fsdecode(unquote_to_bytes(path[len(LOCAL_URL) :])) if path.startswith(LOCAL_URL) else path
