"""Listing of an object store: every wanted key once however it is split, few requests more than one after another, many at once."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import sources
from pipeline.storage import listing
from pipeline.storage.listing import KeyPage, KeySelection, ListedPrefix, StoredKey, group_folders, iterate_keys
from tests.support import azure
from tests.support.buckets import Bucket


class PagedKeys:
    """Answers listing requests as a store does: entries in the order of their names, a page at a time, the last name as the token."""

    def __init__(self, keys: Sequence[str], page_keys: int = 3, delay_s: float = 0.0) -> None:
        self.keys, self.page_keys, self.delay_s = sorted(set(keys)), page_keys, delay_s
        self.requests = self.running = self.most_running = 0
        self.lock = threading.Lock()

    def read_page(self, part: ListedPrefix) -> KeyPage:
        with self.lock:
            self.requests += 1
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        time.sleep(self.delay_s)
        below = self.keys[bisect_left(self.keys, part.prefix) : bisect_left(self.keys, part.prefix + chr(0x10FFFF))]
        if part.is_opened:
            below = sorted({key[: (key.find("/", len(part.prefix)) + 1) or len(key)] for key in below})
        start = bisect_right(below, part.next_page or "")
        page, left = below[start : start + self.page_keys], len(below) - start
        with self.lock:
            self.running -= 1
        is_folder = {name: part.is_opened and name not in self.keys for name in page}
        keys = [StoredKey(name, 1, "v") for name in page if not is_folder[name]]
        return KeyPage(keys, [name for name in page if is_folder[name]], page[-1] if left > self.page_keys else None)

    def find(self, selection: KeySelection, threads: int = 2) -> list[str]:
        with ThreadPoolExecutor(threads) as pool:
            return [found.key for page in iterate_keys(self.read_page, selection, pool) for found in page]


KEYS = st.lists(st.lists(st.sampled_from(["a", "b", "ab", "a b", "ü"]), min_size=1, max_size=4).map("/".join), max_size=40)


@given(KEYS, st.sampled_from(["", "a/", "a/b/"]), st.integers(1, 4), st.integers(1, 4))
def test_every_key_below_a_prefix_is_found_once(keys: list[str], prefix: str, most_opened: int, most_groups: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "MAX_OPENED", most_opened)
        patch.setattr(listing, "MAX_GROUPS", most_groups)
        store = PagedKeys(keys)
        assert sorted(store.find(KeySelection(prefix))) == [key for key in store.keys if key.startswith(prefix)]


@given(KEYS, st.sampled_from(["a/*", "a*/b", "*", "*/*/b", "[ab]/?", "a/b*/*"]))
def test_a_glob_finds_the_keys_that_match_it(keys: list[str], glob: str) -> None:
    store = PagedKeys(keys)
    wanted = [key for key in store.keys if key.count("/") == glob.count("/")]
    wanted = [key for key in wanted if all(map(fnmatchcase, key.split("/"), glob.split("/")))]
    assert sorted(store.find(KeySelection.for_glob(glob))) == wanted


@pytest.mark.parametrize(
    ("glob", "found"), [("a/**", ["a/b/c/d", "a/x", "a/y/d"]), ("a/**/d", ["a/b/c/d", "a/y/d"]), ("**/x", ["a/x", "x"])]
)
def test_two_stars_stand_for_any_number_of_folders(glob: str, found: list[str]) -> None:
    assert sorted(PagedKeys(["a/x", "a/b/c/d", "a/y/d", "ab/z", "x"]).find(KeySelection.for_glob(glob))) == found


def test_a_glob_enters_no_folder_that_it_does_not_match() -> None:
    store = PagedKeys([f"{year}/{month:02}/{n}.pdf" for year in (2024, 2025) for month in range(1, 13) for n in range(30)], 1000)
    assert len(store.find(KeySelection.for_glob("2025/1*/*.pdf"))) == 90
    assert store.requests == 1 + 3


@pytest.mark.parametrize(
    ("keys", "requests"),
    [
        ([f"in/{n:05}" for n in range(90)], 1),
        ([f"in/{n:05}" for n in range(2_000)], 20 + 1),
        ([f"in/{n % 40}/{n:05}" for n in range(2_000)], 2 + 40),
        ([f"in/{n // 2:05}/{n % 2}" for n in range(2_000)], 10 + 20),  # a folder for every two: not a request each
        ([f"in/{n % 40:02}/{n:05}/a" for n in range(2_000)], 2 + 40 + 40),
    ],
    ids=["a page", "flat", "folders", "very many folders", "very many folders in folders"],
)
def test_a_listing_takes_few_requests_more_than_pages_one_after_another(keys: list[str], requests: int) -> None:
    store = PagedKeys(keys, 100)
    assert sorted(store.find(KeySelection("in/"))) == sorted(keys)
    assert requests <= store.requests <= requests + listing.MAX_GROUPS


def test_folders_are_listed_side_by_side_and_not_all_at_once() -> None:
    store = PagedKeys([f"in/{n % 100}/{n:05}" for n in range(2_000)], 10, delay_s=0.001)
    assert len(store.find(KeySelection("in/"), 16)) == 2_000
    assert 8 <= store.most_running <= 16


def test_folders_of_one_group_begin_alike_and_no_group_with_another() -> None:
    assert group_folders("in/", [f"in/doc-{n:04}/" for n in range(1_000, 3_000)], 5) == ["in/doc-1", "in/doc-2"]
    assert group_folders("in/", ["in/a/", *(f"in/ab{n}/" for n in range(20))], 5) == ["in/a/", "in/ab"]
    assert group_folders("in/", ["in/a/", "in/b/"], 1) == ["in/"]


def test_a_blob_that_stands_for_a_folder_is_no_document(azure_bucket: azure.Bucket, tmp_path: Path) -> None:
    """Accounts with a hierarchical namespace list their folders as empty blobs."""
    azure_bucket.put(f"{tmp_path.name}/deep/a.pdf", b"%PDF-")
    azure_bucket.put(f"{tmp_path.name}/deep", b"", hdi_isfolder="true")
    found = sources.find_documents([azure_bucket.url(tmp_path.name)], tmp_path)["source"].to_pylist()
    assert found == [azure_bucket.url(f"{tmp_path.name}/deep/a.pdf")]


def test_a_path_with_the_scheme_of_a_store_keeps_it(any_bucket: Bucket, tmp_path: Path) -> None:
    any_bucket.put(f"{tmp_path.name}/a.pdf", b"%PDF-")
    for path in (tmp_path.name, f"{tmp_path.name}/a.pdf", f"{tmp_path.name}/*.pdf"):
        (found,) = sources.find_documents([any_bucket.url(path)], tmp_path)["source"].to_pylist()
        assert found == any_bucket.url(f"{tmp_path.name}/a.pdf")


def test_paths_are_listed_side_by_side_and_the_first_that_is_wrong_is_named(any_bucket: Bucket, tmp_path: Path) -> None:
    any_bucket.put(f"{tmp_path.name}/a.pdf", b"%PDF-")
    with pytest.raises(sources.SourceError, match="gone' holds no files"):
        sources.find_documents([any_bucket.url(f"{tmp_path.name}/{name}") for name in ("a.pdf", "gone")], tmp_path)
