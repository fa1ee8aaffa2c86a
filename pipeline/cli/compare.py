"""Command `compare`: what differs between the records of two outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.console import print_json, print_message
from pipeline.cli.exit_codes import convert_to_exit_code
from pipeline.cli.options import DATE_TOLERANCE, JSON, NUMBER_TOLERANCE
from pipeline.cli.tables import format_interval, print_names, show_table
from pipeline.report import ExitCode
from pipeline.wording import format_count

if TYPE_CHECKING:
    from pipeline.score.comparison import ComparisonResult

MAX_DOCUMENTS_SHOWN, MAX_CHANGES_SHOWN = 20, 3


@click.command("compare")
@click.argument("a")
@click.argument("b")
@click.option(
    "--truth", metavar="PLACE", type=click.Path(path_type=Path), help="True values, as of eval: which of the two is right more often?"
)
@click.option(
    "--max-drop",
    metavar="POINTS",
    type=click.FloatRange(min=0),
    help="End with 1 if B has more percentage points less of right values (0.5).",
)
@NUMBER_TOLERANCE
@DATE_TOLERANCE
@JSON
@convert_to_exit_code
def compare_command(
    a: str, b: str, truth: Path | None, max_drop: float | None, number_tolerance: float, date_tolerance_days: int, as_json: bool
) -> ExitCode:
    """Show what differs between the records of two output folders, field by field, the worst documents first.

    Exit code 1: with --truth, fewer values are right in B than in A, by more than --max-drop.
    """
    if not truth and (max_drop is not None or number_tolerance or date_tolerance_days):
        raise click.UsageError("--max-drop and the tolerances need --truth PLACE: without it there is no right or wrong.")
    from pipeline.score.cells import make_tolerance
    from pipeline.score.comparison import compare_outputs

    tolerance = make_tolerance(number_tolerance, date_tolerance_days)
    found = compare_outputs(a, b, truth, tolerance, DEFAULT_MAX_DROP if max_drop is None else max_drop)
    if as_json:
        print_json(found)
    else:
        show_comparison(found)
    return ExitCode.DOCUMENTS_FAILED if found["truth"] and found["truth"]["has_dropped"] else ExitCode.OK


DEFAULT_MAX_DROP = 0.5
"""Percentage points by which the second output of `compare` may be worse."""


def show_comparison(found: ComparisonResult) -> None:
    """Print what differs between two outputs: statuses, fields, documents, and with a truth which is better."""
    title = f"A {found['a']}, B {found['b']}: {format_count(found['documents'], 'document')}, {found['changed']:,} changed"
    titles = ["field", "same", "changed", "became null", "became a value"]
    show_table(title, titles, [[field, *map(str, counts.values())] for field, counts in found["fields"].items()])
    if any(row["a"] != row["b"] for row in found["statuses"]):
        show_table("statuses", ["A", "B", "documents"], [[row["a"], row["b"], str(row["documents"])] for row in found["statuses"]])
    rows = []
    for document in found["worst"][:MAX_DOCUMENTS_SHOWN]:
        name = document["source"] + (f" page {document['page']}" if document["page"] else "")
        status = f"{document['status_a']} → {document['status_b']}; " * (document["status_a"] != document["status_b"])
        shown = [f"{change['path'].removeprefix('$.')}: {change['a']} → {change['b']}" for change in document["changes"]]
        more = [f"{len(shown) - MAX_CHANGES_SHOWN} more"] * (len(shown) > MAX_CHANGES_SHOWN)
        rows.append([name, str(len(shown)), status + "; ".join([*shown[:MAX_CHANGES_SHOWN], *more])])
    if rows:
        show_table("worst documents", ["document", "changes", "A → B"], rows)
    print_names("only in A", found["only_in_a"])
    print_names("only in B", found["only_in_b"])
    if truth := found["truth"]:
        documents = format_count(truth["documents"], "document")
        print_message(f"right in {documents}: A {format_interval(truth['a'])} %, B {format_interval(truth['b'])} %")
        points = f"{truth['difference_points']:+.2f} points ({truth['low_points']:+.2f} to {truth['high_points']:+.2f})"
        judged = (
            f"worse by more than {truth['max_drop_points']:g}"
            if truth["has_dropped"]
            else f"within the {truth['max_drop_points']:g} allowed"
        )
        print_message(f"B less A: {points}, {judged}")
