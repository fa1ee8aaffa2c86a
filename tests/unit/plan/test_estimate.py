"""Estimates: what is counted is exact, what is estimated has bounds and says from what."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import JobError
from pipeline.output import Output
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.shards import write_shard
from pipeline.plan.estimate import estimate_run, find_parameters, sum_seconds
from pipeline.plan.survey import MeasuredDocument, find_small_height
from pipeline.records import Page, PageMeasure, Word
from tests.support.workspace import Workspace

A4 = PageMeasure(595, 842, 840, 1176, 101.6, 1260)


def document(name: str, pages: int = 1, doc_id: str | None = None, **more: Any) -> MeasuredDocument:
    return MeasuredDocument(name, doc_id or name, 100, (A4,) * pages, **more)


def plan(workspace: Workspace, *documents: MeasuredDocument, settings: tuple[str, ...] = (), **given: Any) -> Any:
    return estimate_run(workspace.job("model.name=Qwen/Qwen2.5-VL-7B-Instruct-AWQ", *settings), documents, **given)


def test_what_is_asked_is_counted_once(workspace: Workspace) -> None:
    broken = MeasuredDocument("c", "c", 9, (), "render/broken")
    found = plan(workspace, document("a", 6), document("b", 1), document("b2", 1, doc_id="b"), broken)
    assert (found["documents"], found["pages"], found["requests"], found["visual_tokens"]) == (4, 7, 3, 7 * 1260)
    assert (found["duplicates"], found["failures"]) == (["b2"], {"render/broken": 1})


def test_what_is_read_again_is_bounded_and_told_apart(workspace: Workspace) -> None:
    documents = (document("a", 6), document("b"))
    off, on = plan(workspace, *documents), plan(workspace, *documents, settings=("evidence.model=on",))
    assert (off["reread_requests"], on["reread_requests"], on["requests"]) == (0, 7 * 3, off["requests"])


def test_a_page_is_a_request_where_records_are_pages(workspace: Workspace) -> None:
    assert plan(workspace, document("a", 6), settings=("extract.per=page",))["requests"] == 6


def test_a_request_that_exceeds_the_context_is_named(workspace: Workspace) -> None:
    settings = ("pages.per_request=30",)
    assert plan(workspace, document("a", 30), document("b", 5), settings=settings)["beyond_context"] == ["a"]
    assert (
        plan(workspace, document("a", 30), settings=(*settings, "model.engine=vllm", "model.max_model_len=60000"))["beyond_context"] == []
    )


def test_small_print_is_a_share_of_the_sampled_pages(workspace: Workspace) -> None:
    found = plan(workspace, document("a", smallest_px=7.9), document("b", smallest_px=8.0), document("c"))
    assert found["small_print"] == {"sampled": 2, "share": 0.5, "key": "pages.max_pixels"}


def test_small_print_on_a_page_that_the_budget_leaves_as_it_is_wants_more_dpi(workspace: Workspace) -> None:
    slip = MeasuredDocument("a", "a", 9, (replace(A4, dpi=198.0),), smallest_px=7.0)
    assert plan(workspace, slip)["small_print"]["key"] == "pages.dpi"


def test_a_page_takes_what_the_roofline_says(workspace: Workspace) -> None:
    """1,280 visual, 300 prompt and 400 output tokens: 34 TFLOP for a 7B, 23 pages/s on an H100 at its bound."""
    job = workspace.job("model.name=Qwen/Qwen2.5-VL-7B-Instruct-AWQ")
    assert sum_seconds(job, 1280, 300, 400, 1, 791.0) == pytest.approx(1 / 23.1, rel=0.1)


def test_time_and_money_lie_between_bounds(workspace: Workspace) -> None:
    found = plan(workspace, *(document(str(number)) for number in range(1000)), gpu="h100", price=2.5)
    hours, cost = found["gpu_hours"], found["cost"]
    assert hours["low"] < hours["likely"] < hours["high"]
    assert cost["likely"] == pytest.approx(2.5 * hours["likely"])
    assert 1000 / 3600 / hours["high"] > 2
    assert plan(workspace, document("a"))["cost"] is None


@pytest.mark.parametrize(
    ("name", "billions"), [("Qwen/Qwen2.5-VL-72B-Instruct", 70.6), ("Qwen2.5-VL-3B-Instruct-AWQ", 2.8), ("mine", 7.07)]
)
def test_a_models_size_is_in_its_name(name: str, billions: float) -> None:
    assert find_parameters(name) == billions * 1e9


def write_ledger(workspace: Workspace, *tokens: int) -> None:
    output = Output(workspace.job().output)
    output.create()
    rows = [
        {"key": str(index), "attempt": 1, "status": "extracted", "asks": 1, "completion_tokens": count}
        for index, count in enumerate(tokens)
    ]
    write_shard(output.requests, pa.Table.from_pylist(rows, LEDGER_SCHEMA), [str(index) for index in range(len(rows))])
    output.write_report({"pages_asked": 4, "pages_per_s": 2.0})


def test_an_earlier_run_says_how_long_answers_are(workspace: Workspace) -> None:
    before = plan(workspace, document("a"))["output_tokens"]
    assert before["source"].startswith("the schema")
    write_ledger(workspace, 200, 300)
    found = plan(workspace, document("a"), document("b"))
    assert (found["output_tokens"]["likely"], found["output_tokens"]["source"][:10]) == (500, "2 requests")
    assert found["earlier_run"]["hours"] == round(2 / 2.0 / 3600, 3)


@pytest.mark.parametrize(("tokens", "low", "high"), [((250,) * 9, 225, 275), ((100, 200, 300), 85, 315), ((200,), 0, 400)])
def test_the_fewer_and_the_more_different_answers_were_the_wider_the_range(
    workspace: Workspace, tokens: tuple[int, ...], low: int, high: int
) -> None:
    write_ledger(workspace, *tokens)
    found = plan(workspace, document("a"))["output_tokens"]
    assert (round(found["low"]), round(found["high"])) == (low, high)


def test_a_later_settling_leaves_the_speed_of_the_run(workspace: Workspace) -> None:
    write_ledger(workspace, 200, 300)
    settled = {"pages_asked": 0, "pages_per_s": 0.0, "last_asked": {"pages_asked": 4, "pages_per_s": 0.5}}
    Output(workspace.job().output).write_report(settled)
    found = plan(workspace, document("a"))
    assert found["earlier_run"]["pages_per_s"] == 0.5


def test_what_a_rule_asked_again_is_of_the_request_that_broke_it(workspace: Workspace) -> None:
    write_ledger(workspace, 200, 300)
    row = {"key": "9", "rule": "sum", "attempt": 1, "status": "extracted", "asks": 1, "completion_tokens": 50}
    write_shard(Output(workspace.job().output).requests, pa.Table.from_pylist([row], LEDGER_SCHEMA), ["9"])
    assert plan(workspace, document("a"), document("b"))["output_tokens"]["likely"] == 550


def test_an_output_without_answers_says_nothing(workspace: Workspace) -> None:
    with pytest.raises(JobError, match="has no answers: --like names the output of an earlier run"):
        plan(workspace, document("a"), like=str(workspace.folder / "gone"))


def test_print_is_as_small_as_a_twentieth_of_the_words() -> None:
    words = [Word("a", 0, 0, 9, 10.0)] * 19 + [Word("b", 0, 0, 9, 4.0)] * 2
    page = Page(1, None, 100, 1, 1, 1, tuple(words))  # type: ignore[arg-type]
    assert find_small_height(page) == 4.0
    assert find_small_height(Page(1, None, 100, 1, 1, 1, tuple(words[:19]))) is None  # type: ignore[arg-type]


def test_a_schema_with_more_fields_has_longer_answers(workspace: Workspace, tmp_path: Path) -> None:
    few = plan(workspace, document("a"))["output_tokens"]["likely"]
    schemas = Path(__file__).parents[3] / "schemas/purchase_order.json"
    many = plan(workspace, document("a"), settings=(f"extract.schema={schemas}",))["output_tokens"]["likely"]
    assert many > 5 * few
    assert not math.isnan(many)
