"""The review page in a browser: what is shown, keys alone, edits, what is saved, and what settling makes of it.

Needs Chromium and the package playwright, which drives it; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner

import pipeline
from pipeline import flow
from pipeline.cli import main
from pipeline.flow.pending import list_documents
from pipeline.output import Output
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.records import read_record_table
from pipeline.output.shards import write_shard
from pipeline.output.sources import write_sources
from pipeline.review.page import write_review_page
from pipeline.review.server import ReviewServer
from pipeline.score.cells import make_tolerance
from pipeline.score.evaluation import evaluate_output
from pipeline.stages.requests import compute_document_keys
from tests.support.scored import write_output
from tests.support.workspace import Workspace

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")

ANSWERS = {
    "a.pdf": {"currency": "EUR", "total": 19.99, "lines": [{"amount": 19.99}]},
    "b.pdf": {"currency": "USD", "total": 7, "lines": [{"amount": 3}]},
    "c.pdf": {"currency": None, "total": -1, "lines": []},
    "d.pdf": None,
}
RULES = 'extract.rules=[{name: adds_up, expression: "near(sum(lines.map(i, i.amount)), total, 0.01)", message: The lines do not add up.}]'
DOC_ID, PAGE_COUNT = pa.field("doc_id", pa.string()), pa.field("page_count", pa.int32())


def settle_answers(workspace: Workspace) -> Output:
    """Write the output of a run with these answers; the last document's request failed."""
    for name in ANSWERS:
        workspace.put(name)
    job = workspace.job(RULES).with_demo()
    output = Output(job.output)
    output.create()
    listing = list_documents(job)
    sources, ledger = [], []
    for row in listing.to_pylist():
        name = Path(row["source"]).name
        doc_id = hashlib.sha256((workspace.folder / row["source"]).read_bytes()).hexdigest()
        source = {**row, "doc_id": doc_id, "page_count": 1, "first_page": 1, "last_page": 1}
        (key, _), *_ = compute_document_keys(source, 1, job.fingerprint).items()
        status = {"c.pdf": "invalid", "d.pdf": "failed"}.get(name, "extracted")
        failure = {"stage": "generate", "kind": "length", "message": "the answer was cut"} if status == "failed" else None
        answer = json.dumps(ANSWERS[name]) if ANSWERS[name] else None
        ledger.append({**source, "key": key, "attempt": 1, "status": status, "failure": failure, "answer": answer, "asks": 1, "errors": []})
        sources.append({name: source[name] for name in (*listing.column_names, "doc_id", "page_count")})
    write_sources(output, pa.Table.from_pylist(sources, listing.schema.append(DOC_ID).append(PAGE_COUNT)))
    rows = [{name: row.get(name) for name in LEDGER_SCHEMA.names} for row in ledger]
    write_shard(output.requests, pa.Table.from_pylist(rows, LEDGER_SCHEMA), [str(row["key"]) for row in rows])
    described = {"job": job.dump_keys(), "fingerprint": job.fingerprint, "asked": job.decisive_keys, "versions": {}}
    output.write_job(described)
    flow.settle(job)
    return output


