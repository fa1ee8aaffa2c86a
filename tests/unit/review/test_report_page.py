"""Report for people: what it says, that it is safe and bounded, and that `settle` renews it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.output import Output
from pipeline.output.shards import write_shard
from pipeline.output.summary import (
    SUMMARY_SCHEMA,
    Example,
    FieldCount,
    Findings,
    OutputSummary,
    RecordSummary,
    RequestSummary,
    SourceSummary,
    Timeline,
    sum_steps,
)
from pipeline.report import Report
from pipeline.review.markup import Markup, make_element, make_markup, show_controls
from pipeline.review.report_page import MAX_ROWS, PAUSE_S, build_report_page, draw_steps, split_runs, write_report_page
from pipeline.storage.location import parse_location
from tests.support.buckets import Bucket

EVIL = "</style></td><script>document.title='owned'</script><img src=x onerror=alert(1)>\" onload=\"x' \u202etxt.exe\x1b[2J\ud800"
ALLOWED = {
    "html",
    "head",
    "meta",
    "link",
    "title",
    "style",
    "body",
    "main",
    "section",
    "footer",
    "h1",
    "h2",
    "h3",
    "p",
    "span",
    "strong",
    "code",
    "dl",
}
ALLOWED |= {
    "div",
    "dt",
    "dd",
    "table",
    "caption",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "ul",
    "li",
    "b",
    "i",
    "figure",
    "figcaption",
    "svg",
    "rect",
}
ALLOWED |= {"line", "details", "summary"}


def make_report(**given: Any) -> Report:
    report = Report("slips", "/out/slips", "demo", True, **{"documents": 3, **given})
    report.count_records(["extracted", "extracted", "failed"], ["render/broken"])
    return report


def make_timeline(*times: int, pages: int = 1) -> Timeline:
    return Timeline(1, *sum_steps(np.array(times), np.array([[pages, 1, 0]] * len(times))))


def make_findings(name: str = "total", text: str = "text", source: str = "a.pdf", kinds: int = 1) -> Findings:
    found = Findings()
    for number in range(kinds):
        found.add(name if number == 0 else f"{name}{number}", 2, [Example(source, text)] * 2)
    return found


def make_summary(name: str = "total", text: str = "text", source: str = "a.pdf", kinds: int = 1) -> OutputSummary:
    records = RecordSummary(3)
    records.statuses.update({"extracted": 2, "failed": 1})
    records.failures = make_findings("render/broken", text, source, kinds)
    for what in ("disagreements", "unwitnessed", "alerts", "broken_rules"):
        setattr(records, what, make_findings(name, text, source, kinds))
    records.rules.update({(found, "broken"): 2 for found in records.broken_rules.counts})
    records.confidence[3] = 5
    records.fields = {found: FieldCount(2, 1.0, 2, 1) for found in records.broken_rules.counts}
    requests = RequestSummary(timeline=make_timeline(100, 101, 103))
    requests.statuses["extracted"] = 3
    requests.models[source, "e"] = 3
    return OutputSummary(SourceSummary(3, 2, 0, 4, 12_345, [("pdf", 3)]), requests, records)


def read_text(page: str) -> str:
    """Return what a person reads."""
    body = page.partition("<body>")[2]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body))


class TagReader(HTMLParser):
    """Collects the elements of a page and the names of their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_it_says_what_came_in_what_came_out_and_what_failed() -> None:
    text = read_text(build_report_page(make_summary(), make_report()))
    for said in ("documents 3", "size 12.3 kB", "with the same bytes as another 1", "2 of 3 records are valid", "extracted 2", "failed 1"):
        assert said in text
    assert "Exit code 1" in text
    assert "render/broken" in text
    assert "none of the renderers can draw it" in text
    assert "--retry failed:broken" in text
    assert "a.pdf : text" in text
    assert "The demonstration model answered" in text


