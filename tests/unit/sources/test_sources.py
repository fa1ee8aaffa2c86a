"""Listing and reading documents: folders, globs, manifests, links, URLs and object stores."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import sources
from pipeline.errors import DocumentError, SourceError
from pipeline.records import Document
from pipeline.sources import find_documents, read_document
from pipeline.sources.local import format_source, is_glob_match, make_absolute


@pytest.fixture
def root(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    for name in ("scans/b.pdf", "scans/a.PDF", "scans/2024/c", "scans/2024/05/d.pdf", "scans/.hidden", "scans/.git/e.pdf"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)
    (tmp_path / "secret.pdf").write_text("secret")
    return home


def rows(root: Path, *paths: str, **options: bool) -> dict[str, str]:
    """Return by source the kind of failure that reading raises, "" for readable files."""
    return {
        row["source"]: row["version"] if (row["size_bytes"] or 0) < 0 else "" for row in find_documents(paths, root, **options).to_pylist()
    }


def names(root: Path, *paths: str) -> list[str]:
    return list(rows(root, *paths))


def documents(root: Path, *paths: str) -> list[Document]:
    return [Document(row["source"], row["size_bytes"], row["version"]) for row in find_documents(paths, root).to_pylist()]


def read_error_kind(document: Document, root: Path, max_bytes: int = 1000) -> str:
    with pytest.raises(DocumentError) as caught:
        read_document(document, root, max_bytes)
    return caught.value.kind


# ---- Files and globs -----------------------------------------------------------------------------------------------


def test_a_folder_is_every_file_below_it_but_dot_files(root: Path) -> None:
    assert names(root, "scans") == ["scans/2024/05/d.pdf", "scans/2024/c", "scans/a.PDF", "scans/b.pdf"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("scans/*.pdf", ["b.pdf"]),
        ("scans/*", ["a.PDF", "b.pdf"]),
        ("scans/**/*.pdf", ["2024/05/d.pdf", "b.pdf"]),
        ("scans/**", ["2024/05/d.pdf", "2024/c", "a.PDF", "b.pdf"]),
        ("scans/*/?", ["2024/c"]),
        ("scans/[ab].*", ["a.PDF", "b.pdf"]),
        ("**/0?/*", ["2024/05/d.pdf"]),
    ],
)
def test_globs(root: Path, pattern: str, found: list[str]) -> None:
    assert names(root, pattern) == [f"scans/{name}" for name in found]


def test_an_existing_name_with_brackets_is_not_a_glob(root: Path) -> None:
    (root / "x[1].pdf").touch()
    assert names(root, "x[1].pdf") == ["x[1].pdf"]


def test_a_job_folder_with_brackets_is_no_glob(tmp_path: Path) -> None:
    (tmp_path / "x[1]/in").mkdir(parents=True)
    (tmp_path / "x[1]/in/a.pdf").touch()
    assert names(tmp_path / "x[1]", "in/*.pdf") == ["in/a.pdf"]


def test_a_file_named_twice_is_one_row(root: Path) -> None:
    spellings = ("scans/b.pdf", str(root / "scans/b.pdf"), "./scans/../scans/*.pdf", f"file://{root}/scans/b.pdf")
    assert names(root, "scans", *spellings) == names(root, "scans")


def test_a_row_has_size_and_version(root: Path) -> None:
    found = os.stat(root / "scans/b.pdf")
    assert find_documents(["scans/b.pdf"], root).to_pylist() == [
        {"source": "scans/b.pdf", "size_bytes": found.st_size, "version": str(found.st_mtime_ns), "full_url": None}
    ]


def test_names_do_not_depend_on_where_the_run_starts(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    expected = names(root, "scans", "../secret.pdf")
    monkeypatch.chdir(tmp_path)
    assert names(Path("home"), "scans", "../secret.pdf") == expected
    assert names(tmp_path / "link", "scans", "../secret.pdf") == expected
    assert str(tmp_path / "secret.pdf") in expected


NOTHING = [
    "nowhere",
    "scans/*.tif",
    "scans/nowhere/*",
    "empty",
    "/dev/null",
    "scans/b.pdf/c",
    "a\0b",
    "zip://a::https://b",
    "ftp://a/b",
    "https://example.com/*.pdf",
    "https://",
    "http://exa mple.com/a.pdf",
    "https://example.com:http/a.pdf",
    "http://[fe80::1%25lo]/a.pdf",
]


@pytest.mark.parametrize("path", NOTHING)
def test_a_path_of_the_job_that_names_nothing_is_refused(root: Path, path: str) -> None:
    (root / "empty/below").mkdir(parents=True)
    with pytest.raises(SourceError, match="^source " + re.escape(repr(path))):
        find_documents(["scans", path], root)


def test_a_folder_that_cannot_be_listed_is_a_row(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: str) -> Any:
        if path.endswith("05"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert rows(root, "scans")["scans/2024/05"] == "unreadable"


def test_folders_are_read_side_by_side_and_in_the_order_of_one_after_another(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        (root / f"many/{number:02}/deep").mkdir(parents=True)
        (root / f"many/{number:02}/deep/a.pdf").touch()
    (root / "many/05/linked").symlink_to(root / "scans")
    (root / "many/03/also").symlink_to(root / "scans")
    expected, real, running, most = find_documents(["many"], root, allow_outside=True), os.scandir, set[str](), 0

    def scandir(path: str) -> Any:
        nonlocal most
        running.add(path)
        most = max(most, len(running))
        time.sleep(0.01)
        running.discard(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert find_documents(["many"], root, allow_outside=True).equals(expected)
    assert 8 <= most <= 17
    assert next(name for name in expected["source"].to_pylist() if "deep" not in name).startswith("many/05/linked/")


# ---- Odd names, pipes and links -----------------------------------------------------------------------------------


def test_names_that_are_not_utf8_are_listed_as_file_urls_and_read(root: Path) -> None:
    name = os.fsencode(root) + b"/scans/caf\xe9 100%.pdf"
    with open(name, "wb") as file:
        file.write(b"coffee")
    document = next(d for d in documents(root, "scans") if d.source.startswith("file://"))
    assert document.source.endswith("/scans/caf%E9%20100%25.pdf")
    assert read_document(document, root, 1000) == b"coffee"


@pytest.mark.parametrize("name", ["two\nlines.pdf", "🧾 ünï.pdf", "100%41.pdf", " ", "a\\b", "~", "http:", "\x1b[31m"])
def test_odd_names_are_kept(root: Path, name: str) -> None:
    (root / "odd").mkdir()
    (root / "odd" / name).write_text("x")
    (document,) = documents(root, "odd")
    assert document.source == f"odd/{name}"
    assert read_document(document, root, 10) == b"x"


@given(st.lists(st.binary(min_size=1, max_size=9).filter(lambda part: b"/" not in part and b"\0" not in part), min_size=1, max_size=4))
def test_every_path_has_one_source_that_converts_back(parts: list[bytes]) -> None:
    path = "/" + "/".join(os.fsdecode(part) for part in parts if part not in (b".", b".."))
    name = format_source(path, "/home")
    assert make_absolute(name, "/home") == path.rstrip("/") or path == "/"
    name.encode("utf-8")


def test_pipes_and_links_to_nothing_are_rows_and_never_opened(root: Path) -> None:
    os.mkfifo(root / "scans/pipe")
    (root / "scans/dangling").symlink_to("nothing")
    (root / "scans/self").symlink_to("self")
    found = rows(root, "scans")
    assert (found["scans/pipe"], found["scans/dangling"], found["scans/self"]) == ("unreadable", "vanished", "unreadable")
    assert [read_error_kind(d, root) for d in documents(root, "scans") if d.size_bytes == -1] == ["vanished", "unreadable", "unreadable"]


def test_circular_links_end_and_files_are_listed_under_their_real_paths(root: Path) -> None:
    (root / "scans/again").symlink_to(root / "scans")
    (root / "scans/2024/up").symlink_to("..")
    (root / "scans/0").symlink_to("2024")
    assert names(root, "scans") == ["scans/2024/05/d.pdf", "scans/2024/c", "scans/a.PDF", "scans/b.pdf"]


def test_links_that_lead_out_are_rows_and_not_followed(root: Path, tmp_path: Path) -> None:
    (root / "scans/file.pdf").symlink_to(tmp_path / "secret.pdf")
    (root / "scans/folder").symlink_to(tmp_path)
    found = rows(root, "scans")
    assert (found["scans/file.pdf"], found["scans/folder"]) == ("outside", "outside")
    assert read_error_kind(documents(root, "scans")[-1], root) == "outside"
    assert rows(root, "scans", allow_outside=True)["scans/folder/secret.pdf"] == ""


# ---- Manifests ----------------------------------------------------------------------------------------------------


def test_a_manifest_names_files_beside_it_and_its_columns_are_kept(root: Path) -> None:
    (root / "scans/list.csv").write_text("path,customer\nb.pdf,ACME\n2024/c,\ngone.pdf,EVIL\n")
    table = find_documents(["scans/list.csv", "scans/a.PDF"], root)
    assert table.column_names == ["source", "size_bytes", "version", "customer", "full_url"]
    assert dict(zip(table["source"].to_pylist(), table["customer"].to_pylist(), strict=True)) == {
        "scans/2024/c": None,
        "scans/a.PDF": None,
        "scans/b.pdf": "ACME",
        "scans/gone.pdf": "EVIL",
    }
    assert rows(root, "scans/list.csv")["scans/gone.pdf"] == "vanished"


def test_a_manifest_found_in_a_folder_is_a_file_like_any_other(root: Path) -> None:
    (root / "scans/list.csv").write_text("path\nb.pdf\n")
    assert "scans/list.csv" in names(root, "scans")


@pytest.mark.parametrize(
    "path", ["../../secret.pdf", "{tmp}/secret.pdf", "file://{tmp}/secret.pdf", "link/secret.pdf", "s3://bucket/a.pdf"]
)
def test_a_manifest_does_not_lead_out_of_its_folder(root: Path, tmp_path: Path, path: str) -> None:
    (root / "scans/link").symlink_to(tmp_path)
    (root / "scans/list.txt").write_text(f"b.pdf\n{path.format(tmp=tmp_path)}\n")
    assert sorted(rows(root, "scans/list.txt").values()) == ["", "outside"]


def test_a_manifest_may_lead_out_where_the_job_allows_it(root: Path, tmp_path: Path) -> None:
    (root / "scans/list.txt").write_text("../../secret.pdf\n")
    assert rows(root, "scans/list.txt", allow_outside=True) == {str(tmp_path / "secret.pdf"): ""}


def test_a_file_in_a_folder_and_a_manifest_keeps_the_manifests_columns(root: Path) -> None:
    (root / "list.csv").write_text("path,customer\nscans/b.pdf,ACME\n")
    table = find_documents(["scans", "list.csv", "scans"], root)
    assert [row["customer"] for row in table.to_pylist()] == [None, None, None, "ACME"]


def test_a_file_listed_with_different_columns_is_refused(root: Path) -> None:
    (root / "list.csv").write_text("path,customer\nscans/b.pdf,ACME\nscans/./b.pdf,EVIL\n")
    with pytest.raises(SourceError, match=r"scans/b\.pdf is listed twice.*ACME.*EVIL"):
        find_documents(["list.csv"], root)


def test_manifests_that_disagree_on_a_type_are_refused(root: Path) -> None:
    (root / "a.csv").write_text("path,n\nscans/b.pdf,1\n")
    (root / "b.jsonl").write_text('{"path": "scans/a.PDF", "n": 1}\n')
    with pytest.raises(SourceError, match="different types"):
        find_documents(["a.csv", "b.jsonl"], root)


def test_an_empty_manifest_is_refused(root: Path) -> None:
    (root / "list.txt").write_text("\n\n")
    with pytest.raises(SourceError, match="holds no files"):
        find_documents(["list.txt"], root)


def test_a_path_that_no_file_system_has_is_a_row(root: Path) -> None:
    (root / "list.txt").write_bytes(b"a\0b.pdf\nx/../a\0.pdf\n" + b"x" * 5000 + b"\nb.pdf/c\n")
    assert sorted(rows(root, "list.txt").values()) == ["unreadable", "vanished", "vanished", "vanished"]


# ---- Reading ------------------------------------------------------------------------------------------------------


def test_a_document_is_read_as_it_was_listed(root: Path) -> None:
    assert [read_document(document, root, 1000) for document in documents(root, "scans/*")] == [b"scans/a.PDF", b"scans/b.pdf"]


def test_a_document_that_is_gone_has_vanished(root: Path) -> None:
    document = documents(root, "scans/b.pdf")[0]
    (root / "scans/b.pdf").unlink()
    assert read_error_kind(document, root) == "vanished"


@pytest.mark.parametrize("text", ["other text!", "longer than it was", "short"])
def test_a_document_modified_since_the_listing_has_changed(root: Path, text: str) -> None:
    document = documents(root, "scans/b.pdf")[0]
    (root / "scans/b.pdf").write_text(text)
    os.utime(root / "scans/b.pdf", ns=(1, 1))
    assert read_error_kind(document, root) == "changed"


def test_a_document_that_became_a_pipe_does_not_block(root: Path) -> None:
    document = documents(root, "scans/b.pdf")[0]
    (root / "scans/b.pdf").unlink()
    os.mkfifo(root / "scans/b.pdf")
    assert read_error_kind(document, root) == "unreadable"


def test_a_document_larger_than_allowed_is_not_read(root: Path) -> None:
    assert read_error_kind(documents(root, "scans/b.pdf")[0], root, max_bytes=3) == "too_large"


# ---- Object stores and URLs-----------------------------------------------------------------------------------------


def test_other_file_systems_are_listed_and_read(root: Path) -> None:
    files = fsspec.filesystem("memory")
    files.pipe({"/bucket/in/a.pdf": b"A", "/bucket/in/deep/b.pdf": b"BB"})
    found = documents(root, "memory://bucket/in")
    assert [d.source for d in found] == ["memory:///bucket/in/a.pdf", "memory:///bucket/in/deep/b.pdf"]
    assert [read_document(d, root, 10) for d in found] == [b"A", b"BB"]
    assert names(root, "memory://bucket/in/*.pdf") == ["memory:///bucket/in/a.pdf"]
    files.pipe("/bucket/in/a.pdf", b"changed")
    assert read_error_kind(found[0], root) == "changed"


def test_a_url_is_one_file_and_listing_sends_no_request(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "getaddrinfo")
    url = "HTTPS://example.com/a%20b.pdf#page=2"
    assert find_documents([url, "http://[::1]:8080"], root).to_pylist() == [
        {"source": url, "size_bytes": None, "version": "", "full_url": None},
        {"source": "http://[::1]:8080", "size_bytes": None, "version": "", "full_url": None},
    ]


def sign_url(url: str, signature: str) -> str:
    """Return a URL as Amazon's libraries sign it."""
    fixed = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AK%2F2026&X-Amz-Date=20261128T000000Z&X-Amz-Expires=900"
    return f"{url}{'&' if '?' in url else '?'}{fixed}&X-Amz-SignedHeaders=host&X-Amz-Signature={signature}"


