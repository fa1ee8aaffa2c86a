"""Command `plan`: what a run would read, ask and cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.console import print_json, print_message, shorten_path
from pipeline.cli.exit_codes import convert_to_exit_code
from pipeline.cli.options import JOB, JSON, LIMIT, SET, load_job
from pipeline.cli.progress import show_waiting
from pipeline.cli.tables import print_names, show_table
from pipeline.wording import format_count

if TYPE_CHECKING:
    from pipeline.plan.estimate import Range, RunPlan


@click.command("plan")
@JOB
@click.option(
    "--gpu", type=click.Choice(["h200", "h100", "a100", "a10g", "l4"]), default="h100", show_default=True, help="GPU that is reckoned with."
)
@click.option("--price", type=click.FloatRange(min=0), metavar="N", help="What an hour of this GPU costs.")
@click.option("--like", metavar="OUTPUT", help="Earlier run that says how long answers are; default: the job's own output, if it has any.")
@LIMIT
@SET
@JSON
@convert_to_exit_code
def plan_command(
    job_file: Path, gpu: str, price: float | None, like: str | None, limit: int | None, settings: tuple[str, ...], as_json: bool
) -> None:
    """Show what a run would read, ask and cost: pages, tokens, requests, GPU hours. Opens every document, asks nothing."""
    from pipeline.engines.model_files import resolve_cell_px

    job = resolve_cell_px(load_job(job_file, settings))
    from pipeline.flow.pending import list_documents
    from pipeline.plan.estimate import estimate_run
    from pipeline.plan.survey import DocumentSurvey
    from pipeline.stages.render import RenderPlan

    with show_waiting("measuring the documents", quiet=as_json):
        documents = list_documents(job).to_pylist()[:limit]
        found = estimate_run(job, DocumentSurvey(RenderPlan.of_job(job)).measure_documents(documents), gpu, price, like)
    if as_json:
        print_json(found)
        return
    show_plan(found)


def show_plan(found: RunPlan) -> None:
    """Print a plan: what was counted, what is estimated and how, and what deserves a look."""
    rows = [
        ["documents", f"{found['documents']:,}", "counted"],
        ["pages", f"{found['pages']:,}", "counted"],
        ["requests", f"{found['requests']:,}", "counted"],
        ["visual tokens", f"{found['visual_tokens']:,}", "counted"],
        ["prompt tokens", format_range(found["prompt_tokens"]), found["prompt_tokens"]["source"]],
        ["output tokens", format_range(found["output_tokens"]), found["output_tokens"]["source"]],
        ["GPU hours", format_range(found["gpu_hours"]), found["gpu_hours"]["source"]],
    ]
    if cost := found["cost"]:
        rows.append(["cost", format_range(cost), cost["source"]])
    if (earlier := found["earlier_run"]) and earlier["hours"] is not None:
        rows.append(["hours as before", format_amount(earlier["hours"]), f"{earlier['pages_per_s']:.2f} pages/s of the earlier run"])
    rows += [["disk", f"{found['disk_mib']:,} MiB", "the ledger"], ["driver's memory", f"{found['driver_mib']:,} MiB", "6 kB a request"]]
    if dpi := found["dpi"]:
        rows.append(["effective dpi", f"{dpi['least']:.0f} to {dpi['largest']:.0f}", f"median {dpi['median']:.0f}"])
    show_table(f"plan of {found['job']}", ["what", "how much", "from"], rows)
    if earlier:
        print_message(f"earlier run: {shorten_path(earlier['output'])}, model {earlier['model']}")
    for kind, count in found["failures"].items():
        print_message(f"{format_count(count, 'document')} that cannot be opened: {kind}")
    print_names("files with the bytes of another, asked once", found["duplicates"])
    print_names(f"documents whose requests may exceed the context of {found['context_tokens']:,} tokens", found["beyond_context"])
    if found["reread_requests"]:
        print_message(
            f"evidence.model: up to {found['reread_requests']:,} requests more, where values lack a witness; not in the figures above"
        )
    small = found["small_print"]
    if small["share"] > 0:
        share = f"{small['share']:.0%} of {small['sampled']:.0f} sampled pages"
        print_message(f"warning: {share} have print of less than 8 px at this size of page; raise {small['key']}")


def format_range(found: Range) -> str:
    """Return an estimate with its bounds."""
    low, likely, high = (format_amount(value) for value in (found["low"], found["likely"], found["high"]))
    return likely if low == high else f"{likely} ({low} to {high})"


def format_amount(value: float) -> str:
    """Return an amount, a small one with two digits that say something."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"