def add_signs(output: Output) -> None:
    """Fill the columns of confidence and evidence, which a ledger without tokens and words leaves empty."""
    table = read_record_table(str(output.root)).table
    certain = [{"path": "$.currency", "confidence": 0.97}, {"path": "$.total", "confidence": 0.62}]
    box = {"path": "$.total", "match": "similar", "words": "19,99", "page": 1, "x0": 20.0, "y0": 30.0, "x1": 60.0, "y1": 42.0}
    names = [Path(source).name for source in table["_source"].to_pylist()]
    for column, values in (("_confidence", certain), ("_evidence", [box])):
        field = table.schema.field(column)
        filled = pa.array([values if name == "a.pdf" else [] for name in names], field.type)
        table = table.set_column(table.schema.get_field_index(column), field, filled)
    table = table.select([name for name in table.column_names if name != "_alerts"])  # as an older version left it
    output.remove_other_records(frozenset())
    write_shard(output.records, table, names)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    made = settle_answers(Workspace(tmp_path / "work"))
    add_signs(made)
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Reviewer:
    """A person at the page, with what the browser complained of and asked for."""

    def __init__(self, browser: Any, file: Path, width: int = 1280) -> None:
        self.page = browser.new_context(viewport={"width": width, "height": 800}, accept_downloads=True).new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def read(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def read_queue(self) -> list[str]:
        """Return the names in the queue; the inner text of an item that is not drawn yet is empty (`content-visibility: auto`)."""
        read = "items => items.map(item => item.firstChild.textContent)"
        return [str(name) for name in self.page.locator("#queue button").evaluate_all(read)]

    def save(self) -> list[dict[str, Any]]:
        """Press the key that saves and return the lines."""
        with self.page.expect_download() as waiting:
            self.press("d")
        text = Path(waiting.value.path()).read_text()
        return [json.loads(line, parse_float=Decimal) for line in text.splitlines()]

    def get_focused(self) -> str:
        return str(self.page.evaluate("document.activeElement.dataset.path || document.activeElement.id"))


@pytest.fixture
def reviewer(browser: Any, output: Output, tmp_path: Path) -> Iterator[Reviewer]:
    written = write_review_page(str(output.root), tmp_path / "review.html", 10)
    assert (written["documents"], written["with_pages"], written["problems"]) == (4, 4, [])
    found = Reviewer(browser, tmp_path / "review.html")
    yield found
    assert found.complaints == []
    assert not [url for url in found.requests if not url.startswith(("file:", "blob:", "data:"))]


def test_the_doubtful_come_first_with_their_reasons(reviewer: Reviewer) -> None:
    assert reviewer.read_queue() == ["c.pdf", "a.pdf", "b.pdf", "d.pdf"]
    assert "total: -1 is less than 0" in reviewer.read("#notes")
    assert reviewer.page.locator(".sheet img").count() == 1
    reviewer.press("j")
    assert reviewer.read("#record-title") == "in/a.pdf"
    marks = {box.get_attribute("data-level"): box.inner_text() for box in reviewer.page.locator("#form > .field").all()}
    assert marks["good"].endswith("97 %")
    assert "printed similarly" in marks["warn"]
    assert "62 %" in marks["warn"]
    reviewer.press("j")
    assert "The lines do not add up." in reviewer.read("#notes")
    assert "rule adds_up" in reviewer.read("#form")


def test_a_value_and_its_box_lead_to_each_other(reviewer: Reviewer) -> None:
    reviewer.press("j")
    box = reviewer.page.locator(".box")
    image, drawn = reviewer.page.locator(".sheet img").bounding_box(), box.bounding_box()
    scale = image["width"] / pipeline_page_width(reviewer)
    assert abs(drawn["x"] - image["x"] - 20 * scale) < 2
    box.click()
    assert reviewer.get_focused() == "$.total"
    assert "chosen" in box.get_attribute("class")


def pipeline_page_width(reviewer: Reviewer) -> float:
    return float(reviewer.page.evaluate("JSON.parse(document.getElementById('data').textContent).documents[1].images[0].width"))


def test_keys_alone_correct_accept_and_save(reviewer: Reviewer, output: Output, tmp_path: Path) -> None:
    reviewer.press("e")
    assert reviewer.get_focused() == "$.total"
    reviewer.page.keyboard.type("12.5")
    reviewer.press("Enter", "Enter")
    assert reviewer.read("#record-title") == "in/a.pdf"
    assert reviewer.read("#progress-text") == "1 of 4 accepted"
    reviewer.press("Enter")
    (c, a) = reviewer.save()
    if c["_source"] == "in/a.pdf":
        c, a = a, c
    assert (c["_source"], c["_corrected"], c["total"], c["lines"]) == ("in/c.pdf", ["$.total"], Decimal("12.5"), [])
    assert (a["_source"], a["_corrected"], a["total"]) == ("in/a.pdf", [], Decimal("19.99"))


@pytest.mark.parametrize("text", ["12,5", "1.234", "abc", "1e3", "--1"])
def test_a_value_of_another_type_is_refused(reviewer: Reviewer, text: str) -> None:
    reviewer.press("e")
    reviewer.page.keyboard.type(text)
    reviewer.press("Enter")
    assert "Wanted: " in reviewer.read("#form")
    reviewer.press("Escape")
    assert reviewer.page.locator("[aria-invalid=true]").count() == 0
    assert reviewer.page.locator('[data-path="$.total"]').input_value() == "-1.00"


def test_rows_of_a_table_can_be_added_and_removed(reviewer: Reviewer) -> None:
    reviewer.press("j")
    reviewer.page.get_by_text("Add a row").click()
    assert reviewer.get_focused() == "$.lines[1].amount"
    reviewer.page.keyboard.type("5")
    reviewer.press("Enter", "Enter")
    (a,) = reviewer.save()
    assert (a["lines"], a["_corrected"]) == ([{"amount": Decimal("19.99")}, {"amount": 5}], ["$.lines"])


def test_work_is_kept_when_the_page_is_closed(reviewer: Reviewer) -> None:
    reviewer.press("Enter")
    reviewer.page.reload()
    assert reviewer.read("#progress-text") == "1 of 4 accepted"


def test_saved_corrections_can_be_opened_elsewhere(reviewer: Reviewer, browser: Any, tmp_path: Path) -> None:
    reviewer.press("e")
    reviewer.page.keyboard.type("12.50")
    reviewer.press("Enter", "Enter")
    (tmp_path / "c.jsonl").write_text(json.dumps(reviewer.save()[0], default=str).replace('"12.50"', "12.50"))
    other = Reviewer(browser, tmp_path / "review.html")
    other.page.set_input_files("#load-file", tmp_path / "c.jsonl")
    other.page.wait_for_function("document.getElementById('message').textContent")
    assert other.read("#progress-text") == "1 of 4 accepted"
    assert other.save()[0]["total"] == Decimal("12.50")


@pytest.mark.parametrize(
    ("name", "left"), [("failed", ["d.pdf"]), ("invalid", ["c.pdf"]), ("rules", ["c.pdf", "b.pdf"]), ("below", ["a.pdf"])]
)
def test_filters_leave_what_they_name(reviewer: Reviewer, name: str, left: list[str]) -> None:
    reviewer.page.select_option("#filter", name)
    assert reviewer.read_queue() == left


def test_a_filter_without_its_column_is_not_offered(reviewer: Reviewer) -> None:
    assert "alerts" not in reviewer.read("#filter")
    assert "broken rules" in reviewer.read("#filter")


def test_search_looks_into_values(reviewer: Reviewer) -> None:
    reviewer.press("/")
    reviewer.page.keyboard.type("usd")
    assert reviewer.read_queue() == ["b.pdf"]


def test_a_phone_has_everything_in_one_column(browser: Any, reviewer: Reviewer, tmp_path: Path) -> None:
    narrow = Reviewer(browser, tmp_path / "review.html", width=400)
    assert narrow.page.evaluate("document.documentElement.scrollWidth") <= 400
    assert narrow.page.locator("#accept").is_visible()


def test_every_input_has_a_name(reviewer: Reviewer) -> None:
    nameless = (
        "[...document.querySelectorAll('input:not([hidden]), select, textarea')].filter(i => !i.labels.length && !i.ariaLabel).length"
    )
    reviewer.press("j")
    assert reviewer.page.evaluate(nameless) == 0


def test_a_documents_text_is_no_markup(browser: Any, output: Output, tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=document.title='owned'>"
    table = read_record_table(str(output.root)).table
    failures = [{**row, "message": evil} if row else row for row in table["_failure"].to_pylist()]
    at = table.column_names.index("_failure")
    table = table.select([name for name in table.column_names if name != "_alerts"])  # as an older version left it
    output.remove_other_records(frozenset())
    write_shard(output.records, table.set_column(at, "_failure", pa.array(failures, table.schema.field(at).type)), ["evil"])
    write_review_page(str(output.root), tmp_path / "evil.html", 0)
    found = Reviewer(browser, tmp_path / "evil.html")
    assert evil in found.read("#notes")
    assert (found.page.title(), found.complaints) == ("Review of slips", [])


def test_what_was_corrected_is_settled_and_is_a_truth(reviewer: Reviewer, output: Output, tmp_path: Path) -> None:
    reviewer.press("e")
    reviewer.page.keyboard.type("0")
    reviewer.press("Enter", "Enter", "Enter")
    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps(line, default=str).replace('"19.99"', "19.99") + "\n" for line in reviewer.save()))
    job = tmp_path / "work/job.yaml"
    found = CliRunner().invoke(main, ["settle", str(job), "--set", RULES, "--corrections", str(file)])
    assert "1 value in 1 record corrected" in found.stderr
    frame = pipeline.read(str(output.root)).set_index("_source")
    corrected = frame.loc["in/c.pdf"]
    assert (corrected["_status"], corrected["total"], list(corrected["_corrected"])) == ("extracted", Decimal("0.00"), ["$.total"])
    assert list(frame.loc["in/a.pdf"]["_corrected"]) == []
    scores = evaluate_output(str(output.root), file, make_tolerance(0, 0))["scores"]
    assert (scores["documents"], scores["perfect"]["value"]) == (2, 1.0)


