"""Stores: a local folder and a prefix in each object store behave the same. The stores are servers on loopback (`tests/support/`)."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner

from pipeline import sources
from pipeline.cli import main
from pipeline.errors import DamagedShard, DocumentError, JobError, RunError, SourceError
from pipeline.output import Output, compaction
from pipeline.output.compaction import compact_shards
from pipeline.output.ledger import LEDGER_SCHEMA, read_ledger_state, read_requests
from pipeline.output.shards import read_intact, read_shard, read_shards, write_shard
from pipeline.output.sources import read_sources
from pipeline.output.status import read_status
from pipeline.records import Document
from pipeline.stages import preview
from pipeline.storage import location, object_store, store
from pipeline.storage.store import FolderStore, Store
from tests.support import s3
from tests.support.buckets import SCHEMES, Bucket, serve_until_cut, start_bucket
from tests.support.engines import INVALID, VALID
from tests.support.ledger import LedgerWriter
from tests.support.stages import make_settle_stage
from tests.support.workspace import Workspace, draw_slip
from tests.unit.stages import test_settle


@pytest.fixture(params=["folder", *SCHEMES])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> location.Location:
    """A new folder, and a prefix in each object store."""
    return tmp_path / "store" if request.param == "folder" else start_bucket(request, request.param).url(tmp_path.name)


@pytest.fixture
def files(place: location.Location) -> Store:
    made = store.open_store(place)
    made.create()
    return made


def test_a_folder_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = FolderStore(tmp_path / "out")
        made.create()
        made.check_writable()
        made.put("a.parquet", b"")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (made.path, made.path / "a.parquet")] == [0o700, 0o600]


def make_row(key: str, doc_id: str | None = None, **given: object) -> dict[str, object]:
    document = {"source": f"{key}.pdf", "size_bytes": 5, "version": "1", "doc_id": doc_id or f"d{key}", "page_count": 1}
    return {"key": key, "attempt": 1, "status": "extracted", "answer": f"{{{key}}}", **document, **given}


def write_rows(output: Output, *rows: dict[str, object]) -> None:
    with LedgerWriter(output) as ledger:
        for one in rows:
            ledger.add(one)


def read_rows(output: Output) -> list[dict[str, object]]:
    return sorted(read_shards(output.requests, None, LEDGER_SCHEMA).to_pylist(), key=lambda row: (row["key"], row["attempt"]))


# --- contents by name


def test_what_is_put_is_listed_and_read(files: Store) -> None:
    for name in ("b.parquet", "a.parquet", "c.json"):
        files.put(name, name.encode() * 2)
    assert list(files.list_names(".parquet").items()) == [("a.parquet", 18), ("b.parquet", 18)]
    assert files.read("c.json") == b"c.jsonc.json"
    files.put("c.json", b"new")
    assert files.read("c.json") == b"new"


def test_what_is_not_there_is_no_name_and_cannot_be_read(files: Store) -> None:
    files = files / "nowhere"
    assert files.list_names("") == {}
    with pytest.raises(FileNotFoundError):
        files.read("a.parquet")


def test_contents_are_renamed_and_removed(files: Store) -> None:
    for name in ("a", "b", "c"):
        files.put(name, b"x")
    files.rename("a", "d")
    files.rename("gone", "e")
    files.remove(["b", "gone"])
    assert list(files.list_names("")) == ["c", "d"]


def test_a_probe_leaves_nothing(files: Store) -> None:
    files.check_writable()
    assert files.list_names("") == {}


def test_folders_within_are_no_names(any_bucket: Bucket, tmp_path: Path) -> None:
    files = store.open_store(any_bucket.url(tmp_path.name))
    (files / "inner").put("a.parquet", b"x")
    assert files.list_names("") == {}


def test_a_store_travels_without_secrets(bucket: s3.Bucket) -> None:
    files = store.open_store(bucket.url("somewhere"))
    files.list_names("")  # the connection is made by now
    packed = pickle.dumps(files)
    assert pickle.loads(packed) == files
    assert s3.SECRET.encode() not in packed
    assert b"AKID" not in packed


def test_more_objects_than_five_pages_of_a_listing_are_all_listed(any_bucket: Bucket, tmp_path: Path) -> None:
    """One folder has more than a page, the others are pages of their own."""
    keys = [f"{tmp_path.name}/{'many' if n < 2_500 else n % 10}/{n:05}.parquet" for n in range(5_001)]
    any_bucket.put_many(keys)
    assert len(store.open_store(any_bucket.url(f"{tmp_path.name}/many")).list_names(".parquet")) == 2_500
    found = sources.find_documents([any_bucket.url(tmp_path.name)], tmp_path)
    assert found["source"].to_pylist() == sorted(map(any_bucket.url, keys))
    assert found["size_bytes"].unique().to_pylist() == [1]


# --- what goes wrong


def test_an_upload_that_is_cut_leaves_the_old_object(any_bucket: Bucket, tmp_path: Path) -> None:
    any_bucket.put(f"{tmp_path.name}/old.parquet", b"old")
    with serve_until_cut(any_bucket, 200_000) as endpoint, any_bucket.redirect(endpoint):
        for name in ("old.parquet", "new.parquet"):
            with pytest.raises(RunError, match=rf"^cannot write ..://bucket/.*/{name}: .*; fix the cause and run the same command again$"):
                store.open_store(any_bucket.url(tmp_path.name)).put(name, b"n" * 1_000_000)
    assert any_bucket.contents(tmp_path.name) == {f"{tmp_path.name}/old.parquet": b"old"}


def test_a_large_upload_that_is_cut_leaves_nothing(any_bucket: Bucket, tmp_path: Path) -> None:
    """It is made in parts. S3 bills them until the upload is aborted; the other stores remove them after a week."""
    files = store.open_store(any_bucket.url(tmp_path.name))
    with (
        serve_until_cut(any_bucket, 1_000_000) as endpoint,
        any_bucket.redirect(endpoint),
        pytest.raises(RunError, match=r"cannot write ..://"),
    ):
        files.put("large.parquet", bytes(101 * 2**20))
    assert any_bucket.keys(tmp_path.name) == []
    assert any_bucket.scheme != "s3" or not any_bucket.has_unfinished_uploads()


def test_a_store_that_is_not_there_is_said_without_a_trace(any_bucket: Bucket) -> None:
    url = any_bucket.url("out")
    with any_bucket.redirect("http://127.0.0.1:9"):
        with pytest.raises(RunError, match=rf"^cannot list {url}: .*127\.0\.0\.1"):
            store.open_store(url).list_names("")
        with pytest.raises(JobError, match=rf"^cannot write to the output folder {url}: "):
            Output(url).create()
        with pytest.raises(SourceError, match=rf"^source '{url}' cannot be listed: "):
            sources.find_documents([url], Path("/"))


def test_a_bucket_that_is_not_there_is_refused_before_anything_starts(any_bucket: Bucket) -> None:
    url = f"{any_bucket.scheme}://another/out"
    with pytest.raises(JobError, match=f"cannot write to the output folder {url}: "):
        Output(url).create()
    with pytest.raises(JobError, match="is not an output folder"):
        read_status(Output(url))
    with pytest.raises(SourceError, match=f"^source '{url}' cannot be listed: "):
        sources.find_documents([url], Path("/"))


def test_a_store_that_stops_answering_is_no_damage(any_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(any_bucket.url(tmp_path.name))
    write_rows(output, make_row("k1"))
    monkeypatch.setattr(store, "WHOLE_BYTES", 0)  # read in pieces
    assert [one["key"] for one in read_rows(output)] == ["k1"]
    ((name, size),) = output.requests.list_names(".parquet").items()
    with any_bucket.redirect("http://127.0.0.1:9"):
        for whole in (0, 10**9):
            monkeypatch.setattr(store, "WHOLE_BYTES", whole)
            with pytest.raises(RunError, match=r"^cannot read ..://.*parquet: .*127\.0\.0\.1") as caught:
                read_shard(output.requests, name, size, None, LEDGER_SCHEMA)
            assert not isinstance(caught.value, DamagedShard)


@pytest.mark.parametrize("url", ["s3://KEY:pass@bucket/out", "s3://KEY:pa/ss@bucket/out", "gs://me@bucket/out"])
def test_a_secret_in_a_url_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="a user or a password") as caught:
        location.check_store_url(url)
    assert "pa" not in str(caught.value).replace("password", "")
    with pytest.raises(SourceError, match=r"source '..://\*\*\*@bucket/out' cannot be listed") as refused:
        sources.find_documents([url], tmp_path)
    assert "KEY" not in str(refused.value)


@pytest.mark.parametrize("url", ["s3://bucket/mail/a@b.pdf", "s3://arn:aws:s3:eu-west-1:123:accesspoint/mine/a@b", "s3://bucket/a:b"])
def test_names_that_only_look_like_secrets_are_none(url: str) -> None:
    assert location.check_store_url(url) == location.redact_url(url) == url


@pytest.mark.parametrize(
    "url", ["ftp://host/out", "https://host/out", "s3://", "s3:///out", "s3://bucket//out", "s3://b/../x", "s3:/bucket/out"]
)
def test_what_cannot_be_an_output_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"it must be a folder or a URL|it must have a bucket|a slash is missing"):
        location.check_store_url(url)


@pytest.mark.parametrize(("scheme", "package", "extra"), [("gs", "gcsfs", "gcs"), ("az", "adlfs", "azure")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str, extra: str) -> None:
    monkeypatch.setattr(object_store, "find_spec", lambda _: None)
    with pytest.raises(JobError, match=rf"{scheme}://bucket/.* needs the package {package}: pip install 'pipeline-documents\[{extra}\]'"):
        Output(f"{scheme}://bucket/out").create()


# --- sources


def test_objects_are_listed_and_read(any_bucket: Bucket, tmp_path: Path) -> None:
    odd = "deep/b#[1].pdf" if any_bucket.scheme == "az" else "deep/b?#[1].pdf"  # adlfs drops a question mark
    for key in ("a.pdf", odd, "empty.pdf", ".hidden/c.pdf", "deep/::file:%2f%2fx"):
        any_bucket.put(f"{tmp_path.name}/{key}", b"" if "empty" in key else key.encode())
    any_bucket.put(f"{tmp_path.name}/deep/", b"")
    found = [Document(**row) for row in sources.find_documents([any_bucket.url(tmp_path.name)], tmp_path).to_pylist()]
    inside = [d.source.removeprefix(any_bucket.url(f"{tmp_path.name}/")) for d in found]
    assert inside == ["a.pdf", "deep/::file:%2f%2fx", odd, "empty.pdf"]
    assert [sources.read_document(d, tmp_path, 100).decode() for d in found] == [*inside[:3], ""]


def test_an_object_that_changed_since_it_was_listed_is_not_taken(any_bucket: Bucket, tmp_path: Path) -> None:
    kinds = {}
    for name in ("same.pdf", "longer.pdf", "filled.pdf", "gone.pdf"):
        any_bucket.put(f"{tmp_path.name}/{name}", b"" if name == "filled.pdf" else b"before")
    found = [Document(**row) for row in sources.find_documents([any_bucket.url(f"{tmp_path.name}/*.pdf")], tmp_path).to_pylist()]
    for name, data in (("same.pdf", b"after!"), ("longer.pdf", b"before and after"), ("filled.pdf", b"x")):
        any_bucket.put(f"{tmp_path.name}/{name}", data)
    store.open_store(any_bucket.url(tmp_path.name)).remove(["gone.pdf"])
    for document in found:
        with pytest.raises(DocumentError) as caught:
            sources.read_document(document, tmp_path, 100)
        kinds[Path(document.source).stem] = caught.value.kind
    assert kinds == {"same": "changed", "longer": "changed", "filled": "changed", "gone": "vanished"}


def test_a_manifest_may_name_objects_where_the_job_lets_it(any_bucket: Bucket, tmp_path: Path) -> None:
    any_bucket.put(f"{tmp_path.name}/a[1].pdf", b"A")
    urls = [any_bucket.url(f"{tmp_path.name}/a[1].pdf"), any_bucket.url(f"{tmp_path.name}/gone.pdf"), "s3://KEY:secret@bucket/a.pdf"]
    (tmp_path / "list.txt").write_text("\n".join(urls))
    found = {
        row["source"]: (row["size_bytes"], row["version"])
        for row in sources.find_documents(["list.txt"], tmp_path, allow_outside=True).to_pylist()
    }
    assert found.keys() == {urls[0], urls[1], "s3://***@bucket/a.pdf"}
    assert (found[urls[0]][0], found[urls[1]], found["s3://***@bucket/a.pdf"]) == (1, (-1, "vanished"), (-1, "refused"))


# --- an output


def test_an_output_in_a_store_reads_back(any_bucket: Bucket, tmp_path: Path) -> None:
    output = Output(any_bucket.url(tmp_path.name))
    output.create()
    assert output.read_job() is None
    output.write_job({"job": {"name": "ü"}, "fingerprint": "f", "asked": {}})
    write_rows(output, make_row("k1"), make_row("k2", status="failed", failure={"stage": "render", "kind": "timeout", "message": "…"}))
    found = read_status(pickle.loads(pickle.dumps(output)))
    assert (found["job"], found["documents"], found["request_failures"]) == ("ü", {"listed": 2, "identified": 2}, {"render/timeout": 1})
    assert read_requests(output, pa.chunked_array([["dk1"]]))["answer"].to_pylist() == ["{k1}"]


def test_status_reads_an_output_in_a_store(any_bucket: Bucket, tmp_path: Path) -> None:
    output = Output(any_bucket.url(tmp_path.name))
    output.write_job({"job": {"name": "slips"}, "fingerprint": "f", "asked": {}})
    write_rows(output, make_row("k1"))
    result = CliRunner().invoke(main, ["status", any_bucket.url(f"{tmp_path.name}/"), "--json"])
    assert (result.exit_code, json.loads(result.stdout)["requests"]) == (0, {"extracted": 1})
    wrong = CliRunner().invoke(main, ["status", "s3://KEY:secret@bucket/out"])
    assert (wrong.exit_code, "secret" in wrong.output) == (2, False)


def test_a_page_of_an_object_can_be_looked_at(any_bucket: Bucket, workspace: Workspace, tmp_path: Path) -> None:
    any_bucket.put(f"{tmp_path.name}/a.pdf", draw_slip(1, 2))
    assert preview.render_preview(workspace.job(), any_bucket.url(f"{tmp_path.name}/a.pdf"), 2).facts["page_count"] == 2
    any_bucket.put(f"{tmp_path.name}/b.pdf", draw_slip(1))
    with pytest.raises(JobError, match=r"names 2 files, the first is ..://bucket/.*/a\.pdf: name one of them"):
        preview.render_preview(workspace.job(), any_bucket.url(tmp_path.name), 1)


def test_a_shard_in_a_store_has_the_bytes_of_one_in_a_folder(any_bucket: Bucket, tmp_path: Path) -> None:
    outputs = Output(tmp_path / "out"), Output(any_bucket.url(tmp_path.name))
    for output in outputs:
        output.create()
        write_rows(output, make_row("k1"), make_row("k2"))
    here = {str(f.relative_to(tmp_path / "out")): f.read_bytes() for f in (tmp_path / "out").rglob("*.parquet")}
    assert {key.removeprefix(f"{tmp_path.name}/"): data for key, data in any_bucket.contents(tmp_path.name).items()} == here


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"x" * 5_000])
def test_a_damaged_shard_in_a_store_is_set_aside(any_bucket: Bucket, tmp_path: Path, damage: bytes) -> None:
    output = Output(any_bucket.url(tmp_path.name))
    write_rows(output, make_row("k1"))
    write_rows(output, make_row("k2"))
    bad = next(iter(output.requests.list_names(".parquet")))
    any_bucket.put(f"{tmp_path.name}/requests/{bad}", damage)
    damaged: list[str] = []
    read_intact(output, damaged, lambda: read_ledger_state(output))
    assert damaged == [any_bucket.url(f"{tmp_path.name}/requests/{bad}")]
    assert any_bucket.get(f"{tmp_path.name}/requests/.{bad}.damaged") == damage
    assert len(read_rows(output)) == 1


def test_records_of_an_earlier_settling_are_removed_from_a_store(any_bucket: Bucket, tmp_path: Path) -> None:
    output = Output(any_bucket.url(tmp_path.name))
    old, new = (write_shard(output.records, pa.table({"n": [1]}), [key]) for key in ("old", "new"))
    output.remove_other_records({new})
    assert list(output.records.list_names("")) == [new] != [old]


# --- compaction


def test_many_shards_become_few_with_the_same_rows(place: location.Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "MAX_SMALL_SHARDS", 8)
    output = Output(place)
    output.create()
    for n in range(9):
        write_rows(output, make_row(f"k{n}", tokens=[{"text": "a", "logprob": -0.5}]))
    before, listing = read_rows(output), read_sources(output)
    assert compact_shards(output) == 16
    assert (read_rows(output), read_sources(output)) == (before, listing)
    assert (len(output.requests.list_names("")), len(output.sources.list_names(""))) == (1, 1)
    assert compact_shards(output) == 0


def test_few_shards_are_left_alone(tmp_path: Path) -> None:
    (output := Output(tmp_path / "out")).create()
    for n in range(3):
        write_rows(output, make_row(f"k{n}"))
    before = output.requests.list_names("")
    assert compact_shards(output) == 0
    assert output.requests.list_names("") == before


def test_records_are_the_same_before_within_and_after_a_compaction(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of two requests each, some of them failed and retried."""
    monkeypatch.setattr(compaction, "MAX_SMALL_SHARDS", 8)
    (output := Output(workspace.folder / "out")).create()
    stage = make_settle_stage(workspace.job("pages.per_request=1"), pa.schema([]))
    listed = [test_settle.document(f"{n}.pdf", f"d{n}", 2) for n in range(10)]
    failure = {"stage": "generate", "kind": "length", "message": "cut"}
    for at, document in enumerate(listed):
        first, second = (document | one for one in test_settle.ledger(stage, document, *[INVALID if at == 2 else VALID] * 2))
        write_rows(output, first | {"status": "failed", "failure": failure, "answer": None} if at % 3 == 1 else first, second)
    for document in listed[1:9:4]:
        (again, _) = (document | one for one in test_settle.ledger(stage, document, VALID, VALID))
        write_rows(output, again | {"attempt": 2})

    def settled() -> pa.Table:
        return stage.build_table(listed, read_requests(output, pa.chunked_array([[one["doc_id"] for one in listed]])).to_pylist())

    before, small = settled(), {name: output.requests.read(name) for name in output.requests.list_names("")}
    assert len(set(before["_status"].to_pylist())) == 3
    assert compact_shards(output) > 10
    after = settled()
    for name in list(small)[:6]:
        output.requests.put(name, small[name])
    assert before.equals(after)
    assert before.equals(settled())


