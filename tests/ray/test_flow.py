"""Runs on Ray, without a model: a folder of documents becomes a folder of results, also after crashes, damage, changes and retries."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pymupdf
import pytest
import yaml
from PIL import Image
from ray.exceptions import RayError

from pipeline import cluster, engines, flow
from pipeline.engines import Engine
from pipeline.errors import DamagedShard, DocumentError, EngineDead, JobError, RunError
from pipeline.flow import ask_pass, pending, preparation, watchdog
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.ledger import read_ledger_state
from pipeline.output.sources import read_sources
from pipeline.output.status import read_status
from pipeline.records import Completion, Request
from pipeline.report import ExitCode, Phase, Progress, Report
from tests.support.engines import InkEngine
from tests.support.held_server import HeldAnswer, serve_held
from tests.support.pdfs import make_page_pdf, make_tree_pdf
from tests.support.ray_actors import InkActor
from tests.support.stages import make_settle_stage
from tests.support.workspace import PASSWORD, SCHEMA, Workspace, draw_slip

pytestmark = pytest.mark.usefixtures("ray_session")
PATIENCE_S = 120
MANIFEST = "path,customer\nin/a.pdf,0042\nin/b.pdf,\nin/c.pdf,ACME\n"


class FailingEngine(InkEngine):
    """Fails every request until there is a file called `well` beside the job."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    async def complete(self, request: Request) -> Completion:
        if not (self.folder / "well").exists():
            self.fail(request)
        return await super().complete(request)

    def fail(self, request: Request) -> None:
        raise DocumentError("engine", "the kernel returned nonsense")


class DyingEngine(FailingEngine):
    """Answers one request; the second one kills it, as a CUDA error does."""

    def fail(self, request: Request) -> None:
        self.requests.append(request)
        if len(self.requests) > 1:
            raise EngineDead("the GPU has fallen off the bus")


class UnloadableActor(InkActor):
    def load(self, job: Job, threads: int) -> Engine:
        raise RunError("there is no memory for the weights")


class FailingActor(InkActor):
    def load(self, job: Job, threads: int) -> Engine:
        return FailingEngine(job.file.parent)


class DyingActor(InkActor):
    def load(self, job: Job, threads: int) -> Engine:
        return DyingEngine(job.file.parent)


class SlowEngine(InkEngine):
    """Leaves a file for the process that it was loaded in, and answers when there are two of them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        (folder / f"{os.getpid()}.actor").touch()

    async def complete(self, request: Request) -> Completion:
        deadline = time.monotonic() + PATIENCE_S
        while len(list(self.folder.glob("*.actor"))) < 2 and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        return await super().complete(request)


class SlowActor(InkActor):
    def load(self, job: Job, threads: int) -> Engine:
        return SlowEngine(job.file.parent)


class PoisonedEngine(InkEngine):
    """Is ended by a black page, as by a fault in a kernel: at once, or when it says so."""

    async def complete(self, request: Request) -> Completion:
        pixels = request.messages[1].parts[0]
        if not isinstance(pixels, str) and (pixels < 128).mean() > 0.5:
            self.end()
        await asyncio.sleep(0.05)
        return await super().complete(request)

    def end(self) -> None:
        os._exit(1)


class PoisonedActor(InkActor):
    def load(self, job: Job, threads: int) -> Engine:
        return PoisonedEngine()


class HungEngine(PoisonedEngine):
    """Hangs at a black page, and answers nothing from then on."""

    hung_s = 0.0

    def end(self) -> None:
        self.hung_s = time.monotonic()
        raise asyncio.CancelledError

    async def complete(self, request: Request) -> Completion:
        try:
            completion = await super().complete(request)
        except asyncio.CancelledError:
            await asyncio.Event().wait()
            raise AssertionError from None
        while self.hung_s:
            await asyncio.sleep(1)
        return completion

    def measure_silence_s(self) -> float:
        return time.monotonic() - self.hung_s if self.hung_s else 0.0


class HungActor(InkActor):
    def load(self, job: Job, threads: int) -> Engine:
        return HungEngine()


class LongAnswersEngine(InkEngine):
    """Answers documents of two pages when it has answered all those of one page, as if the former's answers were that long."""

    SHORT = 30

    def __init__(self) -> None:
        super().__init__()
        self.short, self.is_over = 0, asyncio.Event()

    async def complete(self, request: Request) -> Completion:
        if sum(not isinstance(part, str) for part in request.messages[1].parts) == 2:
            try:
                await asyncio.wait_for(self.is_over.wait(), PATIENCE_S / 2)
            except TimeoutError:
                raise DocumentError("engine", f"only {self.short} short answers were asked for") from None
        else:
            self.short += 1
            if self.short == self.SHORT:
                self.is_over.set()
        return await super().complete(request)