def test_lists_in_lists_can_be_edited(browser: Any, tmp_path: Path) -> None:
    schema = json.loads((Path(__file__).parents[2] / "schemas/table.json").read_text())
    table = {"title": "T", "unit": None, "continued": False, "columns": ["a", "b"], "rows": [["1", None], ["3", "4"]], "notes": []}
    out = write_output(tmp_path / "out", {"a.pdf": {"tables": [table]}}, schema=schema)
    write_review_page(str(out), tmp_path / "review.html", 0)
    found = Reviewer(browser, tmp_path / "review.html")
    found.page.locator('[data-path="$.tables[0].rows[0][1]"]').fill("2")
    found.press("Enter", "Enter")
    (line,) = found.save()
    assert (line["tables"], line["_corrected"]) == ([{**table, "rows": [["1", "2"], ["3", "4"]]}], ["$.tables[0].rows[0][1]"])
    assert found.complaints == []


@pytest.fixture
def server(output: Output) -> Iterator[ReviewServer]:
    found = ReviewServer(str(output.root))
    running = threading.Thread(target=found.serve)
    running.start()
    yield found
    found.close()
    running.join()


def test_a_served_page_draws_what_is_looked_at(browser: Any, server: ReviewServer) -> None:
    page = browser.new_context().new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(server.address)
    page.wait_for_selector(".sheet img")
    page.keyboard.press("j")
    page.wait_for_selector(".sheet img[alt*='a.pdf']")
    page.wait_for_selector(".box")
    assert complaints == []


