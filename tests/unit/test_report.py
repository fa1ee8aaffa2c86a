"""Counts, reconciliation and the exit code of a run."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from pipeline.errors import RunError
from pipeline.records import REREAD
from pipeline.report import Canary, CircuitBreaker, ExitCode, Phase, Progress, ProgressTracker, Report


def report(**given: Any) -> Report:
    return Report("invoices", "out", "demo", True, **given)


def row(source: str = "a.pdf", pages: tuple[int, int] = (1, 1), of: int = 1, **given: Any) -> dict[str, Any]:
    """A receipt as the ask pass brings it."""
    first, last = pages
    answered = {"key": f"{source}/{first}", "first_page": first, "last_page": last, "page_count": of, "status": "extracted", "asks": 1}
    return {"source": source, "pages_shown": last - first + 1, "prompt_tokens": 100, "completion_tokens": 10} | answered | given


def unasked(source: str) -> dict[str, Any]:
    """A document that asks nothing: all of it is answered, or another file with the same bytes asks."""
    return {"source": source, "key": None, "first_page": None, "last_page": None, "page_count": 3}


def unopened(source: str) -> dict[str, Any]:
    failure = {"stage": "render", "kind": "broken", "message": "it cannot be opened"}
    return (
        row(source, (0, 0), 0, status="failed", failure=failure)
        | dict.fromkeys(("asks", "prompt_tokens", "completion_tokens"))
        | {"pages_shown": 0}
    )


def count(documents: int, *rows: dict[str, Any]) -> tuple[Report, list[Progress]]:
    """Return the report after these rows, and the progress after each."""
    seen: list[Progress] = []
    counted = ProgressTracker(total := report(), seen.append)
    counted.enter_phase(Phase.ASKING, documents)
    seen.clear()
    for one in rows:
        counted.add(one)
    counted.finish()
    return total, seen


# --- the report


def test_all_extracted_is_ok() -> None:
    total = report(documents=2)
    total.count_records(["extracted", "extracted"], [])
    assert (total.exit_code, total.records, total.statuses) == (ExitCode.OK, 2, {"extracted": 2})


def test_a_record_that_lacks_pages_is_exit_1() -> None:
    total = report(documents=1, partial=1)
    total.count_records(["extracted"], [])
    assert total.exit_code is ExitCode.DOCUMENTS_FAILED


def test_a_failed_document_is_exit_1_and_counted_by_stage_and_kind() -> None:
    total = report(documents=3)
    total.count_records(["failed", "extracted", "failed"], ["render/broken", "render/broken"])
    assert total.exit_code is ExitCode.DOCUMENTS_FAILED
    assert total.failures == {"render/broken": 2}
    assert total.statuses == {"extracted": 1, "failed": 2}


def test_a_source_without_a_row_is_worse_than_a_failed_one() -> None:
    total = report(documents=2, missing=["b.pdf"])
    total.count_records(["failed"], ["render/broken"])
    assert total.exit_code is ExitCode.RUN_BROKEN


def test_a_record_that_waits_for_an_answer_is_a_run_that_broke_off() -> None:
    total = report(documents=2)
    total.count_records(["failed", "extracted"], ["settle/pending"])
    assert total.exit_code is ExitCode.RUN_BROKEN


def test_settling_again_replaces_the_counts() -> None:
    total = report()
    total.count_records(["failed"], ["render/broken"])
    total.count_records(["extracted"], [])
    assert (total.statuses, total.failures, total.exit_code) == ({"extracted": 1}, {}, ExitCode.OK)


def test_a_report_is_json_with_its_exit_code_and_speed() -> None:
    total = report(pages_asked=10, elapsed_s=4.0, missing=["b.pdf"])
    said = json.loads(json.dumps(total.as_dict()))
    assert (said["pages_per_s"], said["exit_code"], said["missing"], said["demonstration"]) == (2.5, 3, ["b.pdf"], True)


@pytest.mark.parametrize(
    ("code", "number"), [(ExitCode.OK, 0), (ExitCode.DOCUMENTS_FAILED, 1), (ExitCode.JOB_WRONG, 2), (ExitCode.RUN_BROKEN, 3)]
)
def test_exit_codes_are_the_documented_ones(code: ExitCode, number: int) -> None:
    assert int(code) == number


def test_nothing_in_no_time_has_no_speed() -> None:
    assert report().pages_per_s == 0
    assert Progress(Phase.ASKING, 0, 0, 0, 0, 0, 0.0).pages_per_s == 0


# --- the counting of answers


def test_requests_pages_and_tokens_add_up() -> None:
    total, _ = count(2, row("a.pdf"), row("b.pdf", (1, 4), 4))
    assert (total.requests_asked, total.pages_asked, total.prompt_tokens, total.completion_tokens) == (2, 5, 200, 20)


def test_requests_are_counted_by_what_became_of_them() -> None:
    total, _ = count(4, row("a.pdf"), row("b.pdf", status="failed"), unopened("c.pdf"), unasked("d.pdf"))
    assert total.requests == {"extracted": 1, "failed": 2}


def test_requests_beside_that_of_a_record_are_counted_apart() -> None:
    total, seen = count(1, row("a.pdf"), row("a.pdf") | {"rule": "sum"}, row("a.pdf") | {"rule": REREAD}, row("a.pdf") | {"rule": REREAD})
    assert (total.requests_asked, total.rule_requests, total.reread_requests, total.requests) == (4, 1, 2, {"extracted": 1})
    assert len(seen) == 1


def test_a_document_is_done_with_the_last_of_its_requests_in_whatever_order_they_come() -> None:
    _, seen = count(1, row("a.pdf", (5, 6), 6), row("a.pdf", (1, 4), 6))
    assert [(p.documents_done, p.pages_done) for p in seen] == [(0, 2), (1, 6)]


def test_documents_that_come_mixed_are_told_apart() -> None:
    _, seen = count(2, row("a.pdf", (1, 4), 5), row("b.pdf", (1, 4), 5), row("b.pdf", (5, 5), 5), row("a.pdf", (5, 5), 5))
    assert [p.documents_done for p in seen] == [0, 0, 1, 2]


def test_a_document_that_asks_nothing_is_done_and_costs_nothing() -> None:
    total, seen = count(1, unasked("a.pdf"))
    assert seen[0].documents_done == 1
    assert (total.requests_asked, total.pages_asked, total.prompt_tokens) == (0, 0, 0)


def test_a_document_that_cannot_be_opened_is_done_and_failed_and_asked_nothing() -> None:
    total, seen = count(1, unopened("a.pdf"))
    assert (seen[0].documents_done, seen[0].failed, seen[0].failures) == (1, 1, {"render/broken": 1})
    assert (total.requests_asked, total.pages_asked) == (0, 0)


def test_time_runs_forward() -> None:
    _, seen = count(2, row("a.pdf"), row("b.pdf"))
    assert 0 <= seen[0].elapsed_s <= seen[1].elapsed_s


# --- the circuit breaker


FAILED = row(status="failed", failure={"stage": "generate", "kind": "engine", "message": "no answer"})


def test_a_run_that_fails_wholesale_is_stopped() -> None:
    breaker = CircuitBreaker(max_ratio=0.5, min_requests=10)
    for one in [row()] * 10 + [FAILED] * 10:
        breaker.add(one)
    with pytest.raises(RunError, match=r"11 of the last 21 requests failed, .* allows 0.5; .* generate/engine: no answer"):
        breaker.add(FAILED)


def test_a_few_failures_at_first_say_nothing() -> None:
    breaker = CircuitBreaker(max_ratio=0.0, min_requests=10)
    for _ in range(9):
        breaker.add(FAILED)
    with pytest.raises(RunError, match="10 of the last 10"):
        breaker.add(FAILED)


def test_what_broke_lately_counts_after_a_long_good_start() -> None:
    breaker = CircuitBreaker(max_ratio=0.5, min_requests=10)
    for one in [row()] * 100_000 + [FAILED] * 500:
        breaker.add(one)
    with pytest.raises(RunError, match="501 of the last 1000"):
        breaker.add(FAILED)


def test_a_ratio_of_one_never_stops_a_run() -> None:
    breaker = CircuitBreaker(max_ratio=1.0, min_requests=1)
    for _ in range(2000):
        breaker.add(FAILED)
    assert len(breaker.kinds) == CircuitBreaker.WINDOW


def test_what_asks_nothing_and_what_is_invalid_is_no_failure() -> None:
    breaker = CircuitBreaker(max_ratio=0.0, min_requests=1)
    breaker.add(unasked("a.pdf"))
    breaker.add(row(status="invalid", failure={"stage": "validate", "kind": "invalid", "message": "total is not a number"}))
    assert list(breaker.kinds) == [None]


# --- how busy the engines were


def test_the_report_says_how_many_requests_were_under_way() -> None:
    started = datetime(2026, 1, 1, tzinfo=UTC)
    total, _ = count(2, row("a", started_at=started, elapsed_s=2.0), row("b", started_at=started, elapsed_s=1.0))
    assert total.as_dict()["requests_in_flight"] == 1.5


def test_how_busy_engines_were_is_what_they_said_last() -> None:
    first, second = ({"actor": name, "alive_s": 10.0, "busy_s": 4.0} for name in ("one", "two"))
    total, _ = count(3, row("a", **first), row("b", **first | {"alive_s": 30.0, "busy_s": 20.0}), row("c", **second))
    assert total.as_dict()["engine_busy_share"] == 24 / 40


def test_a_second_round_adds_to_the_first() -> None:
    seen: list[Progress] = []
    counted = ProgressTracker(total := report(), seen.append)
    for source, start_s in (("a", 0), ("b", 1)):
        counted.enter_phase(Phase.ASKING, 1)
        counted.add(row(source, started_at=datetime.fromtimestamp(start_s, UTC), elapsed_s=1.0))
    counted.finish()
    assert (total.requests, total.requests_in_flight) == ({"extracted": 2}, 1.0)
    assert [(now.documents, now.documents_done) for now in seen] == [(1, 0), (1, 1), (1, 0), (1, 1)]


def test_each_phase_is_reported_with_its_documents_as_soon_as_they_are_known() -> None:
    seen: list[Progress] = []
    tracker = ProgressTracker(report(), seen.append)
    tracker.enter_phase(Phase.LISTING)
    tracker.set_documents(2)
    tracker.change_phase(Phase.STARTING_RAY)
    tracker.enter_phase(Phase.LOADING_MODEL, 1)
    tracker.change_phase(Phase.ASKING)
    tracker.add(row("a"))
    tracker.enter_phase(Phase.SETTLING, 2)
    tracker.add_settled(2)
    phases = [(now.phase, now.documents, now.documents_done) for now in seen]
    assert phases[:4] == [(Phase.LISTING, None, 0), (Phase.LISTING, 2, 0), (Phase.STARTING_RAY, 2, 0), (Phase.LOADING_MODEL, 1, 0)]
    assert phases[4:] == [(Phase.ASKING, 1, 0), (Phase.ASKING, 1, 1), (Phase.SETTLING, 2, 0), (Phase.SETTLING, 2, 2)]


def test_documents_that_the_demonstration_model_refuses_are_no_failures_of_a_run() -> None:
    breaker = CircuitBreaker(max_ratio=0.0, min_requests=1)
    breaker.add(row(**failed("generate", "demo")))
    assert list(breaker.kinds) == [None]


# --- the canary


def failed(stage: str, kind: str, status: str = "failed") -> dict[str, Any]:
    return {"status": status, "failure": {"stage": stage, "kind": kind, "message": "of some reason"}}


def judge(max_ratio: float, *rows: dict[str, Any]) -> None:
    canary = Canary(max_ratio)
    for one in rows:
        canary.add(one)
    canary.check("out")


def test_too_many_invalid_documents_stop_the_run_with_the_most_frequent_failure() -> None:
    bad = [row(f"{n}.pdf", **failed("validate", "invalid", "invalid")) for n in range(4)]
    with pytest.raises(RunError, match=r"4 of the 5 that reached the model .* allows 0\.7; validate/invalid: of some reason.* --output"):
        judge(0.7, *bad, row("good.pdf"))
    judge(0.8, *bad, row("good.pdf"))


def test_documents_that_did_not_reach_a_model_do_not_count() -> None:
    unread = [
        row("a.pdf", **failed("source", "missing")),
        row("b.pdf", **failed("render", "broken")),
        row("c.pdf", **failed("generate", "demo")),
    ]
    judge(0.0, *unread, unasked("d.pdf"), row("e.pdf"))
    judge(0.0, *unread)
    canary = Canary(0.0)
    for one in unread:
        canary.add(one)
    assert canary.outcomes == {}


def test_a_document_with_one_bad_request_is_bad_once() -> None:
    parts = [row("a.pdf", (1, 4), 8), row("a.pdf", (5, 8), 8, **failed("generate", "length"))]
    with pytest.raises(RunError, match="1 of the 1 that"):
        judge(0.5, *parts)
    judge(0.5, *reversed(parts), row("b.pdf"))


@pytest.mark.parametrize(("good", "bad", "passed"), [(4, 0, True), (4, 16, True), (3, 0, False), (3, 17, False), (0, 20, False)])
def test_first_documents_have_passed_when_the_others_cannot_change_that(good: int, bad: int, passed: bool) -> None:
    canary = Canary(0.8)
    for number in range(good + bad):
        canary.add(row(f"{number}.pdf") if number < good else row(f"{number}.pdf", **failed("validate", "invalid", "invalid")))
    assert canary.has_passed(20) == passed
    if passed:
        canary.check("out")


def test_a_document_is_good_when_all_its_requests_are() -> None:
    canary = Canary(0.0)
    canary.add(row("a.pdf", (1, 2), 4))
    assert not canary.has_passed(1)
    canary.add(row("a.pdf", (3, 4), 4))
    assert canary.has_passed(1)


# --- the end of a phase


@pytest.mark.parametrize(
    ("documents", "done", "elapsed_s", "left_s"),
    [
        *((40, 10, 30.0, 90.0), (40, 40, 30.0, 0.0), (40, 0, 30.0, None), (40, 1, 0.5, None), (None, 3, 9.0, None), (0, 0, 9.0, None)),
        *((4000, 39, 30.0, None), (4000, 40, 30.0, 2970.0), (1_000_000, 49, 1.0, None), (1_000_000, 50, 1.0, 19_999.0)),
    ],
)
def test_the_time_that_is_left_follows_from_the_documents_that_are_done(
    documents: int | None, done: int, elapsed_s: float, left_s: float | None
) -> None:
    assert Progress(Phase.ASKING, documents, done, 0, 0, 0, elapsed_s).remaining_s == left_s


def test_progress_says_how_busy_the_engines_are() -> None:
    _, seen = count(2, row("a.pdf", actor="1", alive_s=10.0, busy_s=9.0), row("b.pdf", actor="2", alive_s=10.0, busy_s=6.0))
    assert [now.engine_busy_share for now in seen] == [0.9, 0.75]
