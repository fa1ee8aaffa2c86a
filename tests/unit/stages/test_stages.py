"""Documents become requests, requests become answers, and whatever goes wrong becomes a row."""

from __future__ import annotations

import asyncio
import hashlib
import os
import pickle
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from pipeline.budget import RenderSettings
from pipeline.errors import DocumentError, EngineDead, JobError, RunError
from pipeline.records import SourceRow
from pipeline.render.sandbox import Sandbox
from pipeline.sources.http import DownloadPolicy
from pipeline.stages.ask import AskStage
from pipeline.stages.render import RenderPlan, RenderStage, make_render_settings
from pipeline.stages.requests import compute_document_keys, compute_request_key, split_pages
from tests.support.engines import CUT, INVALID, VALID, Reply, ScriptedEngine, list_texts, make_completion
from tests.support.held_server import HeldAnswer, serve_held
from tests.support.pdfs import make_page_pdf
from tests.support.stages import Row, claim_all, grant, make_render_plan, render_rows
from tests.support.workspace import Workspace, draw_slip, make_listing_row

SIZE = {"page_no": 1, "width_px": 28, "height_px": 28, "dpi": 200.0, "visual_tokens": 1, "warnings": []}
PLACE: Row = {"source": "a.pdf", "key": "k", "attempt": 2, "first_page": 1, "last_page": 1, "page_count": 1}
REQUEST: Row = PLACE | {"pages": [SIZE], "pixels": [np.zeros((28, 28, 3), np.uint8)]}


# --- names of requests


@pytest.mark.parametrize(("pages", "per_request", "expected"), [(1, 4, [(1, 1)]), (4, 4, [(1, 4)]), (9, 4, [(1, 4), (5, 8), (9, 9)])])
def test_a_document_is_asked_in_ranges(pages: int, per_request: int, expected: list[tuple[int, int]]) -> None:
    assert split_pages(pages, per_request) == expected


@pytest.mark.parametrize("other", [("e", 1, 4, "f"), ("d", 2, 4, "f"), ("d", 1, 5, "f"), ("d", 1, 4, "g")])
def test_a_key_names_document_pages_and_job(other: tuple[str, int, int, str]) -> None:
    assert compute_request_key(*other) != compute_request_key("d", 1, 4, "f")


def test_an_unread_documents_key_changes_with_its_version() -> None:
    row = {"source": "a", "size_bytes": -1, "version": "vanished", "doc_id": None, "page_count": 0}
    assert compute_document_keys(row, 4, "f").keys() != compute_document_keys(row | {"size_bytes": 9, "version": "17"}, 4, "f").keys()


def test_an_unopened_documents_key_is_its_bytes() -> None:
    row = {"source": "a", "size_bytes": 9, "version": "1", "doc_id": "d", "page_count": 0}
    assert compute_document_keys(row, 4, "f") == compute_document_keys(row | {"source": "b", "version": "2"}, 4, "f")


def test_a_url_that_could_not_be_read_and_was_signed_again_is_asked_again() -> None:
    row = {"source": "https://h/a?…", "full_url": "https://h/a?aa", "size_bytes": None, "version": "", "doc_id": None, "page_count": 0}
    assert compute_document_keys(row, 4, "f") != compute_document_keys(row | {"full_url": "https://h/a?bb"}, 4, "f")
    opened = row | {"doc_id": "d", "page_count": 3}
    assert compute_document_keys(opened, 4, "f") == compute_document_keys(opened | {"full_url": "https://h/a?bb"}, 4, "f")


