"""Sources: the listing of the input documents, and the bytes of each.

`find_documents` takes the paths of a job and returns a table with one row per document; a `DocumentSearch` finds them in threads of its
own and returns at any time those found so far. `read_document` takes one of these rows and returns the document's bytes; the format of a
document is not looked at here.

    find_documents(["scans", "sent/**/*.pdf", "list.csv"], root)

    source                size_bytes  version               customer
    list/a.pdf                 70123  1760000000000000000   ACME
    scans/2024/b.tif         1800000  1760000000000000000   null
    scans/gone.pdf                -1  vanished              null
    https://example.com/c.pdf   null                        null

Every file that the job, a folder or a manifest names is one row. A file that cannot be read is a row too: its size is -1
and its version is the kind of failure that `read_document` will raise. Dot-files are left out unless the job or a manifest
names them. An http(s) URL is one file, and no request is sent before it is read: its size is null.

The query of a URL may be a signature: `source` has a digest of it, and the URL is in `full_url`, unless the job says `keep_query`.
A URL that was signed again has the same `source`; two URLs of one listing never have.

`source` is the path relative to the job's folder, or absolute if it is outside, and does not depend on the working directory
of a run. A name that is not UTF-8 becomes a `file://` URL of percent-encoded bytes, which cannot collide with another name.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DocumentError, JobError, SourceError
from pipeline.records import Document
from pipeline.sources import http, manifest
from pipeline.sources.local import (
    Predicate,
    list_glob,
    make_absolute,
    make_local_document,
    make_outside_predicate,
    walk_folder,
)
from pipeline.storage import listing, location, object_store
from pipeline.storage.location import GLOB_CHARACTERS
from pipeline.storage.store import map_ahead

LISTING_COLUMNS = pa.schema([("source", pa.string()), ("size_bytes", pa.int64()), ("version", pa.string())])
BATCH_ROWS = 10_000
"""Documents that are Python objects before they are rows."""
LISTING_THREAD = "listing"
"""What the names of the threads that list begin with."""
PROGRESS_S = 0.2
"""How often it is said how many documents have been found."""
OnFound = Callable[[int], None]
KnownObjects = Mapping[str, tuple[int, str]]
"""Size and version of objects, by URL."""
FULL_URL = pa.field("full_url", pa.string())
REMOTE_URL = re.compile(r"(?!file://)([A-Za-z][A-Za-z0-9+.-]*)(://|::)")
OBJECT_STORE_SCHEMES = (*location.STORE_PACKAGES, "memory")
UNREADABLE_REASONS = {
    "vanished": "there is no such file",
    "unreadable": "it is no readable regular file",
    "outside": "it leads out of the folder that names it; `source.allow_outside: true` lets it in",
    "refused": "it has a user or a password in it, which are not used and not kept",
}


def find_documents(
    paths: Sequence[str],
    root: Path,
    *,
    allow_outside: bool = False,
    keep_query: bool = False,
    known: KnownObjects | None = None,
    on_found: OnFound = lambda _: None,
) -> pa.Table:
    """Return every document that the paths name, one row each, sorted by `source`, as a `DocumentSearch` finds them.

    `on_found` is called in this thread, with the number of documents so far, and a last time with that of the table. Raises SourceError.
    """
    with closing(DocumentSearch(paths, root, allow_outside=allow_outside, keep_query=keep_query, known=known)) as search:
        while not search.wait(PROGRESS_S):
            on_found(search.count)
        table = search.make_table()
    on_found(table.num_rows)
    return table


def read_document(document: Document, root: Path, max_bytes: int, policy: http.DownloadPolicy = http.PUBLIC_ONLY) -> bytes:
    """Return the bytes of a document, unchanged since it was listed; those of an http(s) URL as its server sends them now.

    Raises DocumentError: a kind of `UNREADABLE_REASONS`, `too_large`, `changed`, or what `http.fetch_url` raises.
    """
    if document.size_bytes is None:
        return http.fetch_url(document.full_url or document.source, max_bytes, policy)
    if document.size_bytes < 0:
        raise DocumentError(document.version, f"{document.source} cannot be read: {UNREADABLE_REASONS[document.version]}")
    if document.size_bytes > max_bytes:
        allowed = f"`limits.max_file_mib` allows {max_bytes / 2**20:g} MiB"
        raise DocumentError("too_large", f"{document.source} has {document.size_bytes} bytes; {allowed}")
    try:
        if REMOTE_URL.match(document.source):
            return check_unchanged(document, *object_store.fetch_object(document.source, document.size_bytes))
        return read_local_file(document, root, document.size_bytes + 1)  # one byte more than listed: a file that has grown is noticed
    except (FileNotFoundError, NotADirectoryError):
        raise DocumentError("vanished", f"{document.source} was there when it was listed and is gone") from None
    except OSError as error:
        raise DocumentError("unreadable", f"{document.source} cannot be read: {error.strerror or error}") from None


# ---- Listing -------------------------------------------------------------------------------------------------------


class DocumentSearch:
    """The documents that paths name, found by threads of its own, side by side; those found so far at any time."""

    def __init__(
        self,
        paths: Sequence[str],
        root: Path,
        *,
        allow_outside: bool = False,
        keep_query: bool = False,
        known: KnownObjects | None = None,
    ) -> None:
        """Check the paths, read the manifests among them, and begin; relative paths start at `root`.

        Objects of a manifest that are `known` are not looked for. Raises SourceError when a path cannot be read.
        """
        self.keep_query = keep_query
        self.requests, self.listings = (ThreadPoolExecutor(object_store.MAX_STREAMS, LISTING_THREAD) for _ in range(2))
        try:
            scope = ListingScope(os.path.realpath(root), allow_outside, known or {}, self.requests)
            self.paths = [PathListing.open_path(path, scope) for path in paths]
            self.running = [self.listings.submit(one.list_all) for one in self.paths]
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        """Documents found so far, each as often as it was found."""
        return sum(one.count for one in self.paths)

    def wait(self, timeout_s: float) -> bool:
        """Say whether all documents are found; wait for that no longer than this.

        Raises SourceError when a path that the job itself names cannot be listed or names no file.
        """
        unfinished = wait(self.running, timeout_s, FIRST_EXCEPTION).not_done
        for one in self.running:
            if one.done():
                one.result()
        return not unfinished

    def make_table(self) -> pa.Table:
        """Return the documents found so far, one row each, sorted by `source`, with the columns of all manifests.

        Where a manifest names two signatures of one URL, their names may change when the second is found. Raises SourceError.
        """
        try:
            table = pa.concat_tables([LISTING_COLUMNS.empty_table(), *(one.make_table() for one in self.paths)], promote_options="default")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise SourceError(f"the manifests give a column different types: {error}") from None
        table = drop_duplicate_sources(table.combine_chunks().sort_by("source"))
        return table.append_column(FULL_URL, pa.nulls(table.num_rows, pa.string())) if self.keep_query else hide_queries(table)

    def close(self) -> None:
        """End the threads, each at its next request."""
        self.requests.shutdown(wait=False)
        self.listings.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class ListingScope:
    """What all paths of a job are listed with."""

    root: str
    allow_outside: bool
    known: KnownObjects
    requests: ThreadPoolExecutor
    """Does what waits for a file system or a store."""


@dataclass
class PathListing:
    """One path of the job (a file, a folder, a manifest, a glob or a URL) and its documents, which are listed when they are asked for."""

    path: str
    documents: Iterable[Document]
    extras: Mapping[str, pa.Array] = field(default_factory=dict)
    """A manifest's other columns."""
    batches: list[pa.Table] = field(default_factory=list)
    recent: list[Document] = field(default_factory=list)
    """Found since the last batch."""
    count: int = 0
    """Documents found so far."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open_path(cls, path: str, scope: ListingScope) -> PathListing:
        """Check a path, and read it if it is a manifest. Raises SourceError."""
        if http.is_http_url(path):
            return cls(path, [make_url_document(path)])
        if REMOTE_URL.match(path):
            check_url_scheme(path)
            return cls(path, list_remote_objects(path, scope.requests))
        full = make_absolute(os.path.expanduser(path), scope.root)
        try:
            mode = os.stat(full).st_mode
        except FileNotFoundError:
            if GLOB_CHARACTERS.search(path):
                return cls(path, list_glob(full, scope.root, scope.allow_outside, scope.requests))
            raise SourceError(f"source {path!r} does not exist (looked for {full})") from None
        except (OSError, ValueError) as error:
            raise SourceError(f"source {path!r} cannot be read: {error}") from None
        if not os.access(full, os.R_OK) or not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise SourceError(f"source {path!r} cannot be read: it is not a readable file or folder")
        if stat.S_ISDIR(mode):
            return cls(path, walk_folder(full, scope.root, scope.allow_outside, scope.requests))
        if manifest.find_suffix(full) not in manifest.READERS:
            return cls(path, [make_local_document(full, scope.root)])
        names, columns = manifest.read_manifest(full)
        return cls(path, list_manifest_entries(names, os.path.dirname(full), scope), columns)

    def list_all(self) -> None:
        """List the documents. Raises SourceError when there is none."""
        for document in self.documents:
            self.recent.append(document)
            self.count += 1
            if len(self.recent) == BATCH_ROWS:
                with self.lock:
                    self.batches.append(make_listing_batch(self.recent))
                    self.recent = []
        if not self.count:
            raise SourceError(f"source {self.path!r} holds no files")

    def make_table(self) -> pa.Table:
        """Return the documents found so far as a table with a manifest's extra columns."""
        with self.lock:
            table = pa.concat_tables([*self.batches, make_listing_batch(self.recent[:])])
        for name, values in self.extras.items():
            table = table.append_column(name, values[: table.num_rows])
        return table


