"""Comparison of two outputs, and the commands `eval` and `compare` on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline import cli
from pipeline.errors import JobError
from pipeline.score.cells import make_tolerance
from pipeline.score.comparison import ComparisonResult, compare_outputs
from tests.support.scored import Values, write_output, write_truth

A: dict[str, Values | None] = {
    "in/a.pdf": {"name": "Tea", "total": 5, "items": [{"what": "x", "price": 1}]},
    "in/b.pdf": {"name": "Milk", "total": 6, "items": []},
    "in/c.pdf": {"name": None, "total": 7, "items": []},
    "in/only-a.pdf": {},
}
B: dict[str, Values | None] = {
    "in/a.pdf": {"name": "Tea", "total": 5.5, "items": []},
    "in/b.pdf": {"name": "Milk", "total": 6, "items": []},
    "in/c.pdf": None,
    "in/only-b.pdf": {},
}


@pytest.fixture
def a(tmp_path: Path) -> str:
    return str(write_output(tmp_path / "a", A))


@pytest.fixture
def b(tmp_path: Path) -> str:
    return str(write_output(tmp_path / "b", B))


def compare(a: str, b: str, truth: Path | None = None, max_drop: float = 0.5) -> ComparisonResult:
    return compare_outputs(a, b, truth, make_tolerance(0, 0), max_drop)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_changes_are_counted_by_field(a: str, b: str) -> None:
    found = compare(a, b)
    assert (found["documents"], found["changed"], found["only_in_a"], found["only_in_b"]) == (3, 2, ["in/only-a.pdf"], ["in/only-b.pdf"])
    assert found["fields"]["total"] == {"same": 1, "changed": 1, "became_null": 1, "became_value": 0}
    assert found["fields"]["items[].price"] == {"same": 0, "changed": 0, "became_null": 1, "became_value": 0}
    assert found["statuses"] == [
        {"a": "extracted", "b": "extracted", "documents": 2},
        {"a": "extracted", "b": "failed", "documents": 1},
    ]


def test_the_worst_documents_come_first(a: str, b: str) -> None:
    worst = compare(a, b)["worst"]
    assert [(row["source"], row["status_b"], len(row["changes"])) for row in worst] == [
        ("in/a.pdf", "extracted", 3),
        ("in/c.pdf", "failed", 1),
    ]
    assert worst[0]["changes"] == [
        {"path": "$.total", "change": "changed", "a": "5.00", "b": "5.50"},
        {"path": "$.items[-].what", "change": "became_null", "a": '"x"', "b": "null"},
        {"path": "$.items[-].price", "change": "became_null", "a": "1.00", "b": "null"},
    ]


def test_the_same_output_has_no_changes(a: str) -> None:
    found = compare(a, a)
    assert (found["changed"], found["worst"], found["truth"]) == (0, [], None)


def test_documents_may_have_moved(tmp_path: Path, a: str) -> None:
    moved = write_output(tmp_path / "moved", {f"/data/{source}": values for source, values in A.items()})
    assert (compare(a, str(moved))["documents"], compare(a, str(moved))["changed"]) == (4, 0)


def test_the_same_source_goes_before_the_same_end(tmp_path: Path) -> None:
    a = write_output(tmp_path / "a", {"x/a.pdf": {"total": 1}, "y/a.pdf": {"total": 2}, "x/b.pdf": {}, "y/b.pdf": {}})
    b = write_output(tmp_path / "b", {"y/a.pdf": {"total": 2}, "z/b.pdf": {}})
    found = compare(str(a), str(b))
    assert (found["documents"], found["changed"]) == (1, 0)
    assert (found["only_in_a"], found["only_in_b"]) == (["x/a.pdf", "x/b.pdf", "y/b.pdf"], ["z/b.pdf"])


def test_outputs_without_a_common_document_are_refused(tmp_path: Path, a: str) -> None:
    with pytest.raises(JobError, match=r"no document in common: the first of A is in/a\.pdf, that of B is in/z\.pdf"):
        compare(a, str(write_output(tmp_path / "z", {"in/z.pdf": {}})))


def test_the_drop_is_that_of_right_cells(tmp_path: Path, a: str, b: str) -> None:
    """Of 4 cells in a.pdf A has 3 right and B none; of 2 in c.pdf A has 2 right, and B, which failed, none."""
    truth = write_truth(
        tmp_path / "truth.jsonl",
        {"a.pdf": {"name": "Milk", "total": 5, "items": [{"what": "x", "price": 1}]}, "c.pdf": {"name": None, "total": 7}},
    )
    found = compare(a, b, truth)["truth"]
    assert found is not None
    assert (found["documents"], found["a"]["value"], found["b"]["value"]) == (2, 5 / 6, 0.0)
    assert (found["difference_points"], found["has_dropped"]) == (pytest.approx(-500 / 6), True)


@pytest.mark.parametrize(("max_drop", "code"), [("0.5", 1), ("24.9", 1), ("25", 0), ("100", 0)])
def test_a_drop_beyond_the_limit_is_exit_code_1(tmp_path: Path, max_drop: str, code: int) -> None:
    """One of four totals is lost: 25 points."""
    truth = {f"{name}.pdf": {"total": 1} for name in "abcd"}
    a, b = write_output(tmp_path / "a", truth), write_output(tmp_path / "b", {**truth, "d.pdf": {"total": 2}})
    place = write_truth(tmp_path / "truth.jsonl", truth)
    assert invoke("compare", a, b, "--truth", place, "--max-drop", max_drop).exit_code == code
    assert invoke("compare", b, a, "--truth", place, "--max-drop", max_drop).exit_code == 0


def test_without_a_truth_differences_are_no_failure(a: str, b: str) -> None:
    result = invoke("compare", a, b)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "in/a.pdf" in result.stderr
    assert "extracted → failed" in result.stderr


def test_compare_prints_json(a: str, b: str) -> None:
    result = invoke("compare", a, b, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == compare(a, b)


def test_eval_prints_json_and_a_plot(tmp_path: Path) -> None:
    out = write_output(tmp_path / "out", {"a.pdf": {"total": 1, "name": "x"}}, certainty={"a.pdf": {"$.total": -1.0}})
    truth = write_truth(tmp_path / "truth.jsonl", {"a.pdf": {"total": 2, "name": "x"}})
    result = invoke("eval", out, "--truth", truth, "--json", "--plot", tmp_path / "review.png", "--by", "tier")
    found = json.loads(result.stdout)
    assert (result.exit_code, result.stderr, (tmp_path / "review.png").exists()) == (0, "", True)
    assert (found["scores"]["total"]["exact"]["value"], found["scores"]["certainty"]["auroc"]) == (0.5, 1.0)
    assert list(found["groups"]) == ["null"]


def test_eval_prints_tables(tmp_path: Path) -> None:
    """A field's name, from a schema, and a document's, from the listing, do not control the terminal."""
    out = write_output(tmp_path / "out", {"a.pdf": {"total": 1, "name": "x"}, "b[red]\x1b.pdf": {}}, certainty={})
    truth = write_truth(tmp_path / "truth.jsonl", {"a.pdf": {"total": 2, "name": "x", "no\x1bte": 1}, "gone.pdf": {}})
    result = invoke("eval", out, "--truth", truth, "--by", "_source")
    assert (result.exit_code, result.stdout, "\x1b" in result.stderr) == (0, "", False)
    for said in ("AUROC 0.500", "documents of the truth without a record: 1 (gone.pdf)", "records without truth: 1 (b[red]\\x1b.pdf)"):
        assert said in result.stderr