# --- rendering


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One renderer for all tests here: each takes a second to start."""
    with Sandbox(RenderSettings(password="open sesame")) as shared:
        yield shared


@pytest.fixture
def stage(workspace: Workspace, sandbox: Sandbox) -> RenderStage:
    made = RenderStage(make_render_plan(sandbox.settings, workspace.folder, 2), claim_all)
    made.sandbox = sandbox
    return made


def one(rows: Iterator[Row]) -> Row:
    (row,) = rows
    return row


def test_a_document_becomes_requests_of_pages(workspace: Workspace, stage: RenderStage) -> None:
    rows = list(render_rows(stage, [make_listing_row(workspace.put("a.pdf", draw_slip(1, 2, 3)), workspace.folder)]))
    assert [(row["first_page"], row["last_page"], len(row["pixels"])) for row in rows] == [(1, 2, 2), (3, 3, 1)]
    assert [page["page_no"] for row in rows for page in row["pages"]] == [1, 2, 3]
    assert {(row["doc_id"], row["page_count"]) for row in rows} == {(hashlib.sha256(draw_slip(1, 2, 3)).hexdigest(), 3)}


def test_pixels_are_images(workspace: Workspace, stage: RenderStage) -> None:
    row = one(render_rows(stage, [make_listing_row(workspace.put("a.pdf", draw_slip(1)), workspace.folder)]))
    (image,) = row["pixels"]
    assert (image.shape, image.dtype) == ((448, 448, 3), np.uint8)
    assert row["pages"][0]["visual_tokens"] == 256


@pytest.mark.parametrize(
    ("data", "kind"), [(b"", "empty"), (b"Dear Sir or Madam", "unrecognised"), (b"%PDF-1.7 and nothing else", "broken")]
)
def test_a_document_that_does_not_open_is_one_row(workspace: Workspace, stage: RenderStage, data: bytes, kind: str) -> None:
    row = one(render_rows(stage, [make_listing_row(workspace.put("a.pdf", data), workspace.folder)]))
    assert (row["failure"]["stage"], row["failure"]["kind"], row["status"]) == ("render", kind, "failed")
    assert (row["doc_id"], row["page_count"], row["first_page"]) == (hashlib.sha256(data).hexdigest(), 0, 0)
    assert row["key"]


class Slow(HeldAnswer):
    asked, due = threading.Event(), threading.Event()
    content = draw_slip(1)


def test_a_document_that_is_slow_to_come_holds_up_no_other_thread(workspace: Workspace, sandbox: Sandbox) -> None:
    plan = replace(make_render_plan(sandbox.settings, workspace.folder, 2), policy=DownloadPolicy(allow_private=True, download_s=300))
    stage, rows = RenderStage(plan, claim_all), list[Row]()
    stage.sandbox = sandbox
    with serve_held(Slow) as address:
        slow: SourceRow = {"source": f"{address}/slow.pdf", "size_bytes": None, "version": "", "full_url": None}  # type: ignore[typeddict-item]
        waiting = threading.Thread(target=lambda: rows.extend(render_rows(stage, [slow])), daemon=True)
        waiting.start()
        assert Slow.asked.wait(60)
        document = make_listing_row(workspace.put("a.pdf", draw_slip(2)), workspace.folder)
        assert one(render_rows(stage, [document]))["page_count"] == 1
        assert not rows
        Slow.due.set()
        waiting.join(60)
    assert [row["source"] for row in rows] == [slow["source"]]


def test_a_file_that_vanished_is_one_row_without_identity(workspace: Workspace, stage: RenderStage) -> None:
    document = make_listing_row(workspace.put("a.pdf"), workspace.folder)
    (workspace.inputs / "a.pdf").unlink()
    row = one(render_rows(stage, [document]))
    assert (row["failure"]["stage"], row["failure"]["kind"], row["doc_id"]) == ("source", "vanished", None)


def test_a_file_that_was_not_there_when_listed_says_so(workspace: Workspace, stage: RenderStage) -> None:
    row = one(render_rows(stage, [{"source": "in/gone.pdf", "size_bytes": -1, "version": "vanished"}]))
    assert row["failure"]["message"] == "in/gone.pdf cannot be read: there is no such file"


def test_a_page_that_cannot_be_drawn_costs_itself_alone(workspace: Workspace, stage: RenderStage, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = stage.sandbox.draw_pages

    def torn(first_page: int, last_page: int) -> Iterator[Any]:  # a page whose content MuPDF gives up on, without the work to make one
        if first_page == 3:
            raise DocumentError("timeout", "page 3 took more than 60 s and was given up")
        return drawn(first_page, last_page)

    monkeypatch.setattr(stage.sandbox, "draw_pages", torn)
    rows = list(render_rows(stage, [make_listing_row(workspace.put("a.pdf", draw_slip(1, 2, 3, 4, 5)), workspace.folder)]))
    lost = {"page": 3, "kind": "timeout", "message": "page 3 took more than 60 s and was given up"}
    assert [row.get("failure") for row in rows] == [None, None, None]
    assert [row["page_failures"] for row in rows] == [[], [lost], []]
    assert [[page["page_no"] for page in row["pages"]] for row in rows] == [[1, 2], [4], [5]]


def test_a_request_whose_pages_all_fail_is_not_asked(workspace: Workspace, stage: RenderStage, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(first_page: int, last_page: int) -> Iterator[Any]:
        raise DocumentError("broken", f"page {first_page} cannot be drawn")

    monkeypatch.setattr(stage.sandbox, "draw_pages", torn)
    row = one(render_rows(stage, [make_listing_row(workspace.put("a.pdf", draw_slip(1, 2)), workspace.folder)]))
    assert (row["status"], row["failure"]["message"], "pixels" in row) == ("failed", "page 1 cannot be drawn", False)
    assert [failure["page"] for failure in row["page_failures"]] == [1, 2]


def test_documents_are_read_while_another_is_drawn(workspace: Workspace, stage: RenderStage, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [make_listing_row(workspace.put(f"{n}.pdf", draw_slip(n)), workspace.folder) for n in range(5)]
    read, is_read, third_is_read = stage.read_bytes, list[str](), threading.Event()

    def note_and_read(document: Any) -> bytes:
        is_read.append(document["source"])
        if document["source"] == "in/2.pdf":
            third_is_read.set()
        return read(document)

    monkeypatch.setattr(stage, "read_bytes", note_and_read)
    rows = render_rows(stage, documents)
    assert next(rows)["source"] == "in/0.pdf"
    assert third_is_read.wait(60)
    assert sorted(is_read) == ["in/0.pdf", "in/1.pdf", "in/2.pdf"]
    assert [row["source"] for row in rows] == [f"in/{n}.pdf" for n in range(1, 5)]


def test_a_document_that_cannot_be_read_fails_in_its_place(workspace: Workspace, stage: RenderStage) -> None:
    documents = [make_listing_row(workspace.put(f"{n}.pdf", draw_slip(n)), workspace.folder) for n in range(3)]
    (workspace.inputs / "1.pdf").unlink()
    rows = list(render_rows(stage, documents))
    assert [(row["source"], (row.get("failure") or {}).get("kind")) for row in rows] == [
        ("in/0.pdf", None),
        ("in/1.pdf", "vanished"),
        ("in/2.pdf", None),
    ]


def test_only_the_requests_that_are_claimed_are_drawn(workspace: Workspace, stage: RenderStage) -> None:
    stage.claim = lambda document, keys: grant({keys[1]: 1})
    row = one(render_rows(stage, [make_listing_row(workspace.put("a.pdf", draw_slip(1, 2, 3)), workspace.folder)]))
    assert (row["first_page"], row["last_page"]) == (3, 3)


def test_a_claim_names_the_identified_document_and_its_keys(workspace: Workspace, stage: RenderStage) -> None:
    claims: list[tuple[Any, list[str]]] = []
    stage.claim = lambda *claim: claims.append(claim) or grant({})
    document = make_listing_row(workspace.put("a.pdf", draw_slip(1, 2, 3)), workspace.folder)
    assert list(render_rows(stage, [document])) == []
    doc_id = hashlib.sha256(draw_slip(1, 2, 3)).hexdigest()
    keys = [compute_request_key(doc_id, 1, 2, "f" * 16), compute_request_key(doc_id, 3, 3, "f" * 16)]
    assert claims == [({**document, "doc_id": doc_id, "page_count": 3}, keys)]


def test_the_password_comes_from_the_environment(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIP_PASSWORD", "open sesame")
    plan = RenderPlan.of_job(workspace.job("source.password_env=SLIP_PASSWORD"))
    assert (plan.settings.password, plan.read_settings().password) == (None, "open sesame")
    assert b"open sesame" not in pickle.dumps(plan)


def test_a_machine_without_the_password_is_named(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIP_PASSWORD", "open sesame")
    stage = RenderStage(RenderPlan.of_job(workspace.job("source.password_env=SLIP_PASSWORD")), claim_all)
    monkeypatch.delenv("SLIP_PASSWORD")
    with pytest.raises(RunError, match=rf"SLIP_PASSWORD, which is not set on {socket.gethostname()}: set it on every machine"):
        list(render_rows(stage, [make_listing_row(workspace.put("a.pdf"), workspace.folder)]))


def test_a_password_that_is_not_there_is_refused(workspace: Workspace) -> None:
    assert "SLIP_PASSWORD" not in os.environ
    with pytest.raises(JobError, match=r"source\.password_env names the environment variable SLIP_PASSWORD, which is not set"):
        RenderPlan.of_job(workspace.job("source.password_env=SLIP_PASSWORD"))


def test_limits_are_the_jobs(workspace: Workspace) -> None:
    settings = make_render_settings(
        workspace.job("limits.timeout_s=5", "limits.memory_mib=300", "limits.max_file_mib=2", "limits.max_pages=7")
    )
    assert (settings.timeout_s, settings.memory_bytes, settings.max_file_bytes, settings.max_pages) == (5, 300 * 2**20, 2 * 2**20, 7)


# --- asking


def ask(workspace: Workspace, *says: Reply, settings: tuple[str, ...] = (), **row: Any) -> tuple[Row, ScriptedEngine]:
    """Return what becomes of one request, and the engine that was asked."""
    engine = ScriptedEngine(*says)
    return asyncio.run(AskStage(workspace.job(*settings), engine).answer_row(REQUEST | row)), engine


def test_a_valid_answer_is_extracted(workspace: Workspace) -> None:
    row, engine = ask(workspace, make_completion(VALID))
    assert (row["status"], row["answer"], row["errors"], row["failure"]) == ("extracted", VALID, [], None)
    assert (row["asks"], row["prompt_tokens"], row["completion_tokens"]) == (1, 300, 20)
    assert (row["model"], row["engine"], row["attempt"], row["fingerprint"]) == ("script-1", "scripted", 2, workspace.job().fingerprint)
    assert len(engine.requests) == 1


def test_an_engine_is_told_the_names_of_pages(workspace: Workspace) -> None:
    """Equal for a re-ask and for the same page of the same bytes; other for another page, size or renderer."""

    def name(**change: Any) -> tuple[str, ...]:
        return ask(workspace, doc_id="d", pages=[SIZE | change])[1].requests[0].page_ids

    _, engine = ask(workspace, CUT, VALID, doc_id="d")
    assert {request.page_ids for request in engine.requests} == {name()} == {("d/1/28x28/",)}
    assert len({name(), name(page_no=2), name(renderer="pdfium")}) == 3
    assert ask(workspace)[1].requests[0].page_ids == ()  # no identity: the engine looks at the pixels


def test_an_answered_row_carries_no_pixels(workspace: Workspace) -> None:
    row, _ = ask(workspace)
    assert "pixels" not in row
    assert row["pages"] == [SIZE]


def test_the_request_says_what_the_job_says(workspace: Workspace) -> None:
    _, engine = ask(workspace, settings=("sampling.temperature=0.5",))
    (request,) = engine.requests
    job = workspace.job("sampling.temperature=0.5")
    assert (request.key, request.schema, request.sampling) == ("k", job.request_schema, job.sampling)
    assert list_texts(request) == [job.system_message, "Return the JSON object for this document."]


def test_an_invalid_answer_is_asked_again_with_its_errors(workspace: Workspace) -> None:
    row, engine = ask(workspace, make_completion(INVALID), make_completion(VALID))
    assert (row["status"], row["answer"], row["asks"], row["errors"]) == ("extracted", VALID, 2, [])
    first, again = engine.requests
    assert list_texts(again)[:3] == [*list_texts(first), INVALID]
    assert "- $.total: -1 is less than 0" in list_texts(again)[3]


def test_a_correction_keeps_the_page_in_sight(workspace: Workspace) -> None:
    _, engine = ask(workspace, make_completion(INVALID), make_completion(VALID))
    first, again = engine.requests
    assert again.messages[:2] == first.messages
    assert [message.role for message in again.messages] == ["system", "user", "assistant", "user"]


def test_both_asks_are_paid_for(workspace: Workspace) -> None:
    row, _ = ask(workspace, make_completion(INVALID), make_completion(VALID))
    assert (row["prompt_tokens"], row["completion_tokens"]) == (600, 40)


def test_an_answer_that_stays_invalid_is_invalid(workspace: Workspace) -> None:
    row, engine = ask(workspace, make_completion(INVALID))
    assert (row["status"], row["answer"], len(engine.requests)) == ("invalid", INVALID, 2)
    assert row["failure"] == {"stage": "validate", "kind": "invalid", "message": "$.total: -1 is less than 0"}


@pytest.mark.parametrize("times", [0, 3])
def test_the_job_says_how_often_is_asked_again(workspace: Workspace, times: int) -> None:
    row, engine = ask(workspace, make_completion(INVALID), settings=(f"extract.re_asks={times}",))
    assert (row["asks"], len(engine.requests)) == (times + 1, times + 1)


def test_an_answer_that_is_no_json_is_asked_again(workspace: Workspace) -> None:
    row, engine = ask(workspace, make_completion("Here it is:"), make_completion(VALID))
    assert (row["status"], len(engine.requests)) == ("extracted", 2)


def test_an_answer_cut_short_is_a_failure_even_if_it_parses(workspace: Workspace) -> None:
    row, engine = ask(workspace, CUT)
    assert (row["status"], row["finish_reason"], len(engine.requests)) == ("failed", "length", 1)
    assert (row["failure"]["stage"], row["failure"]["kind"]) == ("generate", "length")
    assert "cut after 20 tokens; raise sampling.max_tokens" in row["failure"]["message"]


def test_a_correction_cut_short_is_a_failure_too(workspace: Workspace) -> None:
    row, _ = ask(workspace, make_completion(INVALID), CUT)
    assert (row["status"], row["failure"]["kind"], row["asks"]) == ("failed", "length", 2)


def test_a_request_the_engine_refuses_is_a_failed_row(workspace: Workspace) -> None:
    row, _ = ask(workspace, DocumentError("too_long", "the prompt has 9000 tokens"))
    assert row["failure"] == {"stage": "generate", "kind": "too_long", "message": "the prompt has 9000 tokens"}
    assert (row["status"], row["asks"]) == ("failed", 0)


def test_what_was_spent_before_a_refusal_is_counted(workspace: Workspace) -> None:
    row, _ = ask(workspace, make_completion(INVALID), DocumentError("engine", "the kernel returned nonsense"))
    assert (row["status"], row["asks"], row["prompt_tokens"]) == ("failed", 1, 300)


def test_an_answer_stays_invalid_where_asking_again_is_too_long(workspace: Workspace) -> None:
    row, _ = ask(workspace, make_completion(INVALID), DocumentError("too_long", "the request needs 40,000 tokens"))
    assert (row["status"], row["answer"], row["asks"], row["prompt_tokens"]) == ("invalid", INVALID, 1, 300)
    assert row["errors"]


def test_a_document_that_was_not_drawn_is_not_asked(workspace: Workspace) -> None:
    failure = {"stage": "render", "kind": "broken", "message": "…"}
    row, engine = ask(workspace, failure=failure, status="failed", pages=None, pixels=None)
    assert (engine.requests, row["failure"], row["status"]) == ([], failure, "failed")


def test_a_part_of_a_document_is_not_asked_for_what_it_lacks(workspace: Workspace) -> None:
    row, engine = ask(workspace, make_completion('{"currency":"EUR"}'), page_count=5)
    assert (row["status"], row["asks"]) == ("extracted", 1)
    assert list_texts(engine.requests[0])[-1].startswith("These are pages 1 to 1 of 5.")


def test_a_part_that_is_no_json_is_asked_again(workspace: Workspace) -> None:
    row, _ = ask(workspace, make_completion("{"), make_completion('{"currency":"EUR"}'), page_count=5)
    assert (row["status"], row["asks"]) == ("extracted", 2)


def test_a_document_that_lacks_a_page_is_asked_as_a_part(workspace: Workspace) -> None:
    """What it lacks may stand on the page that is missing."""
    pages = {"pages": [SIZE, {**SIZE, "page_no": 3}], "pixels": [np.zeros((28, 28, 3), np.uint8)] * 2}
    row, engine = ask(workspace, make_completion('{"currency":"EUR"}'), last_page=3, page_count=3, **pages)
    assert (row["status"], row["asks"]) == ("extracted", 1)
    assert list_texts(engine.requests[0])[-1] == "These are pages 1, 3 of 3. Return the JSON object for this document."


def test_a_page_that_is_a_record_of_its_own_is_checked_whole(workspace: Workspace) -> None:
    row, engine = ask(workspace, make_completion('{"currency":"EUR"}'), page_count=5, settings=("extract.per=page",))
    assert (row["status"], row["asks"]) == ("invalid", 2)
    assert list_texts(engine.requests[0])[-1] == "Return the JSON object for this document."


def test_a_dead_engine_is_no_row(workspace: Workspace) -> None:
    with pytest.raises(EngineDead):
        ask(workspace, EngineDead("the GPU is gone"))


# --- the stand-in reads its own samples


def test_a_document_that_is_no_sample_is_not_drawn_for_the_stand_in(workspace: Workspace, sandbox: Sandbox) -> None:
    rows = {}
    for name, data in (("sample.pdf", None), ("strange.pdf", make_page_pdf()), ("broken.pdf", b"%PDF-1.4 nothing")):
        listed = make_listing_row(workspace.put(name, data), workspace.folder)
        stage = RenderStage(replace(make_render_plan(sandbox.settings, workspace.folder, 4), only_samples=True), claim_all)
        stage.sandbox = sandbox
        (rows[name],) = render_rows(stage, [cast(Any, listed)])
    assert [row.get("failure") and (row["failure"]["stage"], row["failure"]["kind"]) for row in rows.values()] == [
        None,
        ("generate", "demo"),
        ("render", "broken"),
    ]
    assert (rows["strange.pdf"]["page_count"], "pixels" in rows["strange.pdf"], "pixels" in rows["sample.pdf"]) == (1, False, True)
