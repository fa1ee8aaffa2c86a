"""Commands `check` and `preview`: a job before it runs, and one page as the model gets it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.console import LOG_WIDTH, describe_demo_model, measure_terminal, print_json, print_message, strip_control_characters
from pipeline.cli.exit_codes import convert_to_exit_code
from pipeline.cli.options import JOB, JSON, SET, load_job
from pipeline.cli.progress import show_waiting
from pipeline.report import ExitCode

if TYPE_CHECKING:
    from pipeline.stages.preview import PreviewAnswer, PreviewFacts


@click.command("check")
@JOB
@SET
@JSON
@convert_to_exit_code
def check_command(job_file: Path, settings: tuple[str, ...], as_json: bool) -> None:
    """Show the resolved job, its prompt, the columns of its records, and what this machine cannot keep renderers from. Starts no run."""
    job = load_job(job_file, settings)
    from pipeline import engines
    from pipeline.engines import limits, model_files
    from pipeline.evidence.ocr import check_ocr
    from pipeline.render.sandbox import describe_confinement
    from pipeline.schema.request_schema import list_required_leaves
    from pipeline.stages.record_plan import list_record_columns

    check_ocr(job.sections.evidence.ocr, job.file)
    notes = engines.check_engine(job)
    described = list_record_columns(job)
    found = {
        "job": job.dump_keys(),
        "fingerprint": job.fingerprint,
        "engine": limits.describe_engine(job),
        "a4_page": model_files.describe_a4_page(job),
        "box_units": dict(zip(("units", "from"), map(str, model_files.find_box_units(job)), strict=True)),
        "prompt": job.system_message,
        **described,
        "rules": [asdict(rule) for rule in job.rules],
        "not_in_grammar": list(notes),
        "not_nullable": list_required_leaves(job.schema),
        "not_confined": list(describe_confinement()),
    }
    if as_json:
        print_json(found)
        return
    show_job(found)


@click.command("preview")
@JOB
@click.argument("file")
@click.option("--page", type=click.IntRange(min=1), default=1, show_default=True, help="Page to look at.")
@click.option("--png", type=click.Path(path_type=Path), help="Write the exact image that the model sees.")
@click.option("--no-answer", is_flag=True, help="Do not load the model.")
@SET
@JSON
@convert_to_exit_code
def preview_command(
    job_file: Path, file: str, page: int, png: Path | None, no_answer: bool, settings: tuple[str, ...], as_json: bool
) -> ExitCode:
    """Show one page as the model sees it, and what the model answers."""
    job = load_job(job_file, settings)
    from pipeline.engines.model_files import resolve_cell_px
    from pipeline.stages.preview import ask_preview, render_preview, write_preview_png

    job = resolve_cell_px(job)
    seen = render_preview(job, file, page)
    if png:
        write_preview_png(seen, png)
    if not as_json:
        show_page(seen.facts["file"], page, seen.facts, job.system_message, seen.ask)
    answer = None
    if not no_answer:
        on_demo = None if as_json else lambda replaced: print_message(describe_demo_model(replaced))
        with show_waiting("asking the model", quiet=as_json):
            answer = ask_preview(job, seen, on_demo)
    if as_json:
        print_json({**seen.facts, "prompt": job.system_message, "ask": seen.ask, **(answer or {})})
    elif answer:
        show_answer(answer)
    return ExitCode.DOCUMENTS_FAILED if answer and answer["failure"] else ExitCode.OK


def show_job(found: dict[str, Any]) -> None:
    """Print a job with all its keys, its prompt, the columns of its records, and what is left out of the grammar and the confinement."""
    import yaml

    columns = measure_terminal(sys.stdout)[0] or LOG_WIDTH
    click.echo(yaml.safe_dump({name: found[name] for name in ("job", "fingerprint")}, sort_keys=False, allow_unicode=True, width=columns))
    evidence = format_ocr(found["job"]["evidence"]["ocr"])
    evidence += format_rereading(found["box_units"]) if found["job"]["evidence"]["model"] == "on" else ""
    page, prompt = format_a4_page(found["a4_page"]), indent(found["prompt"], "  ")
    click.echo(f"{format_engine(found['engine'])}\n{page}{evidence}\n\nprompt:\n{prompt}\n\ncolumns:")
    for name, kind in found["columns"].items():
        click.echo(f"  {name}: {kind}")
    cost = "makes up a value" if found["job"]["extract"]["absent"] == "forbid" else "is invalid"
    sections = {
        "rules": [f"{rule['name']}: {rule['expression']}" for rule in found["rules"]],
        "kept as JSON text or narrowed": found["notes"],
        "left to the validator by the grammar": found["not_in_grammar"],
        f"warning: may not be null, so that a document that does not show it {cost}": found["not_nullable"],
        "what this machine cannot keep renderers from": found["not_confined"],
    }
    for title, notes in sections.items():
        if notes:
            click.echo(f"\n{title}:\n" + "\n".join(f"  {line}" for line in notes))


def format_engine(here: dict[str, Any]) -> str:
    """Return which engine a job has on this machine, and the memory of its model's weights where that is known."""
    sizes = [f"{here[key] / 1e9:.1f} GB {how}" for key, how in (("weights_bytes", "in bf16"), ("packed_bytes", "packed")) if here[key]]
    weights = f"; weights: {', '.join(sizes)}" if sizes else ""
    held = f", held in {here['weights']} here" if here.get("weights") else ""
    misfit = f"\nwarning: {here['misfit']}" if here["misfit"] else ""
    limits = here.get("vllm")
    steps = ""
    if limits:
        tokens = f"{limits['max_num_batched_tokens'] or 'its own number of'} tokens a step"
        kept = f"{limits['mm_processor_cache_gb']:g} GiB of preprocessed pages"
        steps = f"\nvllm on this machine: {limits['max_num_seqs']} requests at once, {tokens}, {kept}"
    return f"engine on this machine: {here['engine']} ({here['reason']}){weights}{held}{steps}{misfit}"


