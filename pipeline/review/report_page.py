"""Report for people: the summary of an output and the report of the command that wrote it in, `report.html` out.

One file of a bounded size, however large the output: no script, no other file, no request, as its policy says. Charts are SVG, each with
its numbers in words or in a table.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from pipeline.failure_kinds import find_failure_kind
from pipeline.output import SHARD_SUFFIX, Output
from pipeline.output.summary import (
    Example,
    FieldCount,
    Findings,
    OutputSummary,
    RecordSummary,
    RequestSummary,
    SourceSummary,
    Timeline,
    summarize_output,
)
from pipeline.records import Status
from pipeline.report import ExitCode, Report
from pipeline.review.markup import Markup, cut_text, make_element, make_list, make_markup
from pipeline.schema.rules import RuleResult
from pipeline.version import __version__
from pipeline.wording import format_count, format_duration

MAX_ROWS = 25
"""Rows of a table."""
BARS = 60
"""Steps of the time line that are drawn."""
PAUSE_S = 600
"""A time without any answer that is longer separates two runs, and is left out of the time line."""
LOW, HIGH = 0.5, 0.9
"""Confidence below which a value is doubtful, and from which it is good, as on the review page."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
NOTHING = OutputSummary(SourceSummary(0, 0, 0, 0, 0, []), RequestSummary(), RecordSummary())
DIGEST = re.compile(rb'<meta name="made-of" content="(\w+)">')
HEAD_BYTES = 2048
TONES = {Status.EXTRACTED: "good", Status.INVALID: "warn", Status.FAILED: "bad"}


def write_report_page(output: Output, report: Report) -> None:
    """Write `report.html` of an output whose records are settled, unless the page that is there was made of the same. Raises RunError.

    To read all of an output takes 27 s of CPU for a million documents.
    """
    digest = compute_page_digest(output, report)
    if read_page_digest(output) != digest:
        output.root.put("report.html", build_report_page(summarize_output(output), report, digest).encode())


def compute_page_digest(output: Output, report: Report) -> str:
    """Return the SHA-256 of all that a page is made of: the report, what each shard of records was made of, the shards of the ledger."""
    settled, ledger = output.read_settled(), output.requests.list_names(SHARD_SUFFIX)
    parts = [__version__, build_report_page(NOTHING, report), json.dumps([settled, ledger], sort_keys=True)]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def read_page_digest(output: Output) -> str | None:
    """Return the digest that the page of an output has; None where there is no page, or an older version's."""
    with suppress(OSError):
        if found := DIGEST.search(output.root.read("report.html")[:HEAD_BYTES]):
            return found[1].decode()
    return None


def build_report_page(found: OutputSummary, report: Report, digest: str = "") -> str:
    """Return the page."""
    title = f"Report of {report.job}"
    sections = [
        show_sources(found),
        show_records(found.records, report),
        show_failures(found.records),
        show_doubts(found.records),
        show_fields(found.records),
        show_time(found.requests),
        show_cost(found, report),
    ]
    styles = Markup("".join(files("pipeline.review").joinpath(name).read_text(encoding="utf-8") for name in ("colors.css", "report.css")))
    head = [
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Markup(f'<meta name="made-of" content="{digest}"><link rel="icon" href="data:,">'),
        make_element("title", title),
        make_element("style", styles),
    ]
    body = make_element(
        "main", make_element("h1", title), describe_output(report), show_verdict(report), *sections, show_next_steps(report)
    )
    return f'<!doctype html>\n<html lang="en">\n{make_element("head", head)}\n{make_element("body", body)}\n</html>\n'


def describe_output(report: Report) -> Markup:
    model = f"{report.model}, engine {report.engine}" if report.engine else report.model
    notice = "The demonstration model answered: its values are not reliable." if report.demonstration else None
    lines = [make_element("p", make_element("code", report.output)), make_element("p", model, class_="quiet")]
    return make_markup([*lines, *([make_element("p", make_element("strong", notice))] if notice else [])])