def make_listing_batch(documents: Sequence[Document]) -> pa.Table:
    """Return documents as a table, without a manifest's columns."""
    rows = [[getattr(one, field.name) for one in documents] for field in LISTING_COLUMNS]
    return pa.table([pa.array(column, field.type) for column, field in zip(rows, LISTING_COLUMNS, strict=True)], LISTING_COLUMNS)


def list_manifest_entries(names: Sequence[str], folder: str, scope: ListingScope) -> Iterator[Document]:
    """Return the documents that a manifest in `folder` names, in its order."""
    is_forbidden = None if scope.allow_outside else make_outside_predicate(folder)
    return map_ahead(scope.requests, lambda name: make_manifest_entry(name, folder, scope, is_forbidden), names)


def make_manifest_entry(name: str, folder: str, scope: ListingScope, is_forbidden: Predicate | None) -> Document:
    """Return the document that a manifest in `folder` lists; an object costs a request.

    An http(s) URL is not checked here: `read_document` refuses a bad one.
    """
    if http.is_http_url(name):
        return Document(http.format_listed_url(name), None, "")
    if not REMOTE_URL.match(name):
        return make_local_document(make_absolute(name, folder), scope.root, is_forbidden)
    if location.has_secret(name):
        return Document(location.redact_url(name), -1, "refused")
    if is_forbidden:
        return Document(name.encode("utf-8", "backslashreplace").decode("utf-8"), -1, "outside")
    if name in scope.known:
        return Document(name, *scope.known[name])
    check_url_scheme(name)
    with name_store_errors(name):
        found = object_store.find_object(name)
    return Document(found.url, found.size_bytes, found.version) if found else Document(name, -1, "vanished")


