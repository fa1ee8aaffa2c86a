"""Corrections: what a line must say, that a whole file is refused for one wrong line, and that earlier ones are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import JobError
from pipeline.output import Output
from pipeline.output.corrections import add_corrections, compute_corrections_digest, find_column_name, read_corrections
from tests.support.scored import make_plan

LINE = {"_source": "a.pdf", "_page": None, "_doc_id": "d", "_corrected": ["$.total"], "total": 5, "name": "as read"}


@pytest.fixture
def output(tmp_path: Path) -> Output:
    made = Output(tmp_path / "out")
    made.create()
    return made


def add(output: Output, *lines: dict[str, Any]) -> int:
    file = Path(str(output.root)).parent / "c.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(add_corrections(output, file, make_plan(), ["a.pdf", "b.pdf"]))


def test_only_the_corrected_columns_are_taken(output: Output) -> None:
    assert add(output, LINE) == 1
    (found,) = read_corrections(output).values()
    assert (found.key, found.doc_id, dict(found.values)) == (("a.pdf", None), "d", {"total": 5})
    assert found.correct_value({"total": 1, "name": "n"}) == {"total": 5, "name": "n"}
    assert found.correct_value(None) == {"total": 5}


def test_a_record_found_right_is_no_correction(output: Output) -> None:
    assert add(output, LINE | {"_corrected": []}) == 0
    assert read_corrections(output) == {}


def test_later_corrections_join_earlier_ones(output: Output) -> None:
    add(output, LINE)
    before = compute_corrections_digest(read_corrections(output))
    add(output, LINE | {"_source": "b.pdf", "_corrected": ["$.items[0].price"], "items": [{"what": None, "price": 1}]})
    add(output, LINE | {"total": 6})
    assert {key: dict(found.values) for key, found in read_corrections(output).items()} == {
        ("a.pdf", None): {"total": 6},
        ("b.pdf", None): {"items": [{"what": None, "price": 1}]},
    }
    assert compute_corrections_digest(read_corrections(output)) != before


WRONG = [
    ([], "a correction is a JSON object"),
    ({**LINE, "_source": 1}, "a correction is a JSON object with `_source`"),
    ({**LINE, "_corrected": "total"}, "`_corrected` must be the list of the paths"),
    ({**LINE, "_corrected": ["total"]}, "`_corrected` has 'total', which is no path"),
    ({**LINE, "_corrected": ["$.day"]}, "`_corrected` names day, of which the line has no value"),
    ({**LINE, "total": "5"}, 'is "5", which is not a number'),
    ({**LINE, "_page": "1"}, "`_page` must be a number or null"),
    ({**LINE, "_source": "c.pdf"}, "is about c.pdf, which"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_one_wrong_line_keeps_all_out(output: Output, line: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        add(output, LINE, line)
    assert read_corrections(output) == {}


@pytest.mark.parametrize(("path", "name"), [("$.total", "total"), ("$.line_items[2].amount", "line_items"), ('$["a \\"b\\""].c', 'a "b"')])
def test_a_path_begins_with_its_column(path: str, name: str) -> None:
    assert find_column_name(path) == name