def show_verdict(report: Report) -> Markup:
    """Return the sentence that a person reads first."""
    good = report.statuses.get(Status.EXTRACTED, 0)
    many = f"{good:,} of {format_count(report.records, 'record')} {'is' if good == 1 else 'are'} valid"
    tone, text = {
        ExitCode.OK: (
            "good",
            f"All {format_count(report.records, 'record')} are valid." if report.records != 1 else "The record is valid.",
        ),
        ExitCode.DOCUMENTS_FAILED: (
            "warn",
            f"{many}; {format_count(report.partial, 'record')} lacks pages." if report.partial else f"{many}.",
        ),
    }.get(report.exit_code, ("bad", f"Not finished: {many} so far. The same command goes on."))
    return make_element(
        "p", text, make_element("span", f" Exit code {int(report.exit_code)}.", class_="quiet"), class_="verdict", data_tone=tone
    )


# ---- Sections -------------------------------------------------------------------------------------------------------


def show_sources(found: OutputSummary) -> Markup:
    sources = found.sources
    facts = {
        "documents": f"{sources.documents:,}",
        "pages": f"{sources.pages:,}",
        "size": format_bytes(sources.size_bytes),
        "with the same bytes as another": f"{max(0, sources.documents - sources.contents - sources.unread):,}",
    }
    types = ", ".join(f"{count:,} {name}" for name, count in sources.types)
    return make_element(
        "section", make_element("h2", "What came in"), make_facts(facts), make_element("p", f"By name: {types}.", class_="quiet")
    )


def show_records(records: RecordSummary, report: Report) -> Markup:
    shares = [(str(status), records.statuses.get(status, 0), TONES[status]) for status in Status]
    facts = {name: f"{count:,}" for name, count, _ in shares}
    others = [("that lack pages", records.partial), ("corrected by a person", records.corrected)]
    notes = make_list(f"{format_count(count, 'record')} {name}" for name, count in others if count)
    missing = make_element("p", f"{format_count(len(report.missing), 'source')} without a record: a defect of this package.")
    return make_element(
        "section",
        make_element("h2", "What came out"),
        make_facts(facts),
        draw_shares(shares),
        notes if any(count for _, count in others) else "",
        missing if report.missing else "",
    )


def show_failures(records: RecordSummary) -> Markup:
    if not records.failures.counts:
        return Markup("")
    rows = []
    for name, count in records.failures.counts.most_common(MAX_ROWS):
        kind = find_failure_kind(name)
        told = [make_element("p", kind.cause), make_element("p", make_code(kind.remedy), class_="quiet")] if kind else []
        rows.append([name, f"{count:,}", [*told, show_examples(records.failures.examples[name])]])
    table = make_table("Records without a valid result, by kind", ["kind", "records", "cause, what to do, examples"], rows)
    return make_element("section", make_element("h2", "What failed"), table)


def show_doubts(records: RecordSummary) -> Markup:
    """Return what speaks against values: rules, disagreements, alerts, values that no witness shows."""
    parts = [
        show_rules(records),
        show_findings("Parts that disagree", "Two requests of one document read different values of these fields.", records.disagreements),
        show_findings("Alerts", "Text that a reader of the page cannot see, or values that only such text shows.", records.alerts),
        show_findings(
            "Values that no witness shows",
            "Looked for in the words of the pages, and not found as they are written; the model alone may have read them again.",
            records.unwitnessed,
        ),
    ]
    shown = [part for part in parts if part]
    nothing = make_element("p", "No broken rule, no disagreement, no alert, no value that was looked for and not found.")
    return make_element("section", make_element("h2", "What to doubt"), *(shown or [nothing]))


def show_rules(records: RecordSummary) -> Markup:
    names = sorted({name for name, _ in records.rules}, key=lambda name: (-records.broken_rules.counts[name], name))
    if not names:
        return Markup("")
    rows = [
        [
            name,
            *(f"{records.rules[name, str(result)]:,}" for result in RuleResult),
            show_examples(records.broken_rules.examples.get(name, [])),
        ]
        for name in names[:MAX_ROWS]
    ]
    table = make_table(
        "Records by what each rule says of them", ["rule", *map(str, RuleResult), "examples"], rows, more=len(names) - MAX_ROWS
    )
    return make_markup([make_element("h3", "Rules"), table])


