"""Object store listing: the URL of an object, a prefix or a glob in, its objects out, a page at a time.

A store returns at most a thousand keys a request, and only the end of one page says where the next begins. So a long listing is split at
its folders (the common prefixes that a store returns for the delimiter "/"), and pages of several folders are requested at the same time:

    scans/                    the first page is complete: that is all. Else it is opened, asked for its own files and folders:
    scans/2024/ scans/2025/   opened likewise, until there are enough folders for all connections
    scans/2024/01/ …          listed with everything below them
    scans/2024/0 …            of very many small folders, those whose names begin alike are listed together

A listing of n pages in one row takes at most 2 n requests and some hundred more this way.
"""

from __future__ import annotations

import errno
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from fsspec.asyn import sync
from fsspec.utils import glob_translate

from pipeline.storage.location import GLOB_CHARACTERS, parse_scheme
from pipeline.storage.object_store import MAX_STREAMS, StoredObject, find_object, make_stored_object, open_filesystem

PAGE_KEYS = 1000
"""What every store allows a page."""
MAX_OPENED = 64
"""Folders that are asked for their folders: some times `MAX_STREAMS`, because they are of different sizes."""
MAX_GROUPS = 256
"""Listings that all folders become which are not opened."""
AZURE_FOLDER_MARKS = {"is_directory": "true", "hdi_isfolder": "true"}
"""Metadata of the empty blobs that stand for folders in accounts with a hierarchical namespace."""


@dataclass(frozen=True)
class StoredKey:
    """An object within its bucket."""

    key: str
    size_bytes: int
    version: str


@dataclass(frozen=True)
class KeyPage:
    """The answer to one listing request: objects, folders (ending with "/") and what the next request begins from."""

    keys: list[StoredKey]
    folders: list[str]
    next_page: Any


@dataclass(frozen=True)
class ListedPrefix:
    """A prefix that is listed, up to a page of it."""

    prefix: str
    is_opened: bool = False
    """Its folders are listed apart."""
    is_probe: bool = False
    """Its first page decides whether it is opened."""
    min_depth: int = 0
    """Slashes in a key below which it belongs to another part."""
    next_page: Any = None
    folders: list[str] = field(default_factory=list)


PageReader = Callable[[ListedPrefix], KeyPage]


@dataclass(frozen=True)
class KeySelection:
    """Which keys of a bucket are wanted: those that begin with a prefix, and match a glob if there is one."""

    prefix: str
    levels: tuple[re.Pattern[str], ...] = ()
    """Patterns of the glob's first part, first two parts, and so on; empty where every folder is entered."""
    pattern: re.Pattern[str] | None = None

    @classmethod
    def for_glob(cls, glob: str) -> KeySelection:
        """Return the selection of a glob; `**` stands for any number of folders. Raises ValueError."""
        parts = glob.split("/")
        start = GLOB_CHARACTERS.search(glob)
        heads = [] if "**" in parts else ["/".join(parts[:count]) for count in range(1, len(parts))]
        levels = tuple(re.compile(glob_translate(head)) for head in heads)
        return cls(glob[: start.start()] if start else glob, levels, re.compile(glob_translate(glob)))

    @property
    def enters_all(self) -> bool:
        return self.pattern is None or not self.levels

    def has_key(self, key: str) -> bool:
        return not key.endswith("/") and (self.pattern is None or self.pattern.match(key) is not None)

    def enters(self, folder: str) -> bool:
        depth = folder.count("/")
        return self.enters_all or (depth <= len(self.levels) and self.levels[depth - 1].match(folder[:-1]) is not None)


def list_objects(url: str, is_glob: bool = False) -> list[StoredObject]:
    """Return the objects at or below a URL, or those that match it as a glob. Raises OSError."""
    with ThreadPoolExecutor(MAX_STREAMS) as pool:
        return list(chain.from_iterable(iterate_objects(url, is_glob, pool)))


def iterate_objects(url: str, is_glob: bool, pool: ThreadPoolExecutor) -> Iterator[list[StoredObject]]:
    """Yield the objects at or below a URL, or those that match it as a glob, each once, in no order; requests are made in the pool.

    Raises OSError.
    """
    scheme = parse_scheme(url)
    if scheme not in PAGE_READERS:
        with open_filesystem(url) as (files, path):
            found = files.glob(path, detail=True) if is_glob else files.find(path, detail=True)
            yield [make_stored_object(scheme, info) for name, info in found.items() if info["type"] == "file" and not name.endswith("/")]
        return
    is_empty = True
    with open_filesystem(url) as (files, path):
        bucket, key, *_ = files.split_path(path)
        selection = KeySelection.for_glob(key) if is_glob else KeySelection(f"{key}/" if key else "")
        read_page = PAGE_READERS[scheme]
        for keys in iterate_keys(lambda part: read_page(files, bucket, part), selection, pool):
            is_empty = is_empty and not keys
            yield [StoredObject(f"{scheme}://{bucket}/{found.key}", found.size_bytes, found.version) for found in keys]
    if is_empty and key and not is_glob:
        alone = find_object(url)
        yield [alone] if alone else []