class LongAnswersActor(InkActor):
    def load(self, job: Job, threads: int) -> Engine:
        return LongAnswersEngine()


class SilentEngine(InkEngine):
    """Never answers."""

    async def complete(self, request: Request) -> Completion:
        await asyncio.Event().wait()
        raise AssertionError


class SilentActor(InkActor):
    def load(self, job: Job, threads: int) -> Engine:
        return SilentEngine()


class TwoAnswersEngine(InkEngine):
    """Answers two requests and no more."""

    async def complete(self, request: Request) -> Completion:
        self.requests.append(request)
        if len(self.requests) > 2:
            await asyncio.Event().wait()
        return await super().complete(request)


class TwoAnswersActor(InkActor):
    def load(self, job: Job, threads: int) -> Engine:
        return TwoAnswersEngine()


@pytest.fixture(autouse=True)
def use_ink_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer without a model, unless a test sets another actor."""
    monkeypatch.setattr(ask_pass, "EngineActor", InkActor)


# --- what the tests read and write


def read_records(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Return the records by file name, which each must have one of."""
    rows = pq.read_table(workspace.folder / "out" / "records").to_pylist()
    found = {Path(row["_source"]).name: row for row in rows}
    assert len(found) == len(rows)
    return found


def read_ledger(workspace: Workspace) -> list[dict[str, Any]]:
    """Return the rows of the requests, whose attempts must differ, in the order of source, page and attempt."""
    folder = workspace.folder / "out" / "requests"
    rows: list[dict[str, Any]] = pq.read_table(folder).to_pylist() if list(folder.glob("*")) else []
    assert len({(row["key"], row["attempt"]) for row in rows}) == len(rows)
    return sorted(rows, key=lambda row: (row["source"], row["first_page"], row["attempt"]))


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def draw_image(kind: str, *pages: int) -> bytes:
    """Return slips as an image file; more than one page is a TIFF."""
    drawn = [pymupdf.open(stream=draw_slip(page), filetype="pdf")[0].get_pixmap(dpi=200) for page in pages]
    images = [Image.frombytes("RGB", (image.width, image.height), image.samples) for image in drawn]
    file = io.BytesIO()
    images[0].save(file, kind, **({"save_all": True, "append_images": images[1:]} if kind == "TIFF" else {}))
    return file.getvalue()


def lock_slip(password: str) -> bytes:
    document = pymupdf.open(stream=draw_slip(7), filetype="pdf")
    return bytes(document.tobytes(encryption=pymupdf.PDF_ENCRYPT_AES_256, owner_pw="owner", user_pw=password))


# --- one run over files of all kinds


@pytest.fixture(scope="module")
def finished(ray_session: cluster.Resources, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workspace, Job, Report]]:
    """A run over ten files, three of which cannot be read."""
    workspace = Workspace(tmp_path_factory.mktemp("finished"))
    files = {"good.pdf": draw_slip(1), "twin.pdf": draw_slip(1), "photo.jpg": draw_image("JPEG", 2), "fax.tif": draw_image("TIFF", 3, 4)}
    files |= {"long.pdf": draw_slip(1, 2, 3, 4, 5), "name with\nä newline.pdf": draw_slip(6), "known.pdf": lock_slip(PASSWORD)}
    files |= {"unknown.pdf": lock_slip("another"), "empty.pdf": b"", "letter.pdf": b"Dear Sir or Madam"}
    for name, data in files.items():
        workspace.put(name, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ask_pass, "EngineActor", InkActor)
        patch.setenv("SLIP_PASSWORD", PASSWORD)
        job = workspace.job("pages.per_request=2", "source.password_env=SLIP_PASSWORD")
        yield workspace, job, flow.run(job)


@pytest.fixture
def finished_copy(finished: tuple[Workspace, Job, Report], tmp_path: Path) -> tuple[Workspace, Job]:
    """A copy of that run's folder, which a test may change."""
    shutil.copytree(finished[0].folder, tmp_path / "copy", copy_function=shutil.copy2)
    workspace = object.__new__(Workspace)
    workspace.folder, workspace.file, workspace.inputs = tmp_path / "copy", tmp_path / "copy" / "job.yaml", tmp_path / "copy" / "in"
    return workspace, workspace.job("pages.per_request=2", "source.password_env=SLIP_PASSWORD")