def show_findings(title: str, caption: str, found: Findings) -> Markup:
    if not found.counts:
        return Markup("")
    rows = [[name, f"{count:,}", show_examples(found.examples[name])] for name, count in found.counts.most_common(MAX_ROWS)]
    more = len(found.counts) - MAX_ROWS
    return make_markup([make_element("h3", title), make_table(caption, ["what", "times", "examples"], rows, more=more)])


def show_fields(records: RecordSummary) -> Markup:
    """Return how sure the values are: all of them, and by field."""
    if not records.fields:
        return Markup("")
    parts: list[object] = [make_element("h2", "How sure the values are")]
    if total := int(records.confidence.sum()):
        steps = np.linspace(0, 1, len(records.confidence) + 1)
        tones = ["bad" if low < LOW else "warn" if low < HIGH else "good" for low in steps[:-1].round(6)]
        below = int(records.confidence[: round(HIGH * len(tones))].sum())
        told = f"{total:,} values by confidence; {below:,} ({below / total:.0%}) are below {HIGH}. Without a calibration it is a ranking."
        parts.append(draw_bars(records.confidence, told, ("0", f"{LOW}", "1"), tones))
        cells = [
            [f"{low:.2f} to {low + 1 / len(tones):.2f}", f"{count:,}"] for low, count in zip(steps[:-1], records.confidence, strict=True)
        ]
        parts.append(make_details("Numbers", make_table(told, ["confidence", "values"], cells)))
    doubtful = sorted(records.fields.items(), key=lambda one: rank_field(one[1]))
    rows = [[name or "the record", *format_field(count)] for name, count in doubtful[:MAX_ROWS]]
    titles = ["field", "mean confidence", "looked for in the page", "not found there"]
    parts.append(make_table("Fields, the most doubtful first", titles, rows, more=len(doubtful) - MAX_ROWS))
    return make_element("section", *parts)


def rank_field(count: FieldCount) -> float:
    """Return what fields are sorted by: their mean confidence, or the share of their values that a witness shows."""
    if count.rated:
        return count.confidence / count.rated
    return 1 - count.unwitnessed / max(1, count.looked_for)


def format_field(count: FieldCount) -> list[str]:
    mean = f"{count.confidence / count.rated:.2f}" if count.rated else "–"
    found = f"{count.unwitnessed:,} ({count.unwitnessed / count.looked_for:.0%})" if count.looked_for else "–"
    return [mean, f"{count.looked_for:,}" if count.looked_for else "–", found]


def show_time(requests: RequestSummary) -> Markup:
    spans = split_runs(requests.timeline)
    if not spans:
        return Markup("")
    line, width_s, pauses = draw_steps(requests.timeline, spans)
    first, last = (format_time(spans[place][side]) for place, side in ((0, 0), (-1, 1)))
    pages, requests_done, failed = (int(number) for number in requests.timeline.counts.sum(axis=0))
    lasted_s = sum(end - start for start, end in spans)
    several = f" in {len(spans)} runs; pauses of more than {PAUSE_S // 60} minutes are left out" if len(spans) > 1 else ""
    told = (
        f"{format_count(pages, 'page')} in {format_duration(lasted_s)}{several}: {pages / lasted_s:.2g} pages/s from first to last answer. "
        f"A bar is {format_duration(width_s, 2)}; the highest is {line[:, 0].max() / width_s:.2g} pages/s."
    )
    parts = [make_element("h2", "Over time"), draw_bars(line[:, 0], told, (first, last), pauses=pauses)]
    if failed:
        caption = f"{failed:,} of {requests_done:,} requests failed."
        parts.append(draw_bars(line[:, 2], caption, (first, last), ["bad"] * len(line), pauses))
    return make_element("section", *parts)