def drop_duplicate_sources(table: pa.Table) -> pa.Table:
    """Return a sorted table with one row per source, one with values in a manifest's columns if there is one.

    Raises SourceError when two rows of one source have different values in them.
    """
    if not pc.any(pc.equal(table["source"][1:], table["source"][:-1])).as_py():
        return table
    names = table["source"].to_pylist()
    first = {name: row for row, name in reversed(list(enumerate(names)))}
    extras = table.drop_columns(LISTING_COLUMNS.names)
    repeated = {name for name, count in Counter(names).items() if count > 1} if extras.column_names else set()
    rows = [row for row, name in enumerate(names) if name in repeated]
    known: dict[str, dict[str, Any]] = {}
    for row, values in zip(rows, extras.take(pa.array(rows, pa.int64())).to_pylist() if rows else [], strict=True):
        present = {key: value for key, value in values.items() if value is not None}
        if present and known.setdefault(names[row], present) != present:
            name = http.redact_query(names[row]) if http.is_http_url(names[row]) else names[row]
            raise SourceError(f"{name} is listed twice, with different columns: {known[names[row]]} and {present}")
        if present is known.get(names[row]):
            first[names[row]] = row
    return table.take(pa.array(sorted(first.values()), pa.int64()))


def hide_queries(table: pa.Table) -> pa.Table:
    """Return a listing with a digest in place of the query of each http(s) URL, and the URL itself in `full_url`; sorted by `source`."""
    if not pc.any(pc.match_substring(table["source"], "?")).as_py():
        return table.append_column(FULL_URL, pa.nulls(table.num_rows, pa.string()))
    names = table["source"].to_pylist()
    urls = [name if http.is_http_url(name) and "?" in name else None for name in names]
    shown = [http.name_url(url) if url else name for name, url in zip(names, urls, strict=True)]
    count = Counter(name for name, url in zip(shown, urls, strict=True) if url)
    # Two signatures under one name: each URL of a listing has its row, so here the signature is part of the name.
    shown = [
        http.name_url(url, is_signature_named=True) if url and count[name] > 1 else name for name, url in zip(shown, urls, strict=True)
    ]
    place = table.schema.get_field_index("source")
    table = table.set_column(place, "source", pa.array(shown, pa.string())).append_column(FULL_URL, pa.array(urls, pa.string()))
    return table.sort_by("source") if count else table


