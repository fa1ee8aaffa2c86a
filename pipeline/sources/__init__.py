"""Sources: the listing of the input documents, and the bytes of each.

`find_documents` takes the paths of a job and returns a table with one row per document. `read_document` takes one of these rows
and returns the document's bytes; the format of a document is not looked at here.

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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import DocumentError, JobError, SourceError
from pipeline.records import Document
from pipeline.sources import http, manifest
from pipeline.sources.local import (
    GLOB_CHARACTERS,
    Predicate,
    list_glob,
    make_absolute,
    make_local_document,
    make_outside_predicate,
    walk_folder,
)
from pipeline.storage import location, object_store

LISTING_COLUMNS = pa.schema([("source", pa.string()), ("size_bytes", pa.int64()), ("version", pa.string())])
FULL_URL = pa.field("full_url", pa.string())
REMOTE_URL = re.compile(r"(?!file://)([A-Za-z][A-Za-z0-9+.-]*)(://|::)")
OBJECT_STORE_SCHEMES = (*location.STORE_PACKAGES, "memory")
UNREADABLE_REASONS = {
    "vanished": "there is no such file",
    "unreadable": "it is no readable regular file",
    "outside": "it leads out of the folder that names it; `source.allow_outside: true` lets it in",
    "refused": "it has a user or a password in it, which are not used and not kept",
}


def find_documents(paths: Sequence[str], root: Path, *, allow_outside: bool = False, keep_query: bool = False) -> pa.Table:
    """Return every document that the paths name, one row each, sorted by `source`; relative paths start at `root`.

    Raises SourceError when a path that the job itself names cannot be read or names no file.
    """
    real_root = os.path.realpath(root)
    tables = [list_path(path, real_root, allow_outside) for path in paths]
    try:
        table = pa.concat_tables([LISTING_COLUMNS.empty_table(), *tables], promote_options="default")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SourceError(f"the manifests give a column different types: {error}") from None
    table = drop_duplicate_sources(table.combine_chunks().sort_by("source"))
    return table.append_column(FULL_URL, pa.nulls(table.num_rows, pa.string())) if keep_query else hide_queries(table)


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


def list_path(path: str, root: str, allow_outside: bool) -> pa.Table:
    """Return the documents of one path of the job: a file, a folder, a manifest, a glob or a URL. Raises SourceError."""
    if http.is_http_url(path):
        return make_document_table(path, [make_url_document(path)])
    if REMOTE_URL.match(path):
        return make_document_table(path, list_remote_objects(path))
    full = make_absolute(os.path.expanduser(path), root)
    try:
        mode = os.stat(full).st_mode
    except FileNotFoundError:
        if GLOB_CHARACTERS.search(path):
            return make_document_table(path, list_glob(full, root, allow_outside))
        raise SourceError(f"source {path!r} does not exist (looked for {full})") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"source {path!r} cannot be read: {error}") from None
    if not os.access(full, os.R_OK) or not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise SourceError(f"source {path!r} cannot be read: it is not a readable file or folder")
    if stat.S_ISDIR(mode):
        return make_document_table(path, walk_folder(full, root, allow_outside))
    if manifest.find_suffix(full) not in manifest.READERS:
        return make_document_table(path, [make_local_document(full, root)])
    names, columns = manifest.read_manifest(full)
    folder = os.path.dirname(full)
    is_forbidden = None if allow_outside else make_outside_predicate(folder)
    return make_document_table(path, (make_manifest_entry(name, folder, root, is_forbidden) for name in names), columns)


def make_manifest_entry(name: str, folder: str, root: str, is_forbidden: Predicate | None) -> Document:
    """Return the document that a manifest in `folder` lists. An http(s) URL is not checked here: `read_document` refuses a bad one."""
    if http.is_http_url(name):
        return Document(http.format_listed_url(name), None, "")
    if not REMOTE_URL.match(name):
        return make_local_document(make_absolute(name, folder), root, is_forbidden)
    if location.has_secret(name):
        return Document(location.redact_url(name), -1, "refused")
    if is_forbidden:
        return Document(name.encode("utf-8", "backslashreplace").decode("utf-8"), -1, "outside")
    check_url_scheme(name)
    found = call_store(object_store.find_object, name)
    return Document(found.url, found.size_bytes, found.version) if found else Document(name, -1, "vanished")


def make_document_table(path: str, documents: Iterable[Document], extras: Mapping[str, pa.Array] | None = None) -> pa.Table:
    """Return documents as a table with a manifest's extra columns. Raises SourceError when there is none."""
    rows = [(d.source, d.size_bytes, d.version) for d in documents]
    if not rows:
        raise SourceError(f"source {path!r} holds no files")
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), LISTING_COLUMNS, strict=True)]
    table = pa.table(columns, schema=LISTING_COLUMNS)
    for name, values in (extras or {}).items():
        table = table.append_column(name, values)
    return table


def drop_duplicate_sources(table: pa.Table) -> pa.Table:
    """Return a sorted table with one row per source, one with values in a manifest's columns if there is one.

    Raises SourceError when two rows of one source have different values in them.
    """
    names = table["source"].to_pylist()
    first = {name: row for row, name in reversed(list(enumerate(names)))}
    if len(first) == len(names):
        return table
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


def list_remote_objects(url: str) -> Iterator[Document]:
    """Yield the objects at, below or matched by an object store's URL, without dot-files. Raises SourceError."""
    check_url_scheme(url)
    is_glob = GLOB_CHARACTERS.search(url) is not None
    for found in call_store(object_store.list_objects, url, is_glob):
        below = found.url.partition(url.rstrip("/") + "/")[2]
        if is_glob or not any(part.startswith(".") for part in below.split("/")):
            yield Document(found.url, found.size_bytes, found.version)


def check_url_scheme(url: str) -> None:
    """Raise SourceError for a URL whose scheme is not an object store's."""
    if location.parse_scheme(url) not in OBJECT_STORE_SCHEMES:
        allowed = ", ".join(f"{scheme}://" for scheme in ("file", *http.HTTP_PORTS, *OBJECT_STORE_SCHEMES))
        raise SourceError(f"source {location.redact_url(url)!r} cannot be read; allowed are paths and URLs that begin with {allowed}")


def call_store(function: Callable[..., Any], url: str, *arguments: object) -> Any:
    """Return `function(url, *arguments)`, its JobError and OSError turned into a SourceError."""
    try:
        return function(url, *arguments)
    except JobError as error:
        raise SourceError(f"source {location.redact_url(url)!r} cannot be listed: {error}") from None
    except OSError as error:
        raise SourceError(f"source {location.redact_url(url)!r} cannot be listed: {object_store.format_os_error(error)}") from None
