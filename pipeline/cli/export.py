"""Command `export`: the records of an output as a file for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.console import print_json, print_message
from pipeline.cli.exit_codes import convert_to_exit_code
from pipeline.cli.options import JSON
from pipeline.wording import format_count


@click.command("export")
@click.argument("output")
@click.option("--to", type=click.Choice(["csv", "jsonl", "xlsx", "duckdb"]), required=True, help="The format.")
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="File to write, or folder with --split in CSV and JSON lines. Default: the job's name, here.",
)
@click.option("--split", is_flag=True, help="One more table for each array, with `_source` and the item's number `_item`.")
@click.option("--explode", metavar="ARRAY", help="One row for each item of this array, such as line_items.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--keep-formulas", is_flag=True, help="Leave texts that a spreadsheet would run as they are.")
@JSON
@convert_to_exit_code
def export_command(
    output: str, to: str, file: Path | None, split: bool, explode: str | None, overwrite: bool, keep_formulas: bool, as_json: bool
) -> None:
    """Write the records in an output folder as CSV, JSON lines, an Excel workbook or a DuckDB database.

    Where a table cannot nest, arrays are JSON in one cell. Texts that a spreadsheet would run as formulas are made harmless.
    """
    if split and explode:
        raise click.UsageError("--split and --explode exclude each other.")
    from pipeline.export.files import export_output

    written = export_output(output, to, file, split, explode, overwrite, keep_formulas)
    if as_json:
        print_json(written)
        return
    tables = ", ".join(f"{name} {format_count(rows, 'row')}" for name, rows in written["rows"].items())
    print_message(f"{', '.join(written['files'])}: {tables}")
    if written["formulas"]:
        print_message(f"{written['formulas']} texts that a spreadsheet would run as formulas were made harmless")
    if written["cut"]:
        print_message(f"warning: {written['cut']} texts were cut to the 32,767 characters that an Excel cell holds; csv has them whole")
