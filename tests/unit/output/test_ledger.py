"""What is done, what is asked once more, and which attempt counts."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import JobError
from pipeline.output.ledger import LEDGER_SCHEMA, OUTCOME_COLUMNS, RetryFilter, build_ledger_state, select_newest_attempt


def outcome(key: str, kind: str | None = None, attempt: int = 1, stage: str = "render") -> dict[str, Any]:
    failure = {"stage": stage, "kind": kind, "message": "…"} if kind else None
    return {"key": key, "attempt": attempt, "status": "failed" if kind else "extracted", "failure": failure}


def find_state(outcomes: list[dict[str, Any]], retry: RetryFilter | None = None) -> tuple[set[str], dict[str, int]]:
    """Return which of these requests are done, and the attempts of those that are retried."""
    schema = pa.schema([LEDGER_SCHEMA.field(name) for name in OUTCOME_COLUMNS])
    state = build_ledger_state([pa.Table.from_pylist([row], schema) for row in outcomes], retry)
    keys = sorted({row["key"] for row in outcomes})
    return {key for key, is_done in zip(keys, state.done.find(keys), strict=True) if is_done}, dict(state.attempts)


OUTCOMES = [outcome("good"), outcome("slow", "timeout"), outcome("cut", "length", stage="generate")]


def test_what_is_in_the_ledger_is_done() -> None:
    assert find_state(OUTCOMES) == ({"good", "slow", "cut"}, {})


@pytest.mark.parametrize(
    ("text", "again"),
    [
        ("failed", {"slow", "cut"}),
        ("failed:timeout", {"slow"}),
        ("failed:render/timeout", {"slow"}),
        ("failed:generate/timeout", set()),
        ("failed:length", {"cut"}),
    ],
)
def test_failures_are_asked_once_more_by_kind(text: str, again: set[str]) -> None:
    assert find_state(OUTCOMES, RetryFilter.parse(text)) == ({"good", "slow", "cut"} - again, dict.fromkeys(again, 1))


@pytest.mark.parametrize("order", [1, -1])
def test_what_succeeded_once_is_not_asked_again(order: int) -> None:
    outcomes = [outcome("k", "timeout", 1), outcome("k", None, 2)][::order]
    assert find_state(outcomes, RetryFilter()) == ({"k"}, {})


def test_a_request_with_a_page_that_could_not_be_drawn_can_be_asked_again() -> None:
    row = outcome("k", None, 1) | {"page_failures": [{"page": 2, "kind": "timeout", "message": "page 2 took too long"}]}
    for text, is_retried in (("failed", True), ("failed:timeout", True), ("failed:render/timeout", True), ("failed:memory", False)):
        assert (find_state([row], RetryFilter.parse(text))[1] == {"k": 1}) is is_retried
    assert find_state([row])[0] == {"k"}


def test_attempts_are_counted() -> None:
    outcomes = [outcome("k", "timeout", 1), outcome("k", "crash", 2)]
    assert find_state(outcomes, RetryFilter.parse("failed:crash")) == (set(), {"k": 2})
    assert find_state(outcomes, RetryFilter.parse("failed:timeout")) == ({"k"}, {})


def test_an_invalid_answer_is_no_failure() -> None:
    invalid = {"key": "k", "attempt": 1, "status": "invalid", "failure": {"stage": "validate", "kind": "invalid", "message": "…"}}
    assert find_state([invalid], RetryFilter())[0] == {"k"}


@pytest.mark.parametrize("text", ["", "invalid", "failed:", "failed:a/b/c", "all", "Failed"])
def test_another_word_is_refused(text: str) -> None:
    with pytest.raises(JobError, match=f"retry is '{text}'; allowed are failed, failed:KIND"):
        RetryFilter.parse(text)


def test_the_newest_success_counts_before_a_newer_failure() -> None:
    attempts = [outcome("k", None, 1), outcome("k", None, 2), outcome("k", "crash", 3)]
    assert select_newest_attempt(attempts)["attempt"] == 2
