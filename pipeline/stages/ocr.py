"""OCR stage: documents with the pages that are wanted -> rows of the ledger of OCR, read from pixels of its own.

Pages are drawn once more, at 1,280 visual tokens whatever the job's budget is: OCR needs letters of 8 px or more, and a document
whose answers are there need not be in memory. The child process that draws them reads them, too: a page on which OCR does not return
is given up, the process killed, and another one reads the next. Whatever fails costs the words of a page, or of a document, and no answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypedDict

from pipeline.budget import PixelBudget
from pipeline.errors import DocumentError
from pipeline.evidence.layers import judge_layer
from pipeline.evidence.ocr import describe_reader, require_ocr
from pipeline.evidence.text_layer import collect_page_words, pack_words
from pipeline.output.words import FAILED, NOT_NEEDED, READ
from pipeline.records import Document, FailureRow, OcrRow, PageLayer, SourceRow, Stage
from pipeline.render.sandbox import ReadingSandbox
from pipeline.sources import read_document
from pipeline.stages.render import RenderPlan
from pipeline.stages.requests import make_failed_row


class OcrTaskRow(SourceRow):
    """A document with pages that OCR shall look at."""

    pages: list[int]
    must_read: bool
    """Also a page whose text layer is usable."""


class UnreadRow(TypedDict):
    """A document whose bytes could not be read, or are others than those that were asked: its pages are tried again by another run."""

    source: str
    pages: int
    failure: FailureRow


@dataclass(frozen=True)
class OcrStage:
    """Reads pages of one job's documents by OCR. Owns one sandboxed renderer, started at the first document."""

    plan: RenderPlan

    @cached_property
    def sandbox(self) -> ReadingSandbox:
        require_ocr()
        return ReadingSandbox(replace(self.plan.read_settings(), budget=PixelBudget(), text_layer=True))

    def read_documents(self, documents: Iterable[OcrTaskRow]) -> Iterator[OcrRow | UnreadRow]:
        """Yield a row for each page wanted, one at a time, or one for a document that cannot be read."""
        for document in documents:
            try:
                self.open_document(document)
            except Exception as error:  # any: what a document's bytes make a library raise has no common class
                yield {"source": document["source"], "pages": len(document["pages"]), "failure": describe_page_error(Stage.SOURCE, error)}
                continue
            for page_no in document["pages"]:
                yield self.read_page(str(document["doc_id"]), page_no, document["must_read"])

    def open_document(self, document: OcrTaskRow) -> None:
        """Open a document. Raises DocumentError, also where its bytes are not those that were asked."""
        listed = Document(document["source"], document["size_bytes"], document["version"], document.get("full_url"))
        data = read_document(listed, self.plan.root, self.plan.settings.max_file_bytes, self.plan.policy)
        if hashlib.sha256(data).hexdigest() != document["doc_id"]:
            raise DocumentError("changed", "its bytes are not those that the model was asked about: run the job again")
        self.sandbox.open(data)

    def read_page(self, doc_id: str, page_no: int, must_read: bool) -> OcrRow:
        """Return what OCR reads on a page of the open document, or why it does not."""
        row: OcrRow = {"doc_id": doc_id, "page": page_no, "status": FAILED, "layer": None, "words": None, "failure": None, "reader": None}
        stage = Stage.RENDER
        try:
            (page,) = self.sandbox.draw_pages(page_no, page_no)
            stage, layer = Stage.OCR, collect_page_words(page)
            row["layer"] = str(judge := judge_layer(layer, page.pixels, page.width_pt, page.height_pt))
            if judge == PageLayer.USABLE and not must_read:
                return {**row, "status": NOT_NEEDED}
            return {**row, "status": READ, "words": pack_words(self.sandbox.read_page(page_no)), "reader": describe_reader()}
        except Exception as error:  # any, as above
            return {**row, "failure": describe_page_error(stage, error)}

    def close(self) -> None:
        """End the renderer."""
        if "sandbox" in vars(self):
            self.sandbox.close()


def describe_page_error(stage: Stage, error: Exception) -> FailureRow:
    """Return an error as a row's failure. This package's errors that stop a run are raised again."""
    failure = make_failed_row(stage, error)["failure"]
    assert failure is not None
    return failure