def format_ocr(mode: str) -> str:
    """Return a line on what OCR reads and what it costs; nothing where it is off."""
    pages = {"doubtful": "the pages of doubtful documents", "scans": "pages without a usable text layer", "all": "every page"}
    return f"\nOCR: {pages[mode]}, 3 to 10 s of one CPU each, after the asking and without the GPU" if mode in pages else ""


def format_rereading(units: dict[str, str]) -> str:
    """Return a line on what `evidence.model` costs, and in what the model counts where it names a place."""
    source = {
        "job": "as model.box_units says",
        "checkpoint": "as models of this family do",
        "name": "by the model's name; model.box_units says it",
    }[units["from"]]
    return (
        "\nvalues that the text layer does not show are located and read again by the model: 2 to 7 more requests each time; places in "
        f"{units['units']} of a page ({source})"
    )


def format_a4_page(page: dict[str, Any]) -> str:
    """Return what an A4 page costs the job's model, and how the size of a visual token is known."""
    source = {
        "checkpoint": "as the checkpoint's image processor says",
        "job": "as model.cell_px says",
        "assumed": "assumed: the checkpoint is not on this machine, or it is a server's, of which model.cell_px says it",
    }[page["cell_px_from"]]
    return (
        f"an A4 page: {page['width_px']}×{page['height_px']} px, {page['dpi']} dpi, {page['visual_tokens']:,} visual tokens of "
        f"{page['cell_px']}×{page['cell_px']} px ({source})"
    )


def show_page(file: str, number: int, facts: PreviewFacts, prompt: str, ask: str) -> None:
    """Print what a model gets with a page."""
    click.echo(
        f"{file}, page {number} of {facts['page_count']}: {facts['width_px']}×{facts['height_px']} px, {facts['dpi']:.1f} dpi, "
        f"{facts['visual_tokens']} visual tokens, {facts['words']} words in the text layer"
    )
    for warning in facts["warnings"]:
        click.echo(strip_control_characters(f"warning: {warning}"))
    click.echo(f"\nprompt:\n{prompt}\n\n[page image]\n{ask}\n")


def show_answer(given: PreviewAnswer) -> None:
    """Print what a model answered and what is wrong with the answer."""
    click.echo(f"answer ({given['prompt_tokens']} + {given['completion_tokens']} tokens, {given['finish_reason']}):\n{given['answer']}")
    failure = given["failure"]
    for problem in [failure["message"]] if failure and given["status"] == "failed" else given["errors"] or []:
        click.echo(f"{given['status']}: {problem}")
