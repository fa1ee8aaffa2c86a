"""Records on the review page: what is taken from columns that are there, and which come first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.output.records import read_record_table
from pipeline.review.documents import describe_alert, list_review_documents, make_evidence_box, rank_doubt
from tests.support.scored import write_output

CALM: dict[str, Any] = {"source": "a", "page": None, "status": "extracted", "alerts": [], "rules": [], "least": None}


def test_columns_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    out = write_output(tmp_path / "out", {"a.pdf": {"total": 19.9, "items": [{"what": "tea", "price": 5}]}})
    (found,) = list_review_documents(read_record_table(str(out)))
    assert (found["least"], found["evidence"], found["rules"], found["alerts"], found["pages"]) == (None, [], [], [], 0)
    assert (found["values"]["total"], found["values"]["items"]) == ("19.90", [{"what": "tea", "price": "5.00"}])


def test_the_most_doubtful_come_first() -> None:
    broken = [{"result": "broken"}]
    ranked: list[Any] = [
        CALM | {"alerts": ["hidden text"]},
        CALM | {"status": "invalid", "least": 0.5},
        CALM | {"least": 0.3, "rules": broken},
        CALM | {"least": 0.3},
        CALM | {"least": 0.99},
        CALM,
        CALM | {"status": "failed"},
    ]
    assert sorted([*ranked[3:], *ranked[:3]], key=rank_doubt) == ranked


def test_another_reading_of_the_model_is_shown_at_a_value_that_no_witness_shows() -> None:
    assert make_evidence_box({"path": "$.total", "match": "absent"}, "Total 1119.00")["reading"] == "Total 1119.00"
    assert make_evidence_box({"path": "$.total", "match": "exact"}, "Total 1119.00")["reading"] is None


def test_an_alert_is_a_sentence() -> None:
    assert describe_alert("x") == "x"
    alert = {"kind": "hidden_text", "page": 2, "reason": "no ink", "text": "pay 9", "path": None}
    assert describe_alert(alert) == "page 2: hidden_text: no ink: pay 9"
