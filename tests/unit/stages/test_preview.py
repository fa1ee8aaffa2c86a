"""One page as the model sees it, and what it answers, without Ray and without an output folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import engines
from pipeline.budget import smart_resize
from pipeline.errors import DocumentError, JobError
from pipeline.stages import preview
from tests.support.engines import CUT, INVALID, VALID, ScriptedEngine, list_texts, make_completion
from tests.support.pdfs import make_page_pdf
from tests.support.workspace import Workspace, draw_slip


def picture(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(file, "PNG")
    return file.getvalue()


ODD = {
    "a slip": draw_slip(1),
    "turned": make_page_pdf(300, 500, extra="/Rotate 90"),
    "cropped": make_page_pdf(2000, 2000, extra="/CropBox[100 100 400 300]"),
    "a strip of 20:1": picture(2000, 100),
    "a dot": picture(10, 10),
    "a poster": make_page_pdf(2384, 3370),
}


# --- what the model sees


@pytest.mark.parametrize("name", ODD)
def test_the_png_is_the_size_that_the_models_processor_leaves_alone(workspace: Workspace, name: str) -> None:
    job = workspace.job()
    preview.write_preview_png(seen := preview.render_preview(job, workspace.put("odd", ODD[name]), 1), workspace.folder / "seen.png")
    with Image.open(workspace.folder / "seen.png") as image:
        width, height = image.size
        assert np.array_equal(np.asarray(image), seen.page.pixels)
    assert (seen.facts["width_px"], seen.facts["height_px"], seen.facts["visual_tokens"]) == (width, height, width * height // 784)
    budget = job.sections.pages.budget
    assert smart_resize(height, width, budget.min_pixels, budget.max_pixels) == (height, width)


def test_the_page_that_is_asked_for_is_shown(workspace: Workspace) -> None:
    file = workspace.put("a.pdf", draw_slip(1, 2))
    second, alone = (
        preview.render_preview(workspace.job(), file, 2),
        preview.render_preview(workspace.job(), workspace.put("b.pdf", draw_slip(2)), 1),
    )
    assert (second.page.page_no, second.facts["page_count"]) == (2, 2)
    assert np.array_equal(second.page.pixels, alone.page.pixels)


def test_a_page_beyond_the_last_is_refused(workspace: Workspace) -> None:
    with pytest.raises(JobError, match=r"a\.pdf has 1 page, there is no page 2"):
        preview.render_preview(workspace.job(), workspace.put("a.pdf"), 2)


def test_a_file_that_is_not_there_is_refused(workspace: Workspace) -> None:
    with pytest.raises(JobError, match=r"cannot read .*gone\.pdf: No such file or directory"):
        preview.render_preview(workspace.job(), workspace.inputs / "gone.pdf", 1)


def test_a_file_that_is_no_document_says_so(workspace: Workspace) -> None:
    with pytest.raises(DocumentError, match="the content is none of PDF"):
        preview.render_preview(workspace.job(), workspace.put("a.pdf", b"Dear Sir"), 1)


def test_a_png_that_cannot_be_written_is_refused(workspace: Workspace) -> None:
    seen = preview.render_preview(workspace.job(), workspace.put("a.pdf"), 1)
    with pytest.raises(JobError, match=r"cannot write .*seen\.png: No such file or directory"):
        preview.write_preview_png(seen, workspace.folder / "gone" / "seen.png")


# --- what it answers


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load a scripted engine in the model's place."""

    def load(*says: Any) -> ScriptedEngine:
        engine = ScriptedEngine(*says)
        monkeypatch.setattr(engines, "load_engine", lambda job: engine)
        monkeypatch.setattr(engines, "count_gpus", lambda: 0)
        return engine

    return load


@pytest.fixture(scope="module")
def second_page(tmp_path_factory: pytest.TempPathFactory) -> preview.PreviewPage:
    """The second page of a document, rendered once: starting a renderer takes most of the time."""
    workspace = Workspace(tmp_path_factory.mktemp("preview"))
    return preview.render_preview(workspace.job(), workspace.put("a.pdf", draw_slip(1, 2)), 2)


def test_the_answer_comes_with_its_cost(workspace: Workspace, second_page: preview.PreviewPage, loaded: Any) -> None:
    loaded()
    found = preview.ask_preview(workspace.job(), second_page)
    assert (found["answer"], found["status"], found["failure"], found["errors"]) == (VALID, "extracted", None, [])
    assert (found["prompt_tokens"], found["completion_tokens"], found["model"], found["engine"]) == (300, 20, "script-1", "scripted")


def test_the_page_is_asked_as_a_document_of_its_own(workspace: Workspace, second_page: preview.PreviewPage, loaded: Any) -> None:
    engine = loaded()
    preview.ask_preview(workspace.job(), second_page)
    assert list_texts(engine.requests[0]) == [workspace.job().system_message, "Return the JSON object for this document."]


def test_an_invalid_answer_is_shown_with_its_errors(workspace: Workspace, second_page: preview.PreviewPage, loaded: Any) -> None:
    loaded(make_completion(INVALID))
    found = preview.ask_preview(workspace.job(), second_page)
    assert (found["answer"], found["status"], found["errors"]) == (INVALID, "invalid", ["$.total: -1 is less than 0"])


def test_an_answer_cut_short_is_shown_as_the_failure_it_is(workspace: Workspace, second_page: preview.PreviewPage, loaded: Any) -> None:
    loaded(CUT)
    found = preview.ask_preview(workspace.job(), second_page)
    assert (found["answer"], found["status"], found["failure"]["kind"]) == (VALID, "failed", "length")


def test_no_answer_is_an_error(workspace: Workspace, second_page: preview.PreviewPage, loaded: Any) -> None:
    loaded(DocumentError("too_long", "the prompt has 9000 tokens"))
    with pytest.raises(DocumentError, match="9000 tokens"):
        preview.ask_preview(workspace.job(), second_page)


def test_the_demonstration_is_announced(workspace: Workspace, second_page: preview.PreviewPage, loaded: Any) -> None:
    loaded()
    job, told = workspace.job("model.name=Qwen/Qwen2.5-VL-7B-Instruct-AWQ", "model.without_gpu=demo"), []
    preview.ask_preview(job, second_page, told.append)
    assert told == ["Qwen/Qwen2.5-VL-7B-Instruct-AWQ"]


def test_a_preview_leaves_no_output_folder(workspace: Workspace, loaded: Any) -> None:
    loaded()
    preview.ask_preview(workspace.job(), preview.render_preview(workspace.job(), workspace.put("a.pdf"), 1))
    assert not Path(workspace.job().output).exists()


def test_the_stand_in_refuses_what_is_no_sample_of_its_own(workspace: Workspace) -> None:
    job = workspace.job("model.name=Qwen/Qwen2.5-VL-7B-Instruct-AWQ", "model.without_gpu=demo")
    seen = preview.render_preview(job, workspace.put("strange.pdf", make_page_pdf()), 1)
    with pytest.raises(
        DocumentError, match=r"reads only its own samples; a GPU, model\.engine: openai or model\.without_gpu: cpu reads this"
    ):
        preview.ask_preview(job, seen)
