"""Review page: the records of an output in, one HTML file out that needs no network and no other file.

What it holds is data: documents' texts are JSON in a script element that is not run, images are base64 in others, each decoded when it is
looked at. The page's policy forbids every request.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, TypedDict

from pipeline.errors import JobError
from pipeline.output.records import RecordTable, read_record_table
from pipeline.review.documents import SIGNS, ReviewDocument, list_review_documents
from pipeline.review.drawing import PageArtist, PageImage, describe_pages
from pipeline.review.fields import build_form

ASSETS = files("pipeline.review")


class ReviewResult(TypedDict):
    """What was written."""

    file: str
    documents: int
    with_pages: int
    """Documents whose pages are shown."""
    problems: list[str]
    """Pages that could not be drawn, a sentence each."""
    corrections: str
    """Name under which a browser saves the corrections."""


def write_review_page(
    place: str, file: Path, with_pages: int, folder: Path | None = None, on_document: Callable[[int, int], None] = lambda done, total: None
) -> ReviewResult:
    """Write the review page of an output, with the pages of the `with_pages` most doubtful documents.

    `folder` is where relative sources are, the folder of the job file. Raises JobError and RunError.
    """
    records = read_record_table(place)
    documents = list_review_documents(records)
    shown = min(with_pages, len(documents))
    problems: list[str] = []
    new = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        with new.open("w", encoding="utf-8", newline="\n") as stream:
            write_head(stream, records)
            pages = []
            for number, images in enumerate(draw_review_pages(records, documents[:shown], folder)):
                problems += [f"{documents[number]['source']}, page {one.page}: {one.problem}" for one in images if one.problem]
                pages.append(describe_pages(images))
                write_images(stream, number, images)
                on_document(number + 1, shown)
            write_tail(stream, records, documents, pages)
        new.replace(file)
    except OSError as error:
        raise JobError(f"cannot write {file}: {error.strerror or error}", file, "--file") from None
    finally:
        with suppress(OSError):
            new.unlink()
    corrections = f"{records.job['job']['name']}-corrections.jsonl"
    return {"file": str(file), "documents": len(documents), "with_pages": shown, "problems": problems, "corrections": corrections}


def draw_review_pages(records: RecordTable, documents: list[ReviewDocument], folder: Path | None) -> Iterator[list[PageImage]]:
    """Yield the pages of each document."""
    if documents:
        with closing(PageArtist(records, folder)) as artist:
            for document in documents:
                yield list(artist.draw_document(document))


def write_head(stream: IO[str], records: RecordTable, is_served: bool = False) -> None:
    """Write the part of the page before its data; one that is served may ask its server for images, a file makes no request."""
    template = read_asset("page.html").partition("<!-- data -->")[0]
    title = f"Review of {records.job['job']['name']}"
    template = template.replace("{title}", html.escape(title)).replace("/* style */", read_asset("colors.css") + read_asset("page.css"))
    stream.write(template.replace("default-src 'none'", "default-src 'none'; connect-src 'self'") if is_served else template)


def write_images(stream: IO[str], number: int, images: list[PageImage]) -> None:
    """Write the images of a document, each in an element that a browser neither runs nor decodes by itself."""
    for one in images:
        if one.jpeg:
            stream.write(f'<script type="text/plain" id="image-{number}-{one.page}">{one.jpeg}</script>\n')


def write_tail(
    stream: IO[str], records: RecordTable, documents: list[ReviewDocument], pages: list[list[dict[str, Any]]], is_served: bool = False
) -> None:
    """Write the data and the rest of the page."""
    data = {
        "key": hashlib.sha256(f"{records.output.root}/{records.job['fingerprint']}".encode()).hexdigest()[:16],
        "job": records.job["job"]["name"],
        "is_served": is_served,
        "signs": [name for name in SIGNS if name in records.table.column_names],
        "form": build_form(records.plan.root, records.schema),
        "documents": [{**document, "images": pages[number] if number < len(pages) else []} for number, document in enumerate(documents)],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    text = text.encode("utf-8", "replace").decode()
    stream.write(f'<script type="application/json" id="data">{text}</script>\n')
    template = read_asset("page.html").partition("<!-- data -->")[2]
    stream.write(template.replace("/* program */", read_asset("page.js")))


def read_asset(name: str) -> str:
    return ASSETS.joinpath(name).read_text(encoding="utf-8")
