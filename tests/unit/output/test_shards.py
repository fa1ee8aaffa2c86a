"""The output folder: job.yaml, shards and their damage, the ledger, the list of sources, the records."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DamagedShard, JobError, RunError
from pipeline.output import Output
from pipeline.output.compaction import compact_shards
from pipeline.output.ledger import LEDGER_SCHEMA, read_ledger_state, read_requests
from pipeline.output.shards import read_intact, read_shards, write_shard
from pipeline.output.sources import SOURCE_SCHEMA, read_sources, replace_sources, write_sources
from pipeline.storage.store import FolderStore
from tests.support.ledger import LedgerWriter

TABLE = pa.table({"key": ["a", "b"], "n": [1, 2]})


@pytest.fixture
def output(tmp_path: Path) -> Output:
    output = Output(tmp_path / "out")
    output.create()
    return output


def make_row(key: str | None, source: str = "a.pdf", **columns: object) -> dict[str, object]:
    return {"key": key, "attempt": 1, "source": source, "size_bytes": 5, "version": "1", "doc_id": "d", "page_count": 1, **columns}


def make_listing(*rows: dict[str, object], **extras: list[object]) -> pa.Table:
    """Return a list of sources as a run writes it: a manifest's columns stand before `doc_id` and `page_count`."""
    table = pa.Table.from_pylist([make_row(None) | {"doc_id": None, "page_count": None} | columns for columns in rows], SOURCE_SCHEMA)
    columns = {name: table[name] for name in ("source", "size_bytes", "version")} | extras
    return pa.table(columns).append_column("doc_id", table["doc_id"]).append_column("page_count", table["page_count"])


def list_folder(folder: FolderStore | Path) -> list[str]:
    return sorted(os.listdir(folder.path if isinstance(folder, FolderStore) else folder))


def write_test_shard(folder: FolderStore, table: pa.Table, keys: list[str]) -> Path:
    """Write a shard and return its file."""
    return folder.path / write_shard(folder, table, keys)


# --- the folder


def test_create_creates_the_folders(output: Output) -> None:
    assert list_folder(output.root.path) == ["records", "requests", "sources"]


@pytest.mark.parametrize("folder", [".", "sources", "requests", "records"])
def test_half_written_files_of_a_killed_run_are_removed(output: Output, folder: str) -> None:
    left = output.root.path / folder / ".ab12.parquet.4711.tmp"
    left.write_bytes(b"PAR1")
    output.remove_leftovers()
    assert not left.exists()


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(JobError, match="cannot write to the output folder"):
        Output(tmp_path / "out").create()


def test_a_fresh_folder_has_no_job(output: Output) -> None:
    assert output.read_job() is None


def test_the_job_comes_back_as_it_was_written(output: Output) -> None:
    content = {"job": {"name": "ü", "sampling": {"temperature": 0.0}}, "fingerprint": "ab", "asked": {"prompt": "two\nlines: …\t#"}}
    output.write_job(content)
    assert output.read_job() == content


@pytest.mark.parametrize("text", ["name: invoices\nsource: {paths: [in]}\n", "- a\n", "just text", "job: {}\n"])
def test_a_job_file_of_the_users_own_is_refused_and_stays(output: Output, text: str) -> None:
    file = output.root.path / "job.yaml"
    file.write_text(text)
    with pytest.raises(JobError, match=r"job\.yaml was not written by a run: choose another output folder"):
        output.read_job()
    assert file.read_text() == text


@pytest.mark.parametrize("content", [b"job: [", b"\xff\xfe\x00"])
def test_a_broken_job_file_is_named(output: Output, content: bytes) -> None:
    (output.root.path / "job.yaml").write_bytes(content)
    with pytest.raises(JobError, match=r"cannot read .*job\.yaml"):
        output.read_job()


# --- shards


def test_a_shard_reads_back(output: Output) -> None:
    file = write_test_shard(output.records, TABLE, ["a", "b"])
    assert pq.read_table(file) == TABLE


def test_the_same_keys_in_any_order_overwrite_themselves(output: Output) -> None:
    first = write_test_shard(output.records, TABLE, ["a", "b"])
    assert write_test_shard(output.records, TABLE, ["b", "a"]) == first
    assert list_folder(output.records) == [first.name]


def test_other_keys_make_another_shard(output: Output) -> None:
    assert write_test_shard(output.records, TABLE, ["a", "b"]) != write_test_shard(output.records, TABLE, ["a"])


def test_a_shard_written_twice_has_the_same_bytes(output: Output) -> None:
    first = write_test_shard(output.records, TABLE, ["a", "b"]).read_bytes()
    assert write_test_shard(output.records, TABLE, ["a", "b"]).read_bytes() == first


