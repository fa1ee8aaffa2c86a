"""Page images of the review page: the documents of an output are found, checked by their sha256, and drawn again."""

from __future__ import annotations

import base64
import hashlib
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import sources
from pipeline.budget import ImageSize, PixelBudget, fit_content
from pipeline.errors import DocumentError, JobError, PipelineError
from pipeline.job import Job
from pipeline.job.sections import JobSections
from pipeline.output.records import RecordTable
from pipeline.output.sources import read_sources
from pipeline.records import Document, Page
from pipeline.render.images import encode_page_jpeg
from pipeline.render.sandbox import Sandbox
from pipeline.review.documents import ReviewDocument
from pipeline.sources.local import make_absolute
from pipeline.stages.render import RenderPlan
from pipeline.storage.location import is_url

MAX_PIXELS = 1_003_520
"""Of a page image: what a person reads well, and about 100 kB."""
MAX_PAGES = 20
"""Of one document."""


@dataclass(frozen=True)
class PageImage:
    """A page as the review page has it."""

    page: int
    width_pt: float
    height_pt: float
    jpeg: str
    """In base64; "" for a page that cannot be shown."""
    problem: str | None = None


class PageArtist:
    """Draws the pages of an output's documents. Owns one sandboxed renderer."""

    def __init__(self, records: RecordTable, folder: Path | None) -> None:
        """`folder` is the one to which relative sources belong, that of the job file; by default it is looked for.

        Raises JobError where the job names a password that is not set.
        """
        self.listed = {row["source"]: row for row in read_sources(records.output).to_pylist()}
        local = [name for name in self.listed if not is_url(name)]
        self.root = (folder or find_documents_folder(records, local)).absolute()
        self.plan = make_render_plan(records, self.root)
        self.sandbox = Sandbox(replace(self.plan.read_settings(), text_layer=False, budget=PixelBudget(max_pixels=MAX_PIXELS)))

    def draw_document(self, document: ReviewDocument) -> Iterator[PageImage]:
        """Yield the pages of a record; one without an image that says why for each that cannot be drawn."""
        first, last = (document["page"], document["page"]) if document["page"] else (1, min(document["pages"], MAX_PAGES))
        if not document["doc_id"] or not last:
            return
        try:
            self.sandbox.open(self.read_bytes(document["source"], document["doc_id"]))
        except (PipelineError, OSError) as error:
            yield PageImage(first, 1, 1, "", describe_page_problem(error))
            return
        for page_no in range(first, last + 1):
            try:
                yield from map(make_page_image, self.sandbox.draw_pages(page_no, page_no))
            except DocumentError as error:
                yield PageImage(page_no, 1, 1, "", describe_page_problem(error))

    def read_bytes(self, source: str, doc_id: str) -> bytes:
        """Return the bytes of a document. Raises DocumentError for other bytes than those that were asked about, and OSError."""
        row = self.listed.get(source)
        if row is None:
            raise DocumentError("vanished", f"{source} is not in the output's list of sources")
        if is_url(source) or sources.REMOTE_URL.match(source):
            listed = Document(source, row["size_bytes"], row["version"], row.get("full_url"))
            data = sources.read_document(listed, self.root, self.plan.settings.max_file_bytes, self.plan.policy)
        else:
            file = Path(make_absolute(source, str(self.root)))
            if not stat.S_ISREG(file.stat().st_mode):
                raise DocumentError("unreadable", f"{file} is no regular file")
            data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != doc_id:
            raise DocumentError("changed", f"{source} is not the document that was read: its bytes have changed")
        return data

    def close(self) -> None:
        """End the renderer."""
        self.sandbox.close()


def make_page_image(page: Page) -> PageImage:
    """Return a page's image without the white that fills its canvas."""
    height_px, width_px, _ = page.pixels.shape
    inner = fit_content(page.width_pt, page.height_pt, ImageSize(width_px, height_px))
    jpeg = encode_page_jpeg(page.pixels[: inner.height_px, : inner.width_px])
    return PageImage(page.page_no, page.width_pt, page.height_pt, base64.b64encode(jpeg).decode())


def describe_page_problem(error: Exception) -> str:
    return f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)


def make_render_plan(records: RecordTable, folder: Path) -> RenderPlan:
    """Return how the output's documents were drawn. Raises JobError for a `job.yaml` that this version cannot read, and for a password."""
    try:
        sections = JobSections.model_validate(records.job["job"])
    except ValueError as error:
        raise JobError(
            f"{records.place}/job.yaml is not one of this version: {' '.join(str(error).split())[:200]}", records.place
        ) from None
    return RenderPlan.of_job(Job(folder / "job.yaml", sections, records.schema, Path(records.place)))


def find_documents_folder(records: RecordTable, names: list[str]) -> Path:
    """Return the first folder near the output and the working directory in which the first of these sources are."""
    wanted = [name for name in names if not Path(name).is_absolute()][:5]
    tried = list(list_near_folders(records.place))
    return next((folder for folder in tried if wanted and all((folder / name).is_file() for name in wanted)), Path.cwd())


def list_near_folders(place: str) -> Iterable[Path]:
    """Yield the working directory, the folders above the output, and those directly inside of one of them."""
    here = Path(place).absolute()
    above = [Path.cwd(), *([] if is_url(place) else [here, *here.parents][:3])]
    for folder in above:
        yield folder
    for folder in above:
        try:
            yield from sorted(inner for inner in folder.iterdir() if inner.is_dir())
        except OSError:
            continue


def describe_pages(images: list[PageImage]) -> list[dict[str, Any]]:
    """Return what the page knows of a document's pages, but for their images."""
    return [{"page": one.page, "width": one.width_pt, "height": one.height_pt, "problem": one.problem} for one in images]
