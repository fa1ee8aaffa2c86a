"""Tables and figures of commands that print scores and differences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.cli.console import make_console, print_message, strip_control_characters

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.score.statistics import Interval

MAX_NAMES_SHOWN = 5


def show_table(title: str, titles: list[str], rows: list[list[str]], console: Console | None = None) -> None:
    """Print rows of text from documents and outputs as a table, by default on stderr."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(strip_control_characters(title)), title_justify="left")
    for name in titles:
        table.add_column(escape(name), overflow="fold")
    for row in rows:
        table.add_row(*(escape(strip_control_characters(cell).replace("\n", "\\n")) for cell in row))
    (console or make_console()).print(table)


def format_interval(score: Interval) -> str:
    """Return a share and its interval in percent: `97.4 (95.2–98.6)`."""
    if score["value"] is None:
        return "–"
    return f"{format_percent(score['value'])} ({format_percent(score['low'])}–{format_percent(score['high'])})"


def format_percent(share: float | None, decimals: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{decimals}f}"


def format_number(number: float | None) -> str:
    return "–" if number is None else f"{number:.3f}"


def print_names(title: str, names: list[str]) -> None:
    """Print how many names there are and the first of them, if any."""
    if names:
        more = f", and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
        print_message(f"{title}: {len(names)} ({', '.join(names[:MAX_NAMES_SHOWN])}{more})")
