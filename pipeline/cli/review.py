"""Command `review`: the doubtful records of an output in a page for a person."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import click

from pipeline.cli.console import print_json, print_message
from pipeline.cli.exit_codes import convert_to_exit_code
from pipeline.cli.options import JSON
from pipeline.cli.progress import show_waiting
from pipeline.wording import format_count

MAX_PROBLEMS_SHOWN = 3


@click.command("review")
@click.argument("output")
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    metavar="PATH",
    default=Path("review.html"),
    help="Page to write; default: ./review.html.",
)
@click.option(
    "--with-pages",
    type=click.IntRange(min=0),
    default=500,
    show_default=True,
    metavar="N",
    help="Show the pages of the N most doubtful documents; a page takes about 0.1 MB.",
)
@click.option(
    "--documents",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="Folder to which the sources belong, the job file's. By default it is looked for near the output.",
)
@click.option("--serve", is_flag=True, help="Serve the page on this machine instead and draw pages as they are looked at; Ctrl-C ends it.")
@click.option("--port", type=click.IntRange(min=0, max=65535), default=0, metavar="N", help="Port for --serve; default: a free one.")
@JSON
@convert_to_exit_code
def review_command(output: str, file: Path, with_pages: int, documents: Path | None, serve: bool, port: int, as_json: bool) -> None:
    """Write one HTML file in which a person reviews the records of an output, the most doubtful first, and corrects them.

    It needs no network. It holds the documents' pages: keep it as private as they are.
    """
    if serve:
        serve_review(output, documents, port, as_json)
        return
    from pipeline.review.page import write_review_page

    with show_waiting("drawing the pages", quiet=as_json):
        written = write_review_page(output, file, with_pages, documents)
    if as_json:
        print_json(written)
        return
    print_message(
        f"{written['file']}: {format_count(written['documents'], 'record')}, the pages of {written['with_pages']}; open it in a browser"
    )
    for problem in written["problems"][:MAX_PROBLEMS_SHOWN]:
        print_message(f"not shown: {problem}")
    if (more := len(written["problems"]) - MAX_PROBLEMS_SHOWN) > 0:
        print_message(f"{more} more pages are not shown; --documents DIR says where the files are")
    print_message(f"then, with what is saved there: pipeline settle JOB --corrections {written['corrections']}")


def serve_review(output: str, documents: Path | None, port: int, as_json: bool) -> None:
    """Serve the review page until Ctrl-C."""
    from pipeline.review.server import ReviewServer

    server = ReviewServer(output, documents, port)
    if as_json:
        print_json({"address": server.address, "documents": len(server.documents)})
    else:
        print_message(
            f"{format_count(len(server.documents), 'record')} at {server.address}\nopen it on this machine; Ctrl-C ends the server"
        )
    with suppress(KeyboardInterrupt):
        server.serve()
