"""Evaluation of outputs that are written with known mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import JobError
from pipeline.score.cells import make_tolerance
from pipeline.score.evaluation import EvaluationResult, evaluate_output
from pipeline.score.plot import plot_reviews
from tests.support.scored import write_output, write_truth

TRUTH = {
    "a.pdf": {"name": "Tea", "day": "2024-02-29", "total": 5, "items": [{"what": "x", "price": 1}, {"what": "y", "price": 4}]},
    "b.pdf": {"name": "Café", "day": None, "total": 7, "items": []},
    "c.pdf": {"name": None, "day": None, "total": 9, "items": []},
    "d.pdf": {"name": "Salt", "day": None, "total": None, "items": []},
}
READ = {
    "in/a.pdf": {"name": "Tea", "day": "2024-02-29", "total": 5, "items": [{"what": "y", "price": 4}]},
    "in/b.pdf": {"name": "CAFE\u0301.", "day": "2024-01-01", "total": None, "items": []},
    "in/c.pdf": {"name": None, "day": None, "total": 9, "items": []},
    "in/d.pdf": None,
    "in/e.pdf": {"name": "unlabelled"},
}
"""a lacks an item; b has one wrong, one invented and one missing value; c is right; d failed; e has no truth."""
CERTAINTY = {"in/b.pdf": {"$.name": -2.0, "$.day": -1.0, "$.total": -0.5}, "in/c.pdf": {"$.total": -0.7}}


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    return write_truth(tmp_path / "truth.jsonl", TRUTH)


def evaluate(folder: Path, truth: Path, by: str | None = None, **extra: dict[str, dict[str, float]]) -> EvaluationResult:
    tiers = {"in/a.pdf": "clean", "in/b.pdf": "scan", "in/c.pdf": "clean"}
    return evaluate_output(str(write_output(folder / "out", READ, tiers=tiers, **extra)), truth, make_tolerance(0, 0), by)


def test_every_outcome_is_counted(tmp_path: Path, truth: Path) -> None:
    scores = evaluate(tmp_path, truth)["scores"]
    assert (scores["documents"], scores["failed"], scores["perfect"]["value"]) == (4, 1, 0.25)
    outcomes = {"right": 6, "wrong": 1, "missing": 3, "invented": 1, "both_null": 2, "unread": 3}
    assert (scores["total"]["cells"], scores["total"]["outcomes"]) == (16, outcomes)


def test_scores_are_those_of_the_counts(tmp_path: Path, truth: Path) -> None:
    """Right 6, values found 8 (with b's name and day), true values 11 (6 right, wrong 1, missing 3, d's name)."""
    total = evaluate(tmp_path, truth)["scores"]["total"]
    assert (total["exact"]["value"], total["normalized"]["value"]) == (8 / 16, 9 / 16)
    assert (total["precision"], total["recall"]) == (6 / 8, 6 / 11)
    assert total["f1"]["value"] == pytest.approx(2 * 6 / (8 + 11))
    assert total["f1"]["low"] is not None
    assert total["f1"]["low"] < total["f1"]["value"]


def test_fields_are_scored_apart(tmp_path: Path, truth: Path) -> None:
    fields = evaluate(tmp_path, truth)["scores"]["fields"]
    assert list(fields) == ["name", "day", "total", "items[].what", "items[].price"]
    assert fields["name"]["anls"]["value"] == pytest.approx((1 + 0.8 + 1 + 0) / 4)  # café and café. differ by one of five letters
    assert {name: count for name, count in fields["items[].price"]["outcomes"].items() if count} == {"right": 1, "missing": 1}


def test_what_has_no_partner_is_listed(tmp_path: Path, truth: Path) -> None:
    write_truth(truth, {**TRUTH, "gone.pdf": {"total": 1, "note": "?"}})
    found = evaluate(tmp_path, truth)
    assert (found["without_record"], found["without_truth"]) == (["gone.pdf"], ["in/e.pdf"])
    assert (found["not_in_schema"], found["not_labelled"]) == (["note"], [])


def test_a_field_that_no_truth_has_is_not_scored(tmp_path: Path) -> None:
    found = evaluate(tmp_path, write_truth(tmp_path / "truth.jsonl", {"c.pdf": {"total": 9}}))
    assert (list(found["scores"]["fields"]), found["scores"]["perfect"]["value"]) == (["total"], 1.0)
    assert found["not_labelled"] == ["name", "day", "items[].what", "items[].price"]


def test_groups_are_scored_apart(tmp_path: Path, truth: Path) -> None:
    groups = evaluate(tmp_path, truth, by="tier")["groups"]
    assert {value: (group["documents"], group["perfect"]["value"]) for value, group in groups.items()} == {
        "clean": (2, 0.5),
        "null": (1, 0.0),
        "scan": (1, 0.0),
    }


def test_certainty_is_that_of_the_values_tokens(tmp_path: Path, truth: Path) -> None:
    """Values that the model wrote: 5 of a, 3 of b, 3 of c. Wrong are b's, at -2, -1 and -0.5; c's total, at -0.7, is right."""
    certainty = evaluate(tmp_path, truth, certainty=CERTAINTY)["scores"]["certainty"]
    assert certainty is not None
    assert (certainty["values"], certainty["errors"], certainty["errors_without"], certainty["documents_without"]) == (11, 3, 5, 1)
    assert certainty["auroc"] == pytest.approx((3 * 8 - 1) / (3 * 8))
    assert [row["errors_left"] for row in certainty["review"][::10]] == [3, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_a_missing_item_has_no_certainty(tmp_path: Path) -> None:
    """Its place in the truth is that of another item in the record."""
    truth = {"a.pdf": {"items": [{"what": "x"}, {"what": "y"}]}}
    out = write_output(tmp_path / "out", {"a.pdf": {"items": [{"what": "y"}]}}, certainty={"a.pdf": {"$.items[0].what": -3.0}})
    certainty = evaluate_output(str(out), write_truth(tmp_path / "t.jsonl", truth), make_tolerance(0, 0))["scores"]["certainty"]
    assert certainty is not None
    assert (certainty["values"], certainty["errors"], certainty["errors_without"]) == (1, 0, 1)


def test_without_tokens_there_is_no_certainty(tmp_path: Path, truth: Path) -> None:
    assert evaluate(tmp_path, truth)["scores"]["certainty"] is None


def test_the_result_is_json(tmp_path: Path, truth: Path) -> None:
    found = evaluate(tmp_path, truth, by="tier", certainty=CERTAINTY)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_tolerances_count(tmp_path: Path) -> None:
    out = str(write_output(tmp_path / "out", {"a.pdf": {"total": 5.01, "day": "2024-03-01"}}))
    truth = write_truth(tmp_path / "truth.jsonl", {"a.pdf": {"total": 5, "day": "2024-02-29"}})
    shares = [
        evaluate_output(out, truth, tolerance)["scores"]["total"]["exact"]["value"] for tolerance in map(make_tolerance, (0, 0.01), (0, 1))
    ]
    assert shares == [0.0, 1.0]


@pytest.mark.parametrize(
    ("truth", "by", "sentence"),
    [
        ({"z.pdf": {"total": 1}}, None, r"is about none of the documents in .*: it names z\.pdf, the records have in/a\.pdf"),
        ({"a.pdf": {"total": 1}}, "tiers", r"no column 'tiers' to group by; allowed are name, day, total, tier, _source"),
        ({"a.pdf": {"total": 1}}, "items", r"no column 'items' to group by"),
        ({"a.pdf": {"total": 1}, "x/a.pdf": {"total": 2}}, None, r"line 2, and .* line 1, are both about in/a\.pdf: keep one"),
    ],
)
def test_what_cannot_be_scored_is_named(tmp_path: Path, truth: dict[str, dict[str, int]], by: str | None, sentence: str) -> None:
    with pytest.raises(JobError, match=sentence):
        evaluate(tmp_path, write_truth(tmp_path / "t.jsonl", truth), by)


def test_a_whole_source_goes_before_the_end_of_one(tmp_path: Path) -> None:
    found = evaluate(tmp_path, write_truth(tmp_path / "t.jsonl", {"x/a.pdf": {"total": 1}, "in/a.pdf": {"total": 5}}))
    assert (found["without_record"], found["scores"]["perfect"]["value"]) == (["x/a.pdf"], 1.0)


def test_a_failed_document_is_not_perfect_even_without_values(tmp_path: Path) -> None:
    found = evaluate(tmp_path, write_truth(tmp_path / "t.jsonl", {"d.pdf": {"items": []}}))
    assert (found["scores"]["total"]["cells"], found["scores"]["perfect"]["value"]) == (0, 0.0)


def test_the_plot_is_a_png(tmp_path: Path, truth: Path) -> None:
    plot_reviews(evaluate(tmp_path, truth, by="tier", certainty=CERTAINTY), tmp_path / "review.png")
    assert (tmp_path / "review.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(JobError, match=r"cannot write .*gone/review\.png"):
        plot_reviews(evaluate(tmp_path / "again", truth, certainty=CERTAINTY), tmp_path / "gone/review.png")


def test_without_certainty_there_is_nothing_to_plot(tmp_path: Path, truth: Path) -> None:
    with pytest.raises(JobError, match="nothing to plot"):
        plot_reviews(evaluate(tmp_path, truth), tmp_path / "review.png")