def iterate_keys(
    read_page: Callable[[ListedPrefix], KeyPage], selection: KeySelection, pool: ThreadPoolExecutor
) -> Iterator[list[StoredKey]]:
    """Yield the wanted keys of a bucket, a page at a time, as the pages arrive."""
    parts = deque([ListedPrefix(selection.prefix, is_opened=not selection.enters_all, is_probe=selection.enters_all)])
    running: dict[Future[KeyPage], ListedPrefix] = {}
    arrived: list[list[StoredKey]] = []
    opened = 1
    try:
        while parts or running:
            while parts and len(running) < 2 * MAX_STREAMS:
                part = parts.popleft()
                running[pool.submit(read_page, part)] = part
            yield from arrived  # while the next pages are under way
            arrived.clear()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                part, page = running.pop(future), future.result()
                if part.is_probe and page.next_page:
                    parts.append(ListedPrefix(part.prefix, is_opened=True))
                    continue
                arrived.append([found for found in page.keys if found.key.count("/") >= part.min_depth and selection.has_key(found.key)])
                part.folders.extend(folder for folder in page.folders if selection.enters(folder))
                if page.next_page:
                    parts.appendleft(replace(part, next_page=page.next_page))
                    continue
                most_opened = MAX_OPENED - opened if selection.enters_all else len(part.folders)
                further = split_part(part, most_opened, max(1, MAX_GROUPS // opened))
                opened += sum(one.is_opened for one in further)
                parts.extend(further)
        yield from arrived
    finally:
        for future in running:
            future.cancel()


def split_part(part: ListedPrefix, most_opened: int, most_groups: int) -> list[ListedPrefix]:
    """Return what lists the folders of a part: up to `most_opened` of them opened, else at most `most_groups` prefixes that are not."""
    if len(part.folders) <= most_opened:
        return [ListedPrefix(folder, is_opened=True) for folder in part.folders]
    depth = part.prefix.count("/") + 1
    return [ListedPrefix(prefix, min_depth=depth) for prefix in group_folders(part.prefix, part.folders, most_groups)]


def group_folders(prefix: str, folders: list[str], most: int) -> list[str]:
    """Return at most so many prefixes, none of which begins with another, of which each folder of this prefix has one."""
    if len(folders) <= most:
        return folders
    groups = {prefix}
    for length in range(len(prefix) + 1, max(map(len, folders)) + 1):
        longer = {folder[:length] for folder in folders}
        if len(longer) > most:
            break
        groups = longer
    return sorted(groups)


# ---- One page ------------------------------------------------------------------------------------------------------


def read_s3_page(files: Any, bucket: str, part: ListedPrefix) -> KeyPage:
    """Return a page of an S3 bucket."""
    given = {"Bucket": bucket, "Prefix": part.prefix, "MaxKeys": PAGE_KEYS, "Delimiter": "/" if part.is_opened else ""}
    found = files.call_s3("list_objects_v2", **given, **({"ContinuationToken": part.next_page} if part.next_page else {}), **files.req_kw)
    keys = [StoredKey(item["Key"], item["Size"], item["ETag"]) for item in found.get("Contents", ())]
    return KeyPage(keys, [item["Prefix"] for item in found.get("CommonPrefixes", ())], found.get("NextContinuationToken"))


def read_gcs_page(files: Any, bucket: str, part: ListedPrefix) -> KeyPage:
    """Return a page of a bucket in Google Cloud Storage."""
    given = {"prefix": part.prefix, "maxResults": PAGE_KEYS, "fields": "items(name,size,etag),prefixes,nextPageToken"}
    delimiter = "/" if part.is_opened else None
    try:
        found = files.call("GET", "b/{}/o", bucket, **given, delimiter=delimiter, pageToken=part.next_page, json_out=True)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, f"there is no bucket {bucket!r}") from None
    keys = [StoredKey(item["name"], int(item["size"]), item["etag"]) for item in found.get("items", ())]
    return KeyPage(keys, found.get("prefixes", []), found.get("nextPageToken"))


def read_azure_page(files: Any, bucket: str, part: ListedPrefix) -> KeyPage:
    """Return a page of a container in Azure Blob Storage."""
    from azure.storage.blob.aio import BlobPrefix

    async def read_blobs() -> tuple[list[Any], str | None]:
        async with files.service_client.get_container_client(bucket) as container:
            given = {"name_starts_with": part.prefix, "include": ["metadata"], "results_per_page": PAGE_KEYS}
            listing = container.walk_blobs(**given, delimiter="/") if part.is_opened else container.list_blobs(**given)
            pages = listing.by_page(part.next_page)
            return [blob async for blob in await anext(pages)], pages.continuation_token

    blobs, next_page = sync(files.loop, read_blobs)
    keys = [
        StoredKey(blob.name, blob.size, blob.etag)
        for blob in blobs
        if not isinstance(blob, BlobPrefix) and not is_azure_folder(blob.metadata or {})
    ]
    return KeyPage(keys, [blob.name for blob in blobs if isinstance(blob, BlobPrefix)], next_page or None)


def is_azure_folder(metadata: dict[str, str]) -> bool:
    """Say whether a blob with this metadata stands for a folder."""
    return not AZURE_FOLDER_MARKS.items().isdisjoint(metadata.items())


PAGE_READERS: dict[str, Callable[[Any, str, ListedPrefix], KeyPage]] = {
    "s3": read_s3_page,
    "gs": read_gcs_page,
    "az": read_azure_page,
    "abfs": read_azure_page,
}
