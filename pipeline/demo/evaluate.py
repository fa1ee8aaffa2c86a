"""Evaluation: counts how many values of 200 unseen synthetic documents a model reads exactly, through `pipeline.run`.

    python -m pipeline.demo.evaluate                       the checkpoint in this package, AWQ 4 bit
    python -m pipeline.demo.evaluate --model out/plain     another checkpoint, for example the unquantized one
    python -m pipeline.demo.evaluate --set model.engine=vllm     another engine

Draws documents from seeds that training and the samples never use, writes them into a temporary folder, runs
`jobs/invoices.yaml` and `jobs/receipts.yaml` over them, and compares every value of the records with the truth. A value
is right only if it is exactly right. Missing and additional line items are wrong values, and in a document without a valid
record every value is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.demo import samples
from pipeline.demo.documents import HELD_OUT, Form
from pipeline.demo.samples import DrawnDocument, SamplePlan
from pipeline.demo.truth import list_leaves
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.shards import read_shards

if TYPE_CHECKING:
    from pipeline.report import Report


JOBS = Path(__file__).parents[2] / "jobs"
EVALUATION_SEED = HELD_OUT + 10**6
SHARES: tuple[tuple[Form, int, float], ...] = (("invoice", 1, 0.60), ("receipt", 1, 0.28), ("invoice", 2, 0.12))
"""Form, pages, share of the documents: as in training."""
SCANNED_PERCENT = 35
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Leaf:
    """One compared value: `invoice.line_items[].amount` is its field, `$.line_items[2].amount` its path."""

    field: str
    path: str
    wanted: Any
    found: Any
    is_right: bool


@dataclass(frozen=True)
class Verdict:
    """The comparison of one document; `failure` is "" where there is a valid record."""

    name: str
    failure: str
    leaves: tuple[Leaf, ...]

    @property
    def is_flawless(self) -> bool:
        return all(leaf.is_right for leaf in self.leaves)


def plan_documents(count: int) -> list[SamplePlan]:
    """Return the documents to draw: fixed shares of each kind, the same share of each scanned, every second one-page scan a TIFF."""
    plans: list[SamplePlan] = []
    for form, pages, share in SHARES:
        scans = 0
        for index in range(round(count * share)):
            scanned = (index + 1) * SCANNED_PERCENT // 100 > scans
            scans += scanned
            image = "tiff" if pages > 1 or scans % 2 else "jpg"
            plans.append(SamplePlan(form, image if scanned else "pdf", pages))
    return plans


def read_documents(
    drawn: Sequence[DrawnDocument], model: str, folder: Path, others: Sequence[str] = ()
) -> tuple[dict[str, Record], list[Report]]:
    """Run both jobs with additional settings; return the records by the names of their documents, and the runs' reports."""
    from pipeline.flow import run  # imports Ray, which the comparison does not need

    samples.write_documents(drawn, folder)
    records: dict[str, Record] = {}
    reports = []
    for form in dict.fromkeys(one.form for one in drawn):
        settings = [f"source.paths={json.dumps([str(folder / f'{form}s')])}", f"model.name={json.dumps(model)}", "model.without_gpu=cpu"]
        job = Job.load(JOBS / f"{form}s.yaml", [*settings, *others], folder / "out" / form)
        reports.append(run(job))
        rows = read_shards(Output(job.output).records, None, pa.schema([])).to_pylist()
        records |= {Path(row["_source"]).name: row for row in rows}
    return records, reports


def judge_record(one: DrawnDocument, record: Record | None) -> Verdict:
    """Return the comparison of a document's record with its truth."""
    failure = {"stage": "settle", "kind": "missing"} if record is None else record["_failure"]
    named = f"{failure['stage']}/{failure['kind']}" if failure else ""
    return Verdict(one.name, named, tuple(compare_values(one.form, one.truth, None if failure else record)))


def compare_values(form: Form, truth: Record, record: Record | None) -> Iterator[Leaf]:
    """Yield every value of the truth and of the record as a leaf; without a record all are wrong."""
    wanted = dict(list_leaves(dict(truth)))
    found = dict(list_leaves({name: record[name] for name in truth})) if record is not None else {}
    for path in dict.fromkeys([*wanted, *found]):
        field = form + re.sub(r"\[\d+\]", "[]", path.removeprefix("$"))
        is_right = path in wanted and path in found and is_same_value(wanted[path], found[path])
        yield Leaf(field, path, wanted.get(path, "nothing"), found.get(path, "nothing"), is_right)


def is_same_value(wanted: Any, found: Any) -> bool:
    """Return whether two values are equal: numbers by value, dates by their JSON text, all others by type and value."""
    if isinstance(found, date):
        found = found.isoformat()
    if is_number(wanted) and is_number(found):
        return Decimal(str(wanted)) == Decimal(str(found))
    return type(wanted) is type(found) and bool(wanted == found)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def summarize_verdicts(verdicts: Sequence[Verdict], pages: int, elapsed_s: float) -> str:
    """Return the counts as text: in all, by failure, by field."""
    every = [leaf for verdict in verdicts for leaf in verdict.leaves]
    failures = Counter(verdict.failure for verdict in verdicts if verdict.failure)
    speed = f"{elapsed_s / max(pages, 1):6.2f}    ({pages} pages in {elapsed_s:.0f} s, with Ray's start and the model's loading)"
    lines = [
        f"values exactly right        {format_ratio(sum(leaf.is_right for leaf in every), len(every))}",
        f"documents without an error  {format_ratio(sum(verdict.is_flawless for verdict in verdicts), len(verdicts))}",
        f"documents without a record  {format_ratio(failures.total(), len(verdicts))}",
        *(f"    {kind}: {count}" for kind, count in failures.most_common()),
        f"seconds per page            {speed}",
        "",
        "by field",
    ]
    fields: dict[str, list[bool]] = {}
    for leaf in every:
        fields.setdefault(leaf.field, []).append(leaf.is_right)
    width = max(map(len, fields), default=0)
    return "\n".join(
        [*lines, *(f"    {field:{width}}  {format_ratio(sum(rights), len(rights))}" for field, rights in sorted(fields.items()))]
    )


def format_ratio(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):6.2f} %  ({part} of {whole})"


def list_mistakes(verdicts: Sequence[Verdict]) -> str:
    """Return a line for every wrong value in documents that have a valid record."""
    return "\n".join(
        f"{verdict.name} {leaf.path}: {leaf.wanted} read as {leaf.found}"
        for verdict in verdicts
        if not verdict.failure
        for leaf in verdict.leaves
        if not leaf.is_right
    )


def evaluate_main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="hub id or folder of a checkpoint (default: the one in this package)")
    parser.add_argument("--documents", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=EVALUATION_SEED, help="seed of the first document (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="change a key of the jobs")
    parser.add_argument("--mistakes", action="store_true", help="list every wrong value as well")
    given = parser.parse_args()
    model = str(Path(given.model).absolute()) if Path(given.model).is_dir() else given.model
    drawn = samples.draw_documents(plan_documents(given.documents), given.first_seed)
    with tempfile.TemporaryDirectory() as folder:
        records, reports = read_documents(drawn, model, Path(folder), given.settings)
    verdicts = [judge_record(one, records.get(one.name)) for one in drawn]
    if given.mistakes:
        print(list_mistakes(verdicts), end="\n\n")
    print(" ".join([f"{given.model}: {len(drawn)} documents of seeds from {given.first_seed}", *given.settings]))
    print(summarize_verdicts(verdicts, sum(one.pages for one in drawn), sum(report.elapsed_s for report in reports)))


if __name__ == "__main__":
    evaluate_main()
