"""Command `status`: where the run in an output folder stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.cli.console import make_console, print_json, print_message, strip_control_characters
from pipeline.cli.exit_codes import convert_to_exit_code
from pipeline.cli.options import JSON

if TYPE_CHECKING:
    from pipeline.output.status import RunStatus


@click.command("status")
@click.argument("folder", metavar="DIR")
@JSON
@convert_to_exit_code
def status_command(folder: str, as_json: bool) -> None:
    """Show where the run in an output folder stands, and which documents went worst. Starts nothing."""
    from pipeline.output import Output
    from pipeline.output.status import read_status
    from pipeline.storage.location import parse_location

    found = read_status(Output(parse_location(folder)))
    if as_json:
        print_json(found)
        return
    show_status(found, folder)


def show_status(found: RunStatus, place: str) -> None:
    """Print where the run in an output folder stands and which documents failed most."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "count", title=f"{found['job']} in {place}", title_justify="left")
    counts = {
        "documents": found["documents"],
        "requests": found["requests"],
        "request failures": found["request_failures"],
        "records": found["records"],
        "record failures": found["record_failures"],
        "records with": {name: count for name in ("partial", "disagreements", "unwitnessed", "alerts") if (count := found[name])},
    }
    for name, numbers in counts.items():
        for inner, number in numbers.items():
            table.add_row(f"{name}: {inner}", str(number))
    make_console().print(table)
    if found["worst"]:
        worst = Table("document", "failed", "invalid", "of", "kind", "message", title="worst documents", title_justify="left")
        for row in found["worst"]:
            cells = (row["source"], row["failed"], row["invalid"], row["requests"], row["kind"], row["message"][:200])
            worst.add_row(*(escape(strip_control_characters(str(cell)).replace("\n", "\\n")) for cell in cells))
        make_console().print(worst)
    for file in found["damaged"]:
        print_message(f"damaged: {file}; run the job again: it is set aside and its requests are asked again")
