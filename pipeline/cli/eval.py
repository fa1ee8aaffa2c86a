"""Command `eval`: the records of an output against true values."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.console import print_json, print_message, print_text
from pipeline.cli.exit_codes import convert_to_exit_code
from pipeline.cli.options import DATE_TOLERANCE, JSON, NUMBER_TOLERANCE
from pipeline.cli.tables import format_interval, format_number, format_percent, print_names, show_table
from pipeline.errors import JobError
from pipeline.wording import format_count

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.plan.sweep import SweepRow
    from pipeline.score.calibration import HeldOutScores
    from pipeline.score.cells import Tolerance
    from pipeline.score.evaluation import CertaintyScores, EvaluationResult, FieldScores, GroupScores

CALIBRATION_NAME = "calibration.json"


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
@click.option(
    "--calibrate",
    metavar="[FILE]",
    is_flag=False,
    flag_value=CALIBRATION_NAME,
    type=click.Path(path_type=Path),
    help="Fit confidence to the truth and write it for `extract.calibration`; by default to calibration.json in OUTPUT.",
)
@click.option(
    "--sweep",
    "sweeps",
    metavar="KEY=VALUE,VALUE",
    multiple=True,
    help="Run the output's job once for each value, beside OUTPUT, and score each run. Several keys give each combination.",
)
@JSON
@partial(convert_to_exit_code, stopped="stopped; run the same command again to go on")
def eval_command(
    output: str,
    truth: Path,
    number_tolerance: float,
    date_tolerance_days: int,
    by: str | None,
    plot: Path | None,
    calibrate: Path | None,
    sweeps: tuple[str, ...],
    as_json: bool,
) -> None:
    """Score the records in an output folder against true values, field by field, and how well confidence tells right from wrong.

    With --calibrate, fit confidence to the true values instead; with --sweep, run and score the output's job with other values of its keys.
    """
    if sum(map(bool, (by or plot, calibrate, sweeps))) > 1:
        raise click.UsageError("--calibrate, --sweep, and --by or --plot exclude each other")
    from pipeline.score.cells import make_tolerance

    tolerance = make_tolerance(number_tolerance, date_tolerance_days)
    if calibrate:
        show_calibration(output, truth, tolerance, calibrate, as_json)
        return
    if sweeps:
        run_sweep(output, truth, tolerance, sweeps, as_json)
        return
    from pipeline.score.evaluation import evaluate_output

    found = evaluate_output(output, truth, tolerance, by)
    if plot:
        from pipeline.score.plot import plot_reviews

        plot_reviews(found, plot)
    if as_json:
        print_json(found)
        return
    show_evaluation(found)


def show_calibration(output: str, truth: Path, tolerance: Tolerance, file: Path, as_json: bool) -> None:
    """Calibrate an output and print how its confidence does on documents that the fit has not seen."""
    from pipeline.output.records import read_record_table
    from pipeline.score.calibration import calibrate_output
    from pipeline.stages.calibrate import collect_output_facts
    from pipeline.storage.location import is_url

    if str(file) == CALIBRATION_NAME:
        if is_url(output):
            raise JobError(f"{output} is in an object store: name a local file, --calibrate FILE", output, "--calibrate")
        file = Path(output) / CALIBRATION_NAME
    records = read_record_table(output)
    found = calibrate_output(records, collect_output_facts(records), truth, tolerance, file)
    if as_json:
        print_json(found)
        return
    rows = [[name, *list_held_out_cells(scores)] for name, scores in {"all": found["held_out"], **found["kinds"]}.items()]
    titles = ["kind of page", "documents", "values", "errors", "AUROC", "of tokens alone", "ECE", "Brier", "90 % surest: wrong %"]
    show_table("calibration, fitted on half of the documents and measured on the other", titles, rows)
    documents, values = format_count(found["documents"], "document"), format_count(found["values"], "value")
    print_message(
        f"{found['file']}: fitted on all of {documents}, {values} with {format_count(found['errors'], 'error')}; "
        "set extract.calibration to it and run pipeline settle"
    )


def list_held_out_cells(scores: HeldOutScores) -> list[str]:
    """Return the scores of a calibration as the cells of a table's row."""
    numbers = [format_number(scores[name]) for name in ("auroc", "auroc_tokens", "ece", "brier")]
    return [*(str(scores[name]) for name in ("documents", "values", "errors")), *numbers, format_percent(scores["wrong_of_surest"], 2)]