def test_every_file_has_its_record(finished: tuple[Workspace, Job, Report]) -> None:
    workspace, _, report = finished
    assert {name: row["_status"] for name, row in read_records(workspace).items()} == {
        name: "failed" if name in ("unknown.pdf", "empty.pdf", "letter.pdf") else "extracted" for name in os.listdir(workspace.inputs)
    }
    assert (report.documents, report.records, report.statuses) == (10, 10, {"extracted": 7, "failed": 3})


def test_what_cannot_be_read_says_why(finished: tuple[Workspace, Job, Report]) -> None:
    workspace, _, report = finished
    kinds = {name: row["_failure"]["kind"] for name, row in read_records(workspace).items() if row["_failure"]}
    assert kinds == {"unknown.pdf": "encrypted", "empty.pdf": "empty", "letter.pdf": "unrecognised"}
    assert report.failures == {"render/empty": 1, "render/encrypted": 1, "render/unrecognised": 1}


def test_some_failures_are_exit_code_1(finished: tuple[Workspace, Job, Report]) -> None:
    assert (finished[2].exit_code, finished[2].missing) == (ExitCode.DOCUMENTS_FAILED, [])


def test_the_report_is_written(finished: tuple[Workspace, Job, Report]) -> None:
    _, job, report = finished
    assert json.loads((job.output / "report.json").read_text()) == report.as_dict()
    assert (report.requests_asked, report.pages_asked, report.prompt_tokens) == (8, 11, 8 * 300)


def test_two_files_of_the_same_bytes_are_asked_once(finished: tuple[Workspace, Job, Report]) -> None:
    good, twin = (read_records(finished[0])[name] for name in ("good.pdf", "twin.pdf"))
    assert good["_doc_id"] == twin["_doc_id"]
    assert {**good, "_source": ""} == {**twin, "_source": ""}
    assert sum(row["doc_id"] == good["_doc_id"] for row in read_ledger(finished[0])) == 1


def test_a_long_document_is_split_and_merged(finished: tuple[Workspace, Job, Report]) -> None:
    row = read_records(finished[0])["long.pdf"]
    assert (row["_pages"], row["_requests"], row["_visual_tokens"]) == (5, 3, 5 * 256)
    assert sorted((r["first_page"], r["last_page"]) for r in read_ledger(finished[0]) if r["doc_id"] == row["_doc_id"]) == [
        (1, 2),
        (3, 4),
        (5, 5),
    ]
    assert row["total"] == read_records(finished[0])["good.pdf"]["total"]
    assert [(d["kept_page"], d["other_page"]) for d in row["_disagreements"]] == [(1, 3), (1, 5)]


def test_a_fax_has_pages(finished: tuple[Workspace, Job, Report]) -> None:
    row = read_records(finished[0])["fax.tif"]
    assert (row["_pages"], row["_requests"]) == (2, 1)


def test_the_job_is_kept_without_the_password(finished: tuple[Workspace, Job, Report]) -> None:
    workspace, job, _ = finished
    kept = Output(job.output).read_job()
    assert kept is not None
    assert (kept["job"]["source"]["password_env"], kept["fingerprint"]) == ("SLIP_PASSWORD", read_ledger(workspace)[0]["fingerprint"])
    assert not [name for name, data in read_files(job.output).items() if PASSWORD.encode() in data]


def test_the_columns_are_what_check_says(finished: tuple[Workspace, Job, Report]) -> None:
    _, job, _ = finished
    (file,) = (job.output / "records").iterdir()
    assert pq.read_schema(file).equals(make_settle_stage(job, pa.schema([])).plan.schema)


def test_a_second_run_asks_nothing_and_changes_nothing(finished_copy: tuple[Workspace, Job], monkeypatch: pytest.MonkeyPatch) -> None:
    _, job = finished_copy
    described = yaml.safe_load((job.output / "job.yaml").read_text()) | {"file": str(job.file)}  # the copy has it elsewhere
    monkeypatch.setenv("SLIP_PASSWORD", PASSWORD)
    monkeypatch.setattr(ask_pass, "AskPass", None)  # a call fails
    before = read_files(job.output)
    report = flow.run(job)
    after = read_files(job.output)
    assert (report.requests_asked, report.pages_asked, report.statuses) == (0, 0, {"extracted": 7, "failed": 3})
    changed = {"job.yaml", "report.json", "report.html"}  # the page names the folder, which is the copy's
    assert {name for name in after if after[name] != before.get(name)} == changed
    assert yaml.safe_load((job.output / "job.yaml").read_text()) == described
    assert before.keys() == after.keys()