class Killed(BaseException):
    """Stands for a kill of the process between two steps: no cleanup of the code under test runs on it."""


@pytest.mark.parametrize("removed", [0, 1, 5, 9])
def test_a_compaction_that_is_killed_leaves_rows_twice_and_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int) -> None:
    """Readers count duplicate rows once; the next compaction removes them."""
    monkeypatch.setattr(compaction, "MAX_SMALL_SHARDS", 8)
    (output := Output(tmp_path / "out")).create()
    output.write_job({"job": {"name": "slips"}, "fingerprint": "f", "asked": {}})
    for n in range(9):
        write_rows(output, make_row(f"k{n}", status="failed" if n == 3 else "extracted", failure=None))
    write_rows(output, make_row("k3", attempt=2))
    before, counted = read_rows(output), read_status(output)

    def die(folder: FolderStore, names: list[str]) -> None:
        for name in sorted(names)[:removed]:
            os.unlink(folder.path / name)
        raise Killed

    remove = FolderStore.remove
    monkeypatch.setattr(FolderStore, "remove", die)
    with pytest.raises(Killed):
        compact_shards(output)
    monkeypatch.setattr(FolderStore, "remove", remove)
    twice = read_rows(output)
    assert len(twice) == 20 - removed
    assert {(one["key"], one["attempt"]) for one in twice} == {(one["key"], one["attempt"]) for one in before}
    assert read_status(output) == counted
    for n in range(9):
        write_rows(output, make_row(f"m{n}"))
    compact_shards(output)
    assert [one for one in read_rows(output) if str(one["key"]).startswith("k")] == before