def test_a_full_disk_leaves_no_half_shard_and_the_old_one_whole(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_test_shard(output.records, TABLE, ["a"])

    def full(_: int) -> None:  # as on a full network disk; quotas and tmpfs fail at the write already
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*: No space left on device; free disk space and run the same command again"):
        write_test_shard(output.records, TABLE.slice(1), ["a"])
    assert list_folder(output.records) == [file.name]
    assert pq.read_table(file) == TABLE


def test_writing_to_a_removed_folder_is_a_run_error(output: Output) -> None:
    output.records.path.rmdir()
    with pytest.raises(RunError, match="No such file or directory; fix the cause and run the same command again"):
        write_test_shard(output.records, TABLE, ["a"])


def test_a_damaged_shard_is_named(output: Output) -> None:
    file = write_test_shard(output.requests, TABLE, ["a"])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DamagedShard, match=f"the shard .*{file.name} is damaged .*: it is set aside"):
        read_shards(output.requests, None, LEDGER_SCHEMA)


def test_a_shard_of_something_else_is_damaged(output: Output) -> None:
    write_test_shard(output.requests, TABLE, ["a"])
    with pytest.raises(DamagedShard, match="it lacks the columns answer, asks, attempt"):
        read_shards(output.requests, None, LEDGER_SCHEMA)


