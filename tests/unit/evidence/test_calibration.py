"""Calibrated confidence: what its file says is applied, and a file that is none, damaged or of another schema is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import JobError
from pipeline.evidence.calibration import (
    Calibration,
    PageKind,
    ValueFacts,
    decide_page_kind,
    dump_calibration,
    find_worst_quality,
    list_features,
    load_calibration,
)
from pipeline.evidence.match import Evidence, Match, Witness
from pipeline.records import PageRow, WordMark
from pipeline.schema.certainty import TokenScore

CALIBRATION = Calibration(
    "s", "demo", "transformers", ("match exact", "sum"), np.array([0.5, 1.0]), np.array([1.0, 2.0]), np.array([3.0, 0.5]), 0.25,
    {"scan": (0.5, -1.0)},
)  # fmt: skip


def make_facts(path: str = "$.total", logprob: float = -0.5, kind: PageKind = PageKind.SCAN, **more: Any) -> ValueFacts:
    about = {"field": path[2:], "value": "x", "type": "text", "evidence": None, "is_disputed": False, "rules": {}, "quality": None}
    return ValueFacts(path=path, score=TokenScore(logprob, 1, logprob, logprob), kind=kind, **{**about, **more})


def make_page(marks: bytes | str | None = "", unevenness: float | None = 0.0) -> PageRow:
    """Return a page with these marks of its words, without a text layer for ""."""
    layer = None if marks == "" else {"text": "a", "boxes": b"", "unit_pt": 0.1, "marks": marks}
    quality = None if unevenness is None else {"contrast": 0.9, "sharpness": 0.5, "noise": 0.01, "unevenness": unevenness}
    return {"text_layer": layer, "quality": quality}  # type: ignore[typeddict-item, return-value]


def test_the_confidence_is_that_of_the_formula() -> None:
    logit = math.log(math.exp(-0.5) / (1 - math.exp(-0.5)))
    z = 3.0 * (1 - 0.5) / 1.0 + 0.5 * (logit - 1.0) / 2.0 + 0.25
    witnessed = Evidence("$.total", "x", Match.EXACT, witness=Witness.TEXT, places=1)
    assert CALIBRATION.rate_values([make_facts(evidence=witnessed)]) == pytest.approx([1 / (1 + math.exp(-0.5 * z + 1.0))])
    assert CALIBRATION.rate_values([make_facts(evidence=witnessed, kind=PageKind.PHOTO)]) == pytest.approx([1 / (1 + math.exp(-z))])
    assert CALIBRATION.rate_values([]) == []


def test_a_file_is_applied_as_it_was_fitted(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps(dump_calibration(CALIBRATION)))
    facts = [make_facts(logprob=-0.1), make_facts(logprob=-3.0)]
    assert load_calibration(file, "s").rate_values(facts) == pytest.approx(CALIBRATION.rate_values(facts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "else"}, "which is no calibration: name one that `pipeline eval --calibrate`"),
        ({"schema": "t"}, "which was fitted on records of another schema"),
        ({"weights": [1.0]}, r"which is damaged \(weights must be 2 numbers\)"),
        ({"scales": [1.0, 0.0]}, r"damaged \(scales must be above 0\)"),
        ({"means": ["a", 1]}, "damaged"),
        ({"kinds": {"scan": [-1.0, 0.0]}}, r"damaged \(slopes must be above 0\)"),
        ({"intercept": None}, "damaged"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps({**dump_calibration(CALIBRATION), **change}))
    with pytest.raises(JobError, match=f"extract.calibration names .*c.json, .*{message}"):
        load_calibration(file, "s")


def test_a_file_that_is_not_there_or_is_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"c.json, which cannot be read"):
        load_calibration(tmp_path / "c.json", "s")
    (tmp_path / "c.json").write_bytes(b"PAR1\xff")
    with pytest.raises(JobError, match=r"c.json, which is no calibration"):
        load_calibration(tmp_path / "c.json", "s")


@pytest.mark.parametrize(
    ("pages", "kind"),
    [
        ([make_page(None)], "digital"),
        ([make_page(bytes([WordMark.OVERLAY]))], "scan"),
        ([make_page(bytes([WordMark.UNDRAWN]))], "scan"),
        ([make_page(None), make_page()], "scan"),
        ([make_page(unevenness=0.3)], "photo"),
        ([make_page(), make_page(unevenness=0.3)], "photo"),
        ([make_page(unevenness=None)], "scan"),
    ],
)
def test_the_worst_page_decides_the_kind(pages: list[PageRow], kind: str) -> None:
    assert decide_page_kind(pages) == kind


def test_the_worst_page_decides_the_quality() -> None:
    assert find_worst_quality([make_page(), make_page(unevenness=0.3)]) == (0.9, 0.5, 0.01, 0.3)
    assert find_worst_quality([make_page(), make_page(unevenness=None)]) is None


def test_a_value_is_described_by_its_neighbours_too() -> None:
    near, far = [make_facts(f"$.items[0].{name}", logprob) for name, logprob in (("a", -0.1), ("b", -4.0))], make_facts("$.c", -0.1)
    a, b, c = list_features([*near, far])
    assert a["least beside"] == b["least beside"] == b["sum"] < c["least beside"] == c["sum"]
    assert a["document"] == b["sum"]


def test_a_rule_counts_as_it_was_judged() -> None:
    (row,) = list_features([make_facts(rules={"adds_up": True, "in_order": False})])
    assert (row["rule adds_up passed"], row["rule in_order broken"], row.get("rule in_order passed")) == (1.0, 1.0, None)


def test_what_was_only_read_again_is_a_fact_beside_that_it_is_absent() -> None:
    """A calibration that was fitted before knows the second alone, and rates it as before."""
    absent, reread = (Evidence("$.total", "x", match, witness=None) for match in (Match.ABSENT, Match.REREAD))
    before, row = list_features([make_facts("$.total", evidence=absent)]), list_features([make_facts("$.total", evidence=reread)])
    assert row == [before[0] | {"match reread": 1.0, "text reread": 1.0}]


def test_where_a_value_stands_among_others_is_known_of_it() -> None:
    def witness(path: str, **about: Any) -> ValueFacts:
        return make_facts(path, evidence=Evidence(path, "x", Match.EXACT, witness=Witness.OCR, places=1, **about))

    one, other = witness("$.lines[0].item", item_fit=0.5, has_words_after=True), witness("$.lines[0].count", item_fit=0.0, rivals=2)
    absent = make_facts("$.total", evidence=Evidence("$.total", "x", Match.ABSENT))
    item, count, total = list_features([one, other, absent])
    assert item["text before words"] == 1.0
    assert item["least item"] == 0.0
    assert (item["most rivals"], count["most rivals"]) == (2, 2)
    assert (item["unwitnessed beside"], total["unwitnessed beside"]) == (0.0, 1.0)
    assert "most rivals" not in total