def test_a_query_is_in_full_url_alone(root: Path) -> None:
    urls = ["https://example.com/get?id=1", "https://example.com/get?id=2", sign_url("https://example.com/a.pdf", "secret")]
    found = find_documents(urls, root)
    assert [name.partition("?…")[0] for name in found["source"].to_pylist()] == [
        "https://example.com/a.pdf", "https://example.com/get", "https://example.com/get",
    ]  # fmt: skip
    assert len({*found["source"].to_pylist()}) == 3
    assert {*found["full_url"].to_pylist()} == {*urls}
    assert [name for name in urls if name in str(found.drop_columns("full_url"))] == []
    assert find_documents(urls, root, keep_query=True)["source"].to_pylist() == sorted(urls)


@pytest.mark.parametrize("url", ["https://example.com/a.pdf", "https://example.com/a.pdf?versionId=3"])
def test_a_url_that_was_signed_again_has_the_same_name(root: Path, url: str) -> None:
    first, again = (find_documents([sign_url(url, signature)], root)["source"].to_pylist() for signature in ("aa", "bb"))
    assert first == again
    assert find_documents([sign_url("https://example.com/a.pdf?versionId=4", "aa")], root)["source"].to_pylist() != first


def test_two_signatures_in_one_listing_are_two_rows(root: Path) -> None:
    (root / "list.txt").write_text("\n".join(sign_url("https://example.com/a.pdf", signature) for signature in ("aa", "bb", "bb")))
    found = find_documents(["list.txt"], root)
    assert len({*found["source"].to_pylist()}) == found.num_rows == 2