@pytest.mark.parametrize("part", range(16))
def test_a_byte_that_someone_changed_is_noticed_or_changes_nothing(output: Output, part: int) -> None:
    table = pa.Table.from_pylist([make_row(f"k{n}", answer=f'{{"total":{n}}}', status="extracted") for n in range(50)], LEDGER_SCHEMA)
    file = write_test_shard(output.requests, table, ["a"])
    data = bytearray(file.read_bytes())
    data[len(data) * part // 16 + 75] ^= 0x10  # not every byte: 1 in 80, of statistics and names in the footer, has no checksum
    file.write_bytes(data)
    try:
        found = read_shards(output.requests, None, LEDGER_SCHEMA)
    except DamagedShard:
        return
    assert found == table


def test_a_damaged_shard_is_set_aside_and_the_rest_is_read(output: Output) -> None:
    good = write_test_shard(output.requests, pa.Table.from_pylist([make_row("k1", status="extracted")], LEDGER_SCHEMA), ["k1"])
    bad = write_test_shard(output.requests, pa.Table.from_pylist([make_row("k2", status="extracted")], LEDGER_SCHEMA), ["k2"])
    bad.write_bytes(b"PAR1")
    damaged: list[str] = []
    read_intact(output, damaged, lambda: read_ledger_state(output))
    assert damaged == [str(bad)]
    assert list_folder(output.requests) == sorted([f".{bad.name}.damaged", good.name])
    assert read_shards(output.requests, ["key"], LEDGER_SCHEMA)["key"].to_pylist() == ["k1"]


def test_no_shards_are_an_empty_table_of_the_schema(output: Output) -> None:
    assert read_shards(output.requests, ["key", "status"], LEDGER_SCHEMA).schema == pa.schema(
        [LEDGER_SCHEMA.field("key"), LEDGER_SCHEMA.field("status")]
    )


def test_a_folder_named_like_a_hive_partition_adds_no_column(tmp_path: Path) -> None:
    output = Output(tmp_path / "year=2024")
    output.create()
    write_test_shard(output.records, TABLE, ["a"])
    assert read_shards(output.records, None, TABLE.schema).column_names == TABLE.column_names


# --- the ledger


def test_the_ledger_holds_what_was_added(output: Output) -> None:
    with LedgerWriter(output) as ledger:
        ledger.add(make_row("k1", status="extracted", answer="{}"))
        ledger.add(make_row("k2", status="failed"))
    table = read_shards(output.requests, None, LEDGER_SCHEMA)
    assert table.schema == LEDGER_SCHEMA
    assert table.select(["key", "status", "answer"]).to_pylist() == [
        {"key": "k1", "status": "extracted", "answer": "{}"},
        {"key": "k2", "status": "failed", "answer": None},
    ]


def test_a_document_without_a_request_is_identified_and_not_in_the_ledger(output: Output) -> None:
    with LedgerWriter(output) as ledger:
        ledger.add(make_row(None, doc_id="same"))
    assert list_folder(output.requests) == []
    assert read_sources(output)["doc_id"].to_pylist() == ["same"]


def test_requests_are_read_by_document(output: Output) -> None:
    with LedgerWriter(output) as ledger:
        for key, doc_id in (("k1", "a"), ("k2", "b"), ("k3", "c"), ("k4", None)):
            ledger.add(make_row(key, doc_id=doc_id))
    wanted = pa.chunked_array([["a", "b"]])
    assert read_requests(output, wanted)["key"].to_pylist() == ["k1", "k2"]


def test_requests_of_documents_without_a_doc_id_are_read(output: Output) -> None:
    with LedgerWriter(output) as ledger:
        ledger.add(make_row("k1", doc_id="a"))
        ledger.add(make_row("k2", doc_id=None))
    assert read_requests(output, pa.chunked_array([[None]], pa.string()))["key"].to_pylist() == ["k2"]


def test_tokens_are_not_read(output: Output) -> None:
    assert "tokens" not in read_requests(output, pa.chunked_array([["a"]])).column_names


# --- the list of sources


def test_doc_id_and_page_count_complete_a_listed_source(output: Output) -> None:
    write_sources(output, make_listing({"source": "a.pdf"}, {"source": "b.pdf"}))
    with LedgerWriter(output) as ledger:
        ledger.add(make_row("k1", "b.pdf", doc_id="bb", page_count=7))
    assert read_sources(output).to_pylist() == [
        {"source": "a.pdf", "size_bytes": 5, "version": "1", "doc_id": None, "page_count": None, "full_url": None},
        {"source": "b.pdf", "size_bytes": 5, "version": "1", "doc_id": "bb", "page_count": 7, "full_url": None},
    ]


def test_a_list_of_sources_of_the_first_version_is_read(output: Output) -> None:
    write_test_shard(output.sources, make_listing({"source": "a.pdf"}), ["a.pdf"])
    assert "full_url" not in pq.read_schema(next(output.sources.path.iterdir())).names
    assert read_sources(output)["full_url"].to_pylist() == [None]


@pytest.mark.parametrize("name", [f"{n}.pdf" for n in range(8)])
def test_a_source_that_could_not_be_read_has_a_page_count(output: Output, name: str) -> None:
    write_sources(output, make_listing({"source": name}))
    with LedgerWriter(output) as ledger:  # the names of the two shards come in either order
        ledger.add(make_row("k1", name, doc_id=None, page_count=0))
    assert read_sources(output)["page_count"].to_pylist() == [0]


@pytest.mark.parametrize("name", [f"{n}.pdf" for n in range(8)])
def test_a_manifests_columns_stay_with_a_source_that_was_identified(output: Output, name: str) -> None:
    write_sources(output, make_listing({"source": name}, {"source": "other"}, customer=[None, "ACME"], tags=[["x"], None]))
    with LedgerWriter(output) as ledger:
        ledger.add(make_row("k1", name, doc_id="bb"))
    found = read_sources(output).select(["source", "doc_id", "customer", "tags"]).to_pylist()
    assert found == [
        {"source": name, "doc_id": "bb", "customer": None, "tags": ["x"]},
        {"source": "other", "doc_id": None, "customer": "ACME", "tags": None},
    ]


def test_replacing_the_sources_leaves_one_shard(output: Output) -> None:
    write_sources(output, make_listing({"source": "gone"}))
    replace_sources(output, make_listing({"source": "a"}, {"source": "b"}))
    assert read_sources(output)["source"].to_pylist() == ["a", "b"]
    assert len(list_folder(output.sources)) == 1


# --- records


def test_records_of_an_earlier_settle_pass_are_removed(output: Output) -> None:
    old, new = (write_test_shard(output.records, TABLE, [key]) for key in ("old", "new"))
    output.remove_other_records({new.name})
    assert not old.exists()
    assert new.exists()


# --- ledgers of older versions


def write_old_ledger(output: Output, count: int) -> None:
    """Write shards of one request each as version 0.1.0 did, whose pages do not say what drew them."""
    place = LEDGER_SCHEMA.get_field_index("pages")
    old_page = pa.struct([field for field in LEDGER_SCHEMA.field(place).type.value_type if field.name != "renderer"])
    old = LEDGER_SCHEMA.set(place, pa.field("pages", pa.list_(old_page)))
    for number in range(count):
        row = make_row(f"old{number}", pages=[{"page_no": 1, "width_px": 28, "height_px": 28, "dpi": 200.0, "visual_tokens": 1}])
        write_shard(output.requests, pa.Table.from_pylist([row], old), [f"old{number}"])


@pytest.mark.parametrize("count", [1, 70])
def test_an_old_ledger_is_read_beside_a_new_one(output: Output, count: int) -> None:
    write_old_ledger(output, count)
    before = read_requests(output, pa.chunked_array([["d"]])).to_pylist()
    assert {page.get("renderer") for row in before for page in row["pages"]} == {None}
    with LedgerWriter(output) as writer:
        writer.add(make_row("new", pages=[{"page_no": 1, "renderer": "pdfium"}]))  # type: ignore[arg-type]
    assert (compact_shards(output) > 0) == (count > 64)
    after = read_requests(output, pa.chunked_array([["d"]])).to_pylist()
    assert len(after) == count + 1
    assert {row["key"] for row in after if row["pages"][0]["renderer"] == "pdfium"} == {"new"}


def test_shards_of_an_older_version_are_read_by_columns_that_they_lack(output: Output) -> None:
    row = {"key": "k", "attempt": 1, "source": "a.pdf", "doc_id": "d", "status": "extracted"}
    table = pa.Table.from_pylist([row], LEDGER_SCHEMA).drop_columns("page_failures")
    write_shard(output.requests, table, ["k"])
    read_ledger_state(output)  # raises DamagedShard for one
    assert read_requests(output, pa.chunked_array([["d"]])).select(["key", "page_failures"]).to_pylist() == [
        {"key": "k", "page_failures": None}
    ]


def test_a_shard_that_lacks_another_column_is_damaged(output: Output) -> None:
    write_shard(output.requests, pa.table({"key": ["k"]}), ["k"])
    damaged: list[str] = []
    read_intact(output, damaged, lambda: read_shards(output.requests, None, LEDGER_SCHEMA))
    assert [file.startswith(str(output.requests)) for file in damaged] == [True]