def test_it_says_what_to_doubt_and_when_it_was_asked() -> None:
    text = read_text(build_report_page(make_summary(), make_report()))
    assert "5 values by confidence; 5 (100%) are below 0.9" in text
    assert "3 pages in 4.0 s: 0.75 pages/s" in text
    assert "1970-01-01 00:01:40 UTC" in text


def test_an_output_without_doubts_says_so() -> None:
    found = OutputSummary(SourceSummary(0, 0, 0, 0, 0, []), RequestSummary(), RecordSummary())
    text = read_text(build_report_page(found, Report("slips", "out", "m", False)))
    assert "No broken rule, no disagreement, no alert" in text
    assert "What failed" not in text
    assert "Over time" not in text


@pytest.mark.parametrize(("given", "said"), [({"missing": ["a"]}, "Not finished"), ({"partial": 1}, "1 record lacks pages")])
def test_the_first_sentence_is_the_exit_code_in_words(given: dict[str, Any], said: str) -> None:
    assert said in read_text(build_report_page(make_summary(), make_report(**given)))


def test_hostile_texts_are_texts() -> None:
    report = make_report()
    report.job = report.output = report.model = report.engine = EVIL
    page = build_report_page(make_summary(EVIL, EVIL, EVIL), report)
    reader = TagReader()
    reader.feed(page)
    assert reader.names - ALLOWED == set()
    assert not [name for name in reader.attributes if name.startswith("on") or name == "src"]
    assert "&lt;script&gt;" in page
    assert not re.search("[\u202e\x1b\ud800]", page)
    page.encode()


def test_nothing_is_loaded_or_run() -> None:
    page = build_report_page(make_summary(), make_report())
    assert "default-src 'none'" in page
    assert re.findall(r"(?:https?:)?//\w+|url\(|@import|<script", page) == []
    assert re.findall(r'href="([^"]*)"', page) == ["data:,"]


def test_its_size_is_bounded() -> None:
    small = build_report_page(make_summary("x" * 10_000, "y" * 100_000, "z" * 10_000, kinds=MAX_ROWS), make_report())
    large = build_report_page(make_summary("x" * 10_000, "y" * 100_000, "z" * 10_000, kinds=400), make_report())
    assert len(large) - len(small) < 1000
    assert len(large) < 500_000


def test_a_pause_is_left_out_of_the_time_line() -> None:
    line = make_timeline(0, 5, 9, 9 + PAUSE_S + 1, 9 + PAUSE_S + 6)
    spans = split_runs(line)
    assert spans == [(0, 10), (610, 616)]
    bars, width_s, pauses = draw_steps(line, spans)
    assert (width_s, pauses, bars[:, 0].tolist()) == (1, [10.0], [1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1])


def test_a_long_time_has_few_bars_and_the_same_pages() -> None:
    line = make_timeline(*range(0, 7200, 7))
    bars, width_s, _ = draw_steps(line, split_runs(line))
    assert (len(bars), width_s, bars[:, 0].sum()) == (60, 120, len(range(0, 7200, 7)))


def test_only_markup_is_not_escaped() -> None:
    assert make_element("p", "a<b", Markup("<br>"), class_='x"y', data_name=None) == '<p class="x&quot;y">a&lt;b<br></p>'
    assert make_markup(["<", [1, Markup("<i>")]]) == "&lt;1<i>"
    assert show_controls("a\tb\nc\u2028") == "a\\tb\nc\\u2028"


def test_it_is_written_into_an_object_store(bucket: Bucket) -> None:
    output = Output(parse_location(bucket.url("report")))
    output.create()
    failure = {"stage": "render", "kind": "empty", "message": "the file is empty"}
    rows = [{"_source": "s3://in/a.pdf", "_status": "failed", "_failure": failure}]
    write_shard(output.records, pa.Table.from_pylist(rows, SUMMARY_SCHEMA), ["a"])
    write_report_page(output, make_report())
    assert "The file has 0 bytes" in bucket.get("report/report.html").decode()