def test_a_manifest_may_name_urls_but_no_other_file_systems(root: Path) -> None:
    (root / "scans/list.csv").write_text("path,customer\nhttps://example.com/a.pdf,ACME\nb.pdf,ACME\ns3://bucket/a.pdf,EVIL\n")
    sizes = {row["source"]: row["size_bytes"] for row in find_documents(["scans/list.csv"], root).to_pylist()}
    assert sizes == {"https://example.com/a.pdf": None, "s3://bucket/a.pdf": -1, "scans/b.pdf": len("scans/b.pdf")}


def test_a_url_of_a_manifest_that_cannot_be_fetched_is_a_row(root: Path) -> None:
    (root / "list.txt").write_bytes(b"https://example.com/*.pdf\nhttp://127.0.0.1:1/caf\xe9.pdf\nhttps://[x/\n")
    found = documents(root, "list.txt")
    assert [d.source for d in found] == ["http://127.0.0.1:1/caf%E9.pdf", "https://[x/", "https://example.com/*.pdf"]
    assert [read_error_kind(d, root) for d in found] == ["refused"] * 3


def test_a_password_in_a_url_is_not_listed(root: Path) -> None:
    (root / "list.txt").write_text("https://me:secret@example.com/a.pdf\nhttps://me:sec/ret@example.com/b.pdf\n")
    assert names(root, "list.txt") == ["https://***@example.com/a.pdf", "https://***@example.com/b.pdf"]
    with pytest.raises(SourceError) as caught:
        find_documents(["https://me:secret@example.com/a.pdf?signature=secret"], root)
    assert "password" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_url_listed_with_different_columns_is_refused_without_its_signature(root: Path) -> None:
    (root / "list.csv").write_text("path,n\nhttps://example.com/a?key=secret,1\nhttps://example.com/a?key=secret,2\n")
    with pytest.raises(SourceError, match=r"^https://example\.com/a\?… is listed twice") as caught:
        find_documents(["list.csv"], root)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [("a/b/c", "a/**/c", True), ("a/c", "a/**/c", True), ("a/b", "a", False), ("a", "**/**", True), ("A", "a", False), ("a/b", "*", False)],
)
def test_glob_matches(path: str, pattern: str, expected: bool) -> None:
    assert is_glob_match(path.split("/"), pattern.split("/")) is expected


def test_every_reason_has_a_sentence(root: Path) -> None:
    for kind in sources.UNREADABLE_REASONS:
        assert read_error_kind(Document("a.pdf", -1, kind), root) == kind