@pytest.mark.parametrize(
    "path", ["/", "/guess/", "/guess/pages/0", "TOKEN/pages/4", "TOKEN/pages/-1", "TOKEN/pages/x", "TOKEN/../job.yaml"]
)
def test_nothing_else_is_served(server: ReviewServer, path: str) -> None:
    assert ask_server(server, path.replace("TOKEN", f"/{server.token}"), f"127.0.0.1:{server.server.server_port}") == 404


def test_another_host_name_is_not_answered(server: ReviewServer) -> None:
    assert ask_server(server, f"/{server.token}/", f"127.0.0.1:{server.server.server_port}") == 200
    assert ask_server(server, f"/{server.token}/", "evil.example") == 404
    assert server.server.server_address[0] == "127.0.0.1"


def ask_server(server: ReviewServer, path: str, host: str) -> int:
    """Return the status of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server.server_port)
    connection.request("GET", path, headers={"Host": host})
    status = connection.getresponse().status
    connection.close()
    return status


def test_five_thousand_documents_open_at_once(browser: Any, output: Output, tmp_path: Path) -> None:
    table = read_record_table(str(output.root)).table
    many = pa.concat_tables([table] * 1250)
    names = pa.array([f"in/{number:05}.pdf" for number in range(many.num_rows)])
    table = table.select([name for name in table.column_names if name != "_alerts"])  # as an older version left it
    output.remove_other_records(frozenset())
    write_shard(output.records, many.set_column(many.column_names.index("_source"), "_source", names), ["many"])
    write_review_page(str(output.root), tmp_path / "many.html", 0)
    started_s = time.monotonic()
    found = Reviewer(browser, tmp_path / "many.html")
    found.page.wait_for_selector("#form .field")
    assert found.page.locator("#queue li").count() == 5000
    assert time.monotonic() - started_s < 15
    assert found.complaints == []