def show_cost(found: OutputSummary, report: Report) -> Markup:
    requests, pages = found.requests, max(1, int(found.requests.timeline.counts[:, 0].sum()))
    facts = {
        "requests": f"{requests.statuses.total():,}",
        "tokens read": f"{requests.prompt_tokens:,}",
        "tokens written": f"{requests.completion_tokens:,}",
        "tokens read a page": f"{requests.prompt_tokens / pages:,.0f}",
        "tokens written a page": f"{requests.completion_tokens / pages:,.0f}",
        "mean time of a request": format_duration(requests.request_s / max(1, requests.statuses.total()), 2),
    }
    if requests.rule_requests:
        facts["of the requests, about broken rules"] = f"{requests.rule_requests:,}"
    if requests.reread_requests:
        facts["of the requests, to read values again"] = f"{requests.reread_requests:,}"
    if asked := report.last_asked:
        facts |= {"last run": format_duration(asked["elapsed_s"] or 0), "pages/s, start-up included": f"{asked['pages_per_s'] or 0:.2g}"}
        if (busy := asked["engine_busy_share"]) is not None:
            facts["engines busy in the last run"] = f"{busy:.0%}"
    models = make_list(
        f"{format_count(count, 'request')} to {model}, engine {engine}" for (model, engine), count in requests.models.most_common(MAX_ROWS)
    )
    note = make_element("p", "All attempts that the ledger has are counted.", class_="quiet")
    return make_element("section", make_element("h2", "Tokens and time"), make_facts(facts), models, note)


def show_next_steps(report: Report) -> Markup:
    """Return the commands that go on from here."""
    output = report.output
    steps = [
        ["look at doubtful records beside their pages, and correct them: ", make_element("code", f"pipeline review {output}")],
        ["the documents that went worst: ", make_element("code", f"pipeline status {output}")],
        ["in Python: ", make_element("code", f"pipeline.read({output!r})")],
    ]
    return make_element("footer", make_list(steps))


# ---- Parts ----------------------------------------------------------------------------------------------------------


def make_facts(facts: dict[str, str]) -> Markup:
    """Return figures with what each of them counts."""
    return make_element(
        "dl", *(make_element("div", make_element("dt", name), make_element("dd", text)) for name, text in facts.items()), class_="facts"
    )


def make_table(caption: str, titles: Sequence[str], rows: Iterable[Sequence[object]], more: int = 0) -> Markup:
    """Return a table whose first column names its rows. Texts that begin with a digit are numbers, on the right of their columns."""
    rows = [*rows]
    numbers = {title for title, *cells in zip(titles, *rows, strict=True) if is_figure(cells[0])} if rows else set()
    head = make_element("tr", *(make_element("th", title, scope="col", class_="number" if title in numbers else None) for title in titles))
    body = []
    for first, *rest in rows:
        cells = [
            make_element("td", cell, class_="number" if is_figure(cell) else None, data_name=title if is_figure(cell) else None)
            for title, cell in zip(titles[1:], rest, strict=True)
        ]
        body.append(make_element("tr", make_element("th", cut_text(str(first)), scope="row"), *cells))
    table = make_element(
        "table", make_element("caption", caption), make_element("thead", head), make_element("tbody", *body), class_="wide"
    )
    return make_markup(
        [make_element("div", table, class_="rows"), make_element("p", f"{more:,} more.", class_="quiet") if more > 0 else ""]
    )


def is_figure(cell: object) -> bool:
    return isinstance(cell, str) and not isinstance(cell, Markup) and (cell[:1].isdigit() or cell == "–")


def show_examples(examples: Iterable[Example]) -> Markup:
    items = [[make_element("b", cut_text(one.source)), ": ", cut_text(one.text)] for one in examples]
    return make_list(items, "examples") if items else Markup("")


def make_code(text: str) -> Markup:
    """Return text whose parts between backquotes are code."""
    parts = text.split("`")
    return make_markup([make_element("code", part) if place % 2 else part for place, part in enumerate(parts)])