def test_rows_of_a_large_shard_are_not_kept_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "MAX_SMALL_SHARDS", 1)
    (output := Output(tmp_path / "out")).create()
    for n in range(3):
        write_rows(output, make_row(f"k{n}", answer=os.urandom(20_000).hex()))
    small = {name: output.requests.read(name) for name in output.requests.list_names("")}
    compact_shards(output)
    monkeypatch.setattr(compaction, "TARGET_BYTES", sum(map(len, small.values())))  # what was gathered is large now
    for name, data in small.items():
        output.requests.put(name, data)
    compact_shards(output)
    assert [one["key"] for one in read_rows(output)] == ["k0", "k1", "k2"]


def test_a_damaged_shard_stops_a_compaction_before_anything_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "MAX_SMALL_SHARDS", 1)
    (output := Output(tmp_path / "out")).create()
    for n in range(3):
        write_rows(output, make_row(f"k{n}"))
    output.requests.put("zz.parquet", b"PAR1")
    before = output.requests.list_names("")
    with pytest.raises(DamagedShard, match=r"zz\.parquet is damaged"):
        compact_shards(output)
    assert output.requests.list_names("") == before


def test_a_reader_beside_a_compaction_sees_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader has listed the small shards, and they are removed before it opens them."""
    monkeypatch.setattr(compaction, "MAX_SMALL_SHARDS", 1)
    (output := Output(tmp_path / "out")).create()
    for n in range(3):
        write_rows(output, make_row(f"k{n}"))
    listed = FolderStore.list_names

    def late(folder: FolderStore, suffix: str) -> dict[str, int]:
        found = listed(folder, suffix)
        monkeypatch.setattr(FolderStore, "list_names", listed)
        compact_shards(output)
        return found

    monkeypatch.setattr(FolderStore, "list_names", late)
    assert [one["key"] for one in read_rows(output)] == ["k0", "k1", "k2"]