def run_sweep(output: str, truth: Path, tolerance: Tolerance, sweeps: tuple[str, ...], as_json: bool) -> None:
    """Run the jobs of a sweep one after another, and print what each scores and costs."""
    from pipeline import flow
    from pipeline.cli.console import capture_ray_output
    from pipeline.cli.exit_codes import call_on_signal
    from pipeline.cli.progress import show_progress
    from pipeline.plan.sweep import plan_sweep, score_step

    found = []
    steps = plan_sweep(output, sweeps)
    with capture_ray_output() as console:  # one for all runs: afterwards nothing but messages can be printed
        for step in steps:
            if not as_json:
                print_text(console, f"sweep: {format_settings(step.settings)}")
            with (
                show_progress(console, quiet=as_json) as shown,
                call_on_signal(partial(shown.stop, "stopping: the answers so far are being written")),
            ):
                flow.run(step.job, on_progress=shown.update)
            found.append(score_step(step, truth, tolerance))
        if not as_json:
            show_sweep(found, console)
    if as_json:
        print_json({"output": output, "truth": str(truth), "runs": found})


def show_sweep(found: list[SweepRow], console: Console) -> None:
    """Print what each run of a sweep scores and costs."""
    titles = ["set", "documents", "failed", "exact %", "F1 %", "perfect %", "AUROC", "visual tokens", "read", "written", "asking s"]
    show_table("sweep", titles, [list_sweep_cells(row) for row in found], console)


def format_settings(settings: dict[str, Any]) -> str:
    """Return what a run of a sweep sets, as it is written."""
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def list_sweep_cells(row: SweepRow) -> list[str]:
    """Return a run of a sweep as the cells of a table's row."""
    shares = [format_interval(row[name]) for name in ("exact", "f1", "perfect")]
    tokens = [f"{row[name]:,}" for name in ("visual_tokens", "prompt_tokens", "completion_tokens")]
    took = "–" if row["asking_s"] is None else f"{row['asking_s']:.1f}"
    return [
        format_settings(row["settings"]),
        str(row["documents"]),
        str(row["failed"]),
        *shares,
        format_number(row["auroc"]),
        *tokens,
        took,
    ]


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
    title = f"{found['output']}: {format_count(scores['documents'], 'document')}, {scores['failed']:,} failed"
    show_table(title, ["field", "cells", "exact %", "norm. %", "ANLS %", "F1 %", *counted], rows)
    print_message(f"documents without an error: {format_interval(scores['perfect'])} %")
    ratios = f"precision {format_percent(total['precision'])} %, recall {format_percent(total['recall'])} %"
    print_message(f"values: {ratios}, F1 {format_interval(total['f1'])} %")
    if found["by"]:
        titles = [found["by"], "documents", "failed", "perfect %", "exact %", "F1 %", "AUROC", "ECE", "90 % surest: wrong %"]
        show_table("by group", titles, [[value, *list_group_cells(group)] for value, group in found["groups"].items()])
    if certainty := scores["certainty"]:
        reviews = {percent: certainty["review"][percent] for percent in REVIEWS_SHOWN}
        rows = [
            [f"{percent}", f"{row['errors_left']}", format_percent(row["share_of_errors_left"]), format_percent(row["error_rate_left"], 2)]
            for percent, row in reviews.items()
        ]
        show_table("review of the least certain values", ["reviewed %", "errors left", "of all errors %", "of the rest %"], rows)
        numbers = (("AUROC", certainty["auroc"]), ("ECE", certainty["ece"]), ("Brier", certainty["brier"]))
        shown = ", ".join(f"{name} {format_number(number)}" for name, number in numbers)
        print_message(
            f"confidence: {shown}, over {format_count(certainty['values'], 'value')} with {format_count(certainty['errors'], 'error')}; "
            f"{format_count(certainty['errors_without'], 'error')} without a confidence"
        )
        titles = ["kind of page", "values", "errors", "AUROC", "ECE", "Brier", "90 % surest: wrong %"]
        show_table("confidence", titles, [[kind, *list_certainty_cells(scores)] for kind, scores in found["kinds"].items()])
    else:
        print_message("confidence: unknown, because the ledger has no log-probabilities of these values")
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
    numbers = [format_number(certainty[name] if certainty else None) for name in ("auroc", "ece")]
    surest = format_percent(certainty["wrong_of_surest"] if certainty else None, 2)
    return [str(group["documents"]), str(group["failed"]), *shares, *numbers, surest]


def list_certainty_cells(scores: CertaintyScores) -> list[str]:
    """Return how confidence does as the cells of a table's row."""
    numbers = [format_number(scores[name]) for name in ("auroc", "ece", "brier")]
    return [str(scores["values"]), str(scores["errors"]), *numbers, format_percent(scores["wrong_of_surest"], 2)]