def make_details(title: str, content: Markup) -> Markup:
    return make_element("details", make_element("summary", title), content)


def draw_shares(shares: Sequence[tuple[str, int, str]]) -> Markup:
    """Return one bar that is divided by counts, each with its name and tone."""
    total = sum(count for _, count, _ in shares) or 1
    parts, start = list[Markup](), 0.0
    for _, count, tone in shares:
        parts.append(make_element("rect", x=f"{start:.3f}", y=0, width=f"{100 * count / total:.3f}", height=1, class_=tone))
        start += 100 * count / total
    label = ", ".join(f"{name} {count:,}" for name, count, _ in shares)
    bar = make_element("svg", *parts, viewBox="0 0 100 1", preserveAspectRatio="none", role="img", aria_label=label, class_="bar")
    keys = [[make_element("i", data_tone=tone), f"{name} {count / total:.1%}"] for name, count, tone in shares]
    return make_element("figure", bar, make_list(keys, "keys"))


def draw_bars(
    numbers: NDArray[np.int64], told: str, axis: Sequence[str], tones: Sequence[str] | None = None, pauses: Sequence[float] = ()
) -> Markup:
    """Return a bar chart; `told` is what it says in words, `axis` stands below it, `pauses` are places between bars."""
    highest, parts = max(1, int(numbers.max(initial=0))), list[Markup]()
    for place, number in enumerate(numbers):
        if number:
            height = max(1.5, 96 * int(number) / highest)
            tone = tones[place] if tones else "mine"
            parts.append(make_element("rect", x=place + 0.06, y=f"{100 - height:.2f}", width=0.88, height=f"{height:.2f}", class_=tone))
    parts += [make_element("line", x1=f"{place:.2f}", x2=f"{place:.2f}", y1=0, y2=100, class_="pause") for place in pauses]
    picture = make_element("svg", *parts, viewBox=f"0 0 {len(numbers)} 100", preserveAspectRatio="none", role="img", aria_label=told)
    below = make_element("div", *(make_element("span", text) for text in axis), class_="axis", aria_hidden="true")
    return make_element("figure", picture, below, make_element("figcaption", told))


# ---- Time -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """Where a time without its pauses lies on a chart."""

    spans: list[tuple[int, int]]
    width_s: float

    def locate(self, at_s: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bar of each time."""
        bars = np.zeros(len(at_s), np.int64)
        before_s = 0
        for start, end in self.spans:
            inside = (at_s >= start) & (at_s < end)
            bars[inside] = (before_s + at_s[inside] - start) // self.width_s
            before_s += end - start
        return bars


def split_runs(timeline: Timeline) -> list[tuple[int, int]]:
    """Return begin and end (Unix time, s) of each stretch without a pause."""
    if not len(timeline.steps):
        return []
    times = timeline.steps * timeline.step_s
    breaks = np.flatnonzero(np.diff(times) > max(PAUSE_S, 2 * timeline.step_s))
    starts, ends = times[[0, *(breaks + 1)]], times[[*breaks, len(times) - 1]] + timeline.step_s
    return [(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]


def draw_steps(timeline: Timeline, spans: list[tuple[int, int]]) -> tuple[NDArray[np.int64], float, list[float]]:
    """Return the counts of each bar, the seconds of a bar, and the places of pauses between bars."""
    lasted_s = sum(end - start for start, end in spans)
    width_s = timeline.step_s * -(-lasted_s // (timeline.step_s * BARS))
    bars = np.zeros((-(-lasted_s // width_s), timeline.counts.shape[1]), np.int64)
    np.add.at(bars, Axis(spans, width_s).locate(timeline.steps * timeline.step_s), timeline.counts)
    pauses, before_s = list[float](), 0
    for start, end in spans[:-1]:
        before_s += end - start
        pauses.append(before_s / width_s)
    return bars, width_s, pauses


# ---- Texts ----------------------------------------------------------------------------------------------------------


def format_bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e3:,.1f} kB"


def format_time(at_s: int) -> str:
    return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