def test_settling_again_restores_the_records(finished_copy: tuple[Workspace, Job]) -> None:
    _, job = finished_copy
    before = read_files(job.output / "records")
    shutil.rmtree(job.output / "records")
    report = flow.settle(job)
    assert read_files(job.output / "records") == before
    assert (report.documents, report.records, report.requests_asked, report.exit_code) == (10, 10, 0, ExitCode.DOCUMENTS_FAILED)


def test_settling_follows_a_schema_that_has_changed(finished_copy: tuple[Workspace, Job]) -> None:
    workspace, _ = finished_copy
    strict = SCHEMA["properties"] | {"currency": {"enum": ["USD", None]}}  # type: ignore[operator]
    (workspace.folder / "schema.json").write_text(json.dumps(SCHEMA | {"properties": strict}))
    report = flow.settle(workspace.job("pages.per_request=2", "source.password_env=SLIP_PASSWORD"))
    assert report.statuses == {"failed": 3, "invalid": 7}


def test_what_a_killed_run_left_is_cleared_away(finished_copy: tuple[Workspace, Job], monkeypatch: pytest.MonkeyPatch) -> None:
    _, job = finished_copy
    monkeypatch.setenv("SLIP_PASSWORD", PASSWORD)
    left = [job.output / name for name in (".job.yaml.1.tmp", "requests/.x.parquet.1.tmp", "records/.x.parquet.1.tmp")]
    for file in left:
        file.write_bytes(b"PAR1")
    flow.run(job)
    assert not [file for file in left if file.exists()]


@pytest.mark.parametrize(
    ("setting", "message"),
    [("sampling.seed=32", "sampling.seed"), ("pages.per_request=3", "pages.per_request"), ("extract.instructions=Go", "prompt")],
)
def test_another_job_into_the_same_folder_is_refused(finished_copy: tuple[Workspace, Job], setting: str, message: str) -> None:
    workspace, job = finished_copy
    before = read_files(job.output)
    with pytest.raises(JobError, match=f"holds answers to another job: {message} changed since"):
        flow.run(workspace.job("pages.per_request=2", setting))
    assert read_files(job.output) == before


def test_settling_another_job_is_refused(finished_copy: tuple[Workspace, Job]) -> None:
    with pytest.raises(JobError, match=r"has changed since .* was asked: sampling\.max_tokens"):
        flow.settle(finished_copy[0].job("pages.per_request=2", "sampling.max_tokens=32"))