# ---- Reading local files -------------------------------------------------------------------------------------------


def read_local_file(document: Document, root: Path, max_bytes: int) -> bytes:
    """Return at most `max_bytes` of a local file. Does not block if the file has become a pipe or a device."""
    path = make_absolute(document.source, os.path.realpath(root))
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(UNREADABLE_REASONS["unreadable"])
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
        data = file.read(max_bytes)
        found = os.fstat(file.fileno())
    return check_unchanged(document, data, str(found.st_mtime_ns))


def check_unchanged(document: Document, data: bytes, version: str) -> bytes:
    """Return the bytes if size and version are as listed; raise DocumentError `changed` otherwise."""
    if len(data) != document.size_bytes or version != document.version:
        raise DocumentError("changed", f"{document.source} changed since it was listed; run again to read it as it is")
    return data


# ---- URLs and object stores ----------------------------------------------------------------------------------------


def make_url_document(url: str) -> Document:
    """Return the document of an http(s) URL of the job; no request is sent. Raises SourceError for a URL that cannot be fetched."""
    name = http.format_listed_url(url)
    try:
        http.parse_http_url(name)
    except DocumentError as error:
        raise SourceError(f"source {http.redact_query(url)!r} cannot be fetched: {error}") from None
    return Document(name, None, "")


def list_remote_objects(url: str, requests: ThreadPoolExecutor) -> Iterator[Document]:
    """Yield the objects at, below or matched by an object store's URL, without dot-files. Raises SourceError."""
    is_glob = GLOB_CHARACTERS.search(url) is not None
    with name_store_errors(url):
        for found in chain.from_iterable(listing.iterate_objects(url, is_glob, requests)):
            below = found.url.partition(url.rstrip("/") + "/")[2]
            if is_glob or not any(part.startswith(".") for part in below.split("/")):
                yield Document(found.url, found.size_bytes, found.version)


def check_url_scheme(url: str) -> None:
    """Raise SourceError for a URL whose scheme is not an object store's."""
    if location.parse_scheme(url) not in OBJECT_STORE_SCHEMES:
        allowed = ", ".join(f"{scheme}://" for scheme in ("file", *http.HTTP_PORTS, *OBJECT_STORE_SCHEMES))
        raise SourceError(f"source {location.redact_url(url)!r} cannot be read; allowed are paths and URLs that begin with {allowed}")


@contextmanager
def name_store_errors(url: str) -> Iterator[None]:
    """Convert a JobError or OSError to a SourceError that names the URL."""
    try:
        yield
    except JobError as error:
        raise SourceError(f"source {location.redact_url(url)!r} cannot be listed: {error}") from None
    except OSError as error:
        raise SourceError(f"source {location.redact_url(url)!r} cannot be listed: {object_store.format_os_error(error)}") from None
