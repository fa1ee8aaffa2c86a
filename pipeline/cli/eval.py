"""Command `eval`: the records of an output against true values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.console import print_json, print_message
from pipeline.cli.exit_codes import convert_to_exit_code
from pipeline.cli.options import DATE_TOLERANCE, JSON, NUMBER_TOLERANCE
from pipeline.cli.tables import format_interval, format_number, format_percent, print_names, show_table

if TYPE_CHECKING:
    from pipeline.score.evaluation import EvaluationResult, FieldScores, GroupScores


@click.command("eval")
@click.argument("output")
@click.option("--truth", metavar="PLACE", type=click.Path(path_type=Path), required=True, help="Folder of JSON, or JSONL, CSV or Parquet.")
@NUMBER_TOLERANCE
@DATE_TOLERANCE
@click.option("--by", metavar="COLUMN", help="Score the documents also by the values of one column of the records.")
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw as PNG how many errors a review of the least certain values leaves.",
)
@JSON
@convert_to_exit_code
def eval_command(
    output: str, truth: Path, number_tolerance: float, date_tolerance_days: int, by: str | None, plot: Path | None, as_json: bool
) -> None:
    """Score the records in an output folder against true values, field by field, and how well certainty tells right from wrong."""
    from pipeline.score.cells import make_tolerance
    from pipeline.score.evaluation import evaluate_output

    found = evaluate_output(output, truth, make_tolerance(number_tolerance, date_tolerance_days), by)
    if plot:
        from pipeline.score.plot import plot_reviews

        plot_reviews(found, plot)
    if as_json:
        print_json(found)
        return
    show_evaluation(found)


REVIEWS_SHOWN = (1, 2, 5, 10, 20, 30, 50)
"""Percentages of reviewed values that are printed; the JSON has all."""
ERRORS = ("wrong", "missing", "invented", "unread")
"""Outcomes that are counted in the table."""


def show_evaluation(found: EvaluationResult) -> None:
    """Print the scores of an output: by field, by group, and what a review of the least certain values leaves."""
    scores = found["scores"]
    total, counted = (
        scores["total"],
        [name for name, count in scores["total"]["outcomes"].items() if name in ERRORS and (count or name != "unread")],
    )
    rows = [[name, *list_score_cells(of, counted)] for name, of in {"all": total, **scores["fields"]}.items()]
    title = f"{found['output']}: {scores['documents']} documents, {scores['failed']} failed"
    show_table(title, ["field", "cells", "exact %", "norm. %", "ANLS %", "F1 %", *counted], rows)
    print_message(f"documents without an error: {format_interval(scores['perfect'])} %")
    ratios = f"precision {format_percent(total['precision'])} %, recall {format_percent(total['recall'])} %"
    print_message(f"values: {ratios}, F1 {format_interval(total['f1'])} %")
    if found["by"]:
        titles = [found["by"], "documents", "failed", "perfect %", "exact %", "F1 %", "AUROC"]
        show_table("by group", titles, [[value, *list_group_cells(group)] for value, group in found["groups"].items()])
    if certainty := scores["certainty"]:
        reviews = {percent: certainty["review"][percent] for percent in REVIEWS_SHOWN}
        rows = [
            [f"{percent}", f"{row['errors_left']}", format_percent(row["share_of_errors_left"]), format_percent(row["error_rate_left"], 2)]
            for percent, row in reviews.items()
        ]
        show_table("review of the least certain values", ["reviewed %", "errors left", "of all errors %", "of the rest %"], rows)
        numbers = (("AUROC", certainty["auroc"]), ("ECE", certainty["ece"]), ("Brier", certainty["brier"]))
        print_message(
            f"certainty: {', '.join(f'{name} {format_number(number)}' for name, number in numbers)}, over {certainty['values']} values "
            f"with {certainty['errors']} errors; {certainty['errors_without']} errors have no certainty"
        )
    else:
        print_message("certainty: unknown, because the ledger has no log-probabilities of these values")
    print_names("documents of the truth without a record", found["without_record"])
    print_names("records without truth", found["without_truth"])
    print_names("fields without truth", found["not_labelled"])
    print_names("keys of the truth that the schema lacks", found["not_in_schema"])


def list_score_cells(scores: FieldScores, counted: list[str]) -> list[str]:
    """Return a field's scores as the cells of a table's row; `counted` are outcomes."""
    shares = (scores["normalized"], scores["anls"], scores["f1"])
    counts = [str(scores["outcomes"][name]) for name in counted]
    return [str(scores["cells"]), format_interval(scores["exact"]), *(format_percent(share["value"]) for share in shares), *counts]


def list_group_cells(group: GroupScores) -> list[str]:
    """Return a group's scores as the cells of a table's row."""
    shares = [format_interval(score) for score in (group["perfect"], group["total"]["exact"], group["total"]["f1"])]
    certainty = group["certainty"]
    return [str(group["documents"]), str(group["failed"]), *shares, format_number(certainty["auroc"] if certainty else None)]