@pytest.mark.parametrize("folder", ["requests", "sources", "records"])
def test_a_damaged_shard_is_made_anew(finished_copy: tuple[Workspace, Job], monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """In the ledger it costs asking again what it held; the listing and the records cost nothing."""
    workspace, job = finished_copy
    monkeypatch.setenv("SLIP_PASSWORD", PASSWORD)
    before, shard = read_files(job.output / "records"), next((job.output / folder).iterdir())
    lost = [row for row in pq.read_table(shard).to_pylist() if row.get("asks")]
    shard.write_bytes(shard.read_bytes()[:-40])
    report = flow.run(job)
    assert (report.damaged, report.requests_asked) == ([str(shard)] if folder != "records" else [], len(lost))
    assert read_files(job.output / "records") == before
    assert len(read_ledger(workspace)) == 11


def test_a_shard_whose_answers_are_damaged_is_found_when_it_is_settled(
    finished_copy: tuple[Workspace, Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys can be read, so that nothing is amiss before, and nothing is while its records need not be written again."""
    workspace, job = finished_copy
    monkeypatch.setenv("SLIP_PASSWORD", PASSWORD)
    shards = (job.output / "requests").iterdir()  # a slow run leaves several, one of which may have no answer
    before, shard = read_files(job.output / "records"), next(file for file in shards if any(pq.read_table(file)["answer"].to_pylist()))
    group = pq.ParquetFile(shard).metadata.row_group(0)
    column = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "answer")
    data = bytearray(shard.read_bytes())
    start = min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset)
    data[start + column.total_compressed_size - 1] ^= 0x01  # the end of the last page, which is no header
    shard.write_bytes(data)
    assert flow.settle(job).damaged == []
    (job.output / "settled.json").unlink()
    with pytest.raises(DamagedShard, match=f"{shard.name} is damaged"):
        flow.settle(job)
    assert flow.run(job).damaged == [str(shard)]
    assert read_files(job.output / "records") == before
    assert len(read_ledger(workspace)) == 11


# --- before anything has started


@pytest.mark.parametrize("by_link", [False, True])
def test_what_a_run_wrote_is_no_source_of_the_next(workspace: Workspace, tmp_path: Path, by_link: bool) -> None:
    workspace.put("a.pdf")
    (workspace.folder / "out" / "records").mkdir(parents=True)
    (workspace.folder / "out" / "records" / "shard.parquet").write_bytes(b"PAR1")
    (tmp_path / "link").symlink_to(workspace.folder)
    job = Job.load(tmp_path / "link" / "job.yaml" if by_link else workspace.file, ["source.paths=['**/*.p*']"])
    assert pending.list_documents(job)["source"].to_pylist() == ["in/a.pdf"]


def test_there_is_nothing_to_settle_in_a_fresh_folder(workspace: Workspace) -> None:
    with pytest.raises(JobError, match="there is nothing to settle in"):
        flow.settle(workspace.job())


def test_a_run_killed_before_it_listed_anything_settles_to_nothing(workspace: Workspace) -> None:
    workspace.put("a.pdf")
    job = engines.resolve_engine(workspace.job(), 0)
    (output := Output(job.output)).create()
    output.write_job(preparation.describe_run(job))
    report = flow.settle(workspace.job())
    assert (report.documents, report.records, report.exit_code) == (0, 0, ExitCode.OK)


def test_actors_that_will_never_fit_are_refused(workspace: Workspace) -> None:
    workspace.put("a.pdf")
    with pytest.raises(JobError, match=r"ray\.actors is 3, each with 99 CPUs and .* for rendering; there are"):
        flow.run(workspace.job("ray.actors=3", "ray.cpus_per_actor=99"))
    assert not (workspace.folder / "out").exists()


def test_a_pool_grows_while_all_its_actors_are_busy(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for page in range(20):
        workspace.put(f"{page}.pdf", draw_slip(page))
    monkeypatch.setattr(ask_pass, "EngineActor", SlowActor)
    report = flow.run(workspace.job("ray.actors=[1, 2]", "ray.cpus_per_actor=0.5", "model.batch_size=1"))
    assert report.statuses == {"extracted": 20}
    assert len(list(workspace.folder.glob("*.actor"))) == 2


def test_twins_are_asked_once_and_what_fails_again_is_retried_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of one document, on several renderers."""
    for number, name in enumerate(("a.pdf", "b.pdf", "c.pdf")):
        workspace.put(name, draw_slip(number))
    workspace.put("d.pdf", draw_slip(0))
    workspace.put("e.pdf", b"")
    workspace.put("0.pdf", b"")
    monkeypatch.setattr(ask_pass, "MAX_BLOCK_DOCUMENTS", 1)
    seen: list[Progress] = []
    report = flow.run(workspace.job(), on_progress=seen.append)
    assert (report.requests_asked, report.statuses) == (3, {"extracted": 4, "failed": 2})
    asking = [now for now in seen if now.phase is Phase.ASKING]
    assert (asking[-1].documents, asking[-1].documents_done) == (6, 6)
    assert flow.run(workspace.job(), retry="failed").requests == {"failed": 1}
    assert len(read_ledger(workspace)) == 3 + 2


# --- a folder over time


def test_a_folder_is_kept_up_to_date(workspace: Workspace) -> None:
    """Three files of a manifest: the first alone at first, then one changes unseen, one visibly, and one goes."""
    for name in ("a.pdf", "b.pdf", "c.pdf"):
        workspace.put(name)
    (workspace.folder / "list.csv").write_text(MANIFEST)
    job = workspace.job("source.paths=[list.csv]")
    assert flow.run(job, limit=1).statuses == {"extracted": 1}
    assert list(read_records(workspace)) == ["a.pdf"]
    assert flow.run(job, limit=3).requests_asked == 2
    before = read_records(workspace)
    assert [row["customer"] for row in before.values()] == ["0042", None, "ACME"]

    seen = (workspace.inputs / "a.pdf").stat()
    (workspace.inputs / "a.pdf").write_bytes(b"x" * seen.st_size)
    os.utime(workspace.inputs / "a.pdf", ns=(seen.st_atime_ns, seen.st_mtime_ns))
    workspace.put("b.pdf", draw_slip(77))
    (workspace.folder / "list.csv").write_text(MANIFEST.replace("in/c.pdf,ACME\n", ""))
    assert flow.run(job).requests_asked == 1
    after = read_records(workspace)
    assert after.keys() == {"a.pdf", "b.pdf"}
    assert after["a.pdf"] == before["a.pdf"]
    assert after["b.pdf"]["_doc_id"] != before["b.pdf"]["_doc_id"]
    assert after["b.pdf"]["total"] != before["b.pdf"]["total"]


def test_a_stopped_run_keeps_its_answers_and_goes_on_later(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pages, a record each, of which an engine answers two at first; stopped when these are in the ledger."""
    workspace.put("a.pdf", draw_slip(1, 2, 3, 4, 5))
    job = workspace.job("extract.per=page", "model.batch_size=1")

    def stop(now: Progress) -> None:
        if now.requests_done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ask_pass, "EngineActor", TwoAnswersActor)
        with pytest.raises(KeyboardInterrupt):
            flow.run(job, on_progress=stop)
    assert len(read_ledger(workspace)) == 2
    flow.settle(job)
    assert sorted(pq.read_table(job.output / "records")["_status"].to_pylist()) == ["extracted"] * 2 + ["failed"] * 3

    report = flow.run(job)
    rows = pq.read_table(job.output / "records").to_pylist()
    assert (report.requests_asked, len(read_ledger(workspace))) == (3, 5)
    assert [(row["_page"], row["_status"]) for row in rows] == [(page, "extracted") for page in range(1, 6)]
    assert len({row["total"] for row in rows}) == 5


def test_failures_alone_have_the_columns_of_any_run(workspace: Workspace, finished: tuple[Workspace, Job, Report]) -> None:
    workspace.put("empty.pdf", b"")
    (workspace.folder / "list.txt").write_text("in/empty.pdf\nin/gone.pdf\n")
    job = engines.resolve_engine(workspace.job("source.paths=[list.txt]"), 0)
    report = flow.run(job)
    assert (report.statuses, report.requests_asked) == ({"failed": 2}, 0)
    schemas = [pq.read_schema(next((output / "records").iterdir())) for output in (job.output, finished[1].output)]
    assert schemas[0].equals(schemas[1])
    done = read_ledger_state(Output(job.output))
    assert pending.select_unanswered(job, read_sources(Output(job.output)), done).num_rows == 0


# --- an engine that fails


def test_a_run_whose_engine_does_not_load_goes_on_later(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.put("a.pdf", draw_slip(1, 2, 3))
    monkeypatch.setattr(ask_pass, "EngineActor", UnloadableActor)
    with pytest.raises(RunError, match=r"^there is no memory for the weights$"):
        flow.run(workspace.job())
    monkeypatch.setattr(ask_pass, "EngineActor", InkActor)
    assert flow.run(workspace.job()).statuses == {"extracted": 1}


def test_an_engine_that_dies_is_replaced_and_dies_once_too_often(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process of it answers at most one page of nine, in batches of one, and dies of the next; two are not enough."""
    workspace.put("a.pdf", draw_slip(*range(9)))
    job = workspace.job("pages.per_request=1", "model.batch_size=1", "ray.max_restarts=1")
    monkeypatch.setattr(ask_pass, "EngineActor", DyingActor)
    with pytest.raises(RunError, match=r"died for the 2\. time, `ray.max_restarts` is 1: the GPU has fallen off the bus; the same command"):
        flow.run(job)
    asked_before = len(read_ledger(workspace))
    assert asked_before <= 2
    (workspace.folder / "well").touch()
    report = flow.run(job)
    assert (report.statuses, report.requests_asked) == ({"extracted": 1}, 9 - asked_before)
    assert [row["first_page"] for row in read_ledger(workspace)] == list(range(1, 10))


@pytest.mark.parametrize(
    ("actor", "last_words"),
    [
        (PoisonedActor, "its process ended without a message"),
        (HungActor, r"no token for \d s with \d+ requests? under way, `model.stall_s` is 2"),
    ],
)
def test_a_request_that_kills_its_engine_every_time_is_a_row_and_costs_no_other(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, actor: type, last_words: str
) -> None:
    monkeypatch.setattr(ask_pass, "EngineActor", actor)
    workspace.put("a.pdf", draw_slip(*range(12)))
    workspace.put("poison.pdf", make_page_pdf(200, 200, b"0 0 200 200 re f"))
    workspace.put("z.pdf", draw_slip(*range(12, 20)))
    report = flow.run(workspace.job("pages.per_request=1", "model.stall_s=2"))
    assert (report.exit_code, report.statuses, report.failures) == (1, {"extracted": 2, "failed": 1}, {"generate/engine_died": 1})
    ledger = {(row["source"], row["first_page"]): row for row in read_ledger(workspace)}
    assert len(ledger) == 21
    assert re.search(f"the engine died 3 times with this request, .*: {last_words}$", ledger["in/poison.pdf", 1]["failure"]["message"])


def test_a_run_in_which_nothing_moves_any_more_breaks_off(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.put("a.pdf")
    monkeypatch.setattr(ask_pass, "EngineActor", SilentActor)
    monkeypatch.setattr(watchdog, "NO_ANSWER_S", 3.0)  # of 30 minutes
    with pytest.raises(RunError, match=r"^the run stopped: no answer has come for 0.05 minutes; run the same command again to resume it$"):
        flow.run(workspace.job())


def test_a_run_that_fails_wholesale_is_stopped_and_its_failures_are_asked_again(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for page in range(12):
        workspace.put(f"{page}.pdf", draw_slip(page))
    monkeypatch.setattr(ask_pass, "EngineActor", FailingActor)
    job = workspace.job("limits.max_failure_ratio=0.5", "limits.min_requests=4", "model.batch_size=1")
    with pytest.raises(RunError, match=r"4 of the last 4 requests failed.* generate/engine: the kernel returned nonsense"):
        flow.run(job)
    assert 4 <= len(read_ledger(workspace)) <= 12  # those that fail in the first half second are one shard
    (workspace.folder / "well").touch()
    report = flow.run(job, retry="failed:engine")
    assert (report.requests_asked, report.statuses) == (12, {"extracted": 12})


# --- a document with a page that cannot be drawn


def test_a_page_that_cannot_be_drawn_costs_that_page(workspace: Workspace) -> None:
    leaf = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 400]>>"
    workspace.put("partly.pdf", make_tree_pdf("3 0 R 9 0 R 4 0 R 9 0 R", "/Count 4", leaf, leaf))
    workspace.put("whole.pdf")
    job = workspace.job("pages.per_request=3")
    report = flow.run(job)
    assert (report.exit_code, report.statuses, report.partial) == (ExitCode.DOCUMENTS_FAILED, {"extracted": 2}, 1)
    partly, whole = (read_records(workspace)[f"{name}.pdf"] for name in ("partly", "whole"))
    assert (partly["_partial"], [failure["page"] for failure in partly["_page_failures"]], partly["_requests"]) == (True, [2, 4], 1)
    assert (whole["_partial"], whole["_page_failures"]) == (False, [])
    assert read_status(Output(job.output))["partial"] == 1
    assert flow.settle(workspace.job("pages.per_request=3", "limits.partial=fail")).statuses == {"extracted": 1, "failed": 1}


# --- long answers


def test_long_answers_keep_no_short_one_from_being_asked_for(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """One renderer has eight blocks in hand, and each of the first eight has documents whose answers are the last of all."""
    for number in range(2 * LongAnswersEngine.SHORT):
        workspace.put(f"{number:02}.pdf", draw_slip(*range(number, number + 1 + number % 2)))
    monkeypatch.setattr(ask_pass, "EngineActor", LongAnswersActor)
    report = flow.run(workspace.job("pages.per_request=2", "model.batch_size=16", "limits.canary=0", "ray.renderers=1"))
    assert (report.failures, report.statuses) == ({}, {"extracted": 2 * LongAnswersEngine.SHORT})


# --- slow documents


class SlowDocument(HeldAnswer):
    asked, due = threading.Event(), threading.Event()
    content = draw_slip(12)


def test_a_document_that_is_slow_to_come_holds_up_no_other_block(workspace: Workspace) -> None:
    """One renderer has all blocks, and the first document of the first of them comes when those of all others are answered."""
    for number in range(12):
        workspace.put(f"{number:02}.pdf", draw_slip(number))

    def release(now: Progress) -> None:
        if now.requests_done >= 9:
            SlowDocument.due.set()

    with serve_held(SlowDocument) as address:
        paths = f"source.paths=[in, '{address}/slow.pdf']"
        job = workspace.job(paths, "source.allow_private=true", "limits.download_s=100", "limits.canary=0", "ray.renderers=1")
        report = flow.run(job, on_progress=release)
    assert report.statuses == {"extracted": 13}
    slow, *others = sorted(read_ledger(workspace), key=lambda row: row["source"].startswith("in/"))
    assert sum(row["started_at"] < slow["started_at"] for row in others) >= 9


# --- the first documents of a run


def test_a_run_whose_first_documents_fail_stops_and_the_same_command_goes_on(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for page in range(7):
        workspace.put(f"{page}.pdf", draw_slip(page))
    workspace.put("0-is-first-and-broken.pdf", b"nothing")
    monkeypatch.setattr(ask_pass, "EngineActor", FailingActor)
    job = workspace.job("limits.canary=4")
    with pytest.raises(
        RunError, match=r"3 of the 3 that reached the model failed or are invalid, .* allows 0\.8; generate/engine: the kernel"
    ):
        flow.run(job)
    assert [(row["source"], row["status"]) for row in read_ledger(workspace)] == [
        (f"in/{name}.pdf", "failed") for name in ("0-is-first-and-broken", "0", "1", "2")
    ]
    (workspace.folder / "well").touch()
    report = flow.run(job, retry="failed")
    assert (report.requests_asked, report.statuses) == (7, {"extracted": 7, "failed": 1})


def test_a_run_whose_first_documents_are_good_asks_them_once(workspace: Workspace) -> None:
    for page in range(5):
        workspace.put(f"{page}.pdf", draw_slip(page))
    report = flow.run(workspace.job("limits.canary=2"))
    assert (report.requests_asked, report.statuses) == (5, {"extracted": 5})


# --- the demonstration model in place of another


def test_the_stand_in_makes_a_failure_of_every_document_that_is_not_its_own(workspace: Workspace) -> None:
    workspace.put("sample.pdf")
    for name in ("a", "b"):
        workspace.put(f"{name}.pdf", make_page_pdf(content=f"BT /F 20 Tf 60 60 Td ({name}) Tj ET".encode()))
    report = flow.run(workspace.job("model.name=Qwen/Qwen2.5-VL-7B-Instruct-AWQ", "model.without_gpu=demo", "limits.max_failure_ratio=0.1"))
    assert (report.exit_code, report.failures, report.demonstration) == (ExitCode.DOCUMENTS_FAILED, {"generate/demo": 2}, True)
    assert {name: row["_status"] for name, row in read_records(workspace).items()} == {
        "sample.pdf": "extracted",
        "a.pdf": "failed",
        "b.pdf": "failed",
    }
    assert report.requests_asked == 1
    named = flow.run(Job.load(workspace.file, output=workspace.folder / "named"))
    assert (named.statuses, named.requests_asked) == ({"extracted": 3}, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ray::x()\n  File\npipeline.errors.JobError: no weights\n\nThe above exception was the direct cause\nX: b", "no weights"),
        ("ray::x()\ntorch.OutOfMemoryError: 3 GiB are free\n", "stopped: OutOfMemoryError: 3 GiB are free"),
        ("The actor died.\n\tclass_name: EngineActor", "stopped: The actor died."),
    ],
)
def test_what_a_worker_raised_is_said_in_a_sentence(text: str, message: str) -> None:
    assert str(cluster.convert_worker_error(RayError(text), "stopped: {}")) == message


# --- asking once more


def test_what_failed_is_asked_once_more_and_nothing_else(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.pdf", "b.pdf", "c.pdf"):
        workspace.put(name)
    workspace.put("locked.pdf", lock_slip(PASSWORD))
    workspace.put("empty.pdf", b"")
    assert flow.run(workspace.job()).failures == {"render/empty": 1, "render/encrypted": 1}
    monkeypatch.setenv("SLIP_PASSWORD", PASSWORD)
    job = workspace.job("source.password_env=SLIP_PASSWORD")
    assert flow.run(job).requests_asked == 0
    report = flow.run(job, retry="failed:encrypted")
    assert (report.requests_asked, report.failures) == (1, {"render/empty": 1})
    assert read_records(workspace)["locked.pdf"]["_status"] == "extracted"
    assert flow.run(job, retry="failed").requests_asked == 0
    tried = [(Path(row["source"]).name, row["attempt"], row["status"]) for row in read_ledger(workspace) if "empty" in row["source"]]
    assert tried == [("empty.pdf", 1, "failed"), ("empty.pdf", 2, "failed")]


def test_a_retry_of_nothing_known_is_refused(workspace: Workspace) -> None:
    workspace.put("a.pdf")
    with pytest.raises(JobError, match="retry is 'invalid'; allowed are failed"):
        flow.run(workspace.job(), retry="invalid")
    assert not (workspace.folder / "out").exists()
