"""Values that are passed between the parts of the package (frozen dataclasses), and the rows of the output folder (typed dicts).

A `Document` is rendered into `Page`s; up to `per_request` pages and the prompt become a `Request`; an engine answers with a
`Completion`; an error in any of these steps becomes a `Failure`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import Literal, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""One page image: (height_px, width_px, 3), RGB."""


class Stage(StrEnum):
    """The step of the pipeline in which a failure happened."""

    SOURCE = "source"
    RENDER = "render"
    GENERATE = "generate"
    VALIDATE = "validate"
    OCR = "ocr"
    """Of a page's words alone: it costs no answer."""
    SETTLE = "settle"


class Status(StrEnum):
    """The outcome for a document or page."""

    EXTRACTED = "extracted"
    INVALID = "invalid"
    FAILED = "failed"


class FinishReason(StrEnum):
    """Why an engine stopped generating."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class Failure:
    """Why there is no valid result: the stage, a short stable word for counting, and a sentence for the user."""

    stage: Stage
    kind: str
    message: str


@dataclass(frozen=True)
class Document:
    """One input file as listed. Its identity (`doc_id`), the sha256 of its bytes, is known after it has been read."""

    source: str
    size_bytes: int | None
    """-1: listed, but must not be read; None: unknown before it is read, for example at a URL."""
    version: str
    """By which a changed file is detected without reading it: mtime in ns, or the etag of an object store."""
    full_url: str | None = field(default=None, repr=False)
    """The URL that is fetched, where `source` hides its query; it may be signed, and is for `sources/` alone."""


class WordMark(IntEnum):
    """How a word of a text layer shows on the page. The numbers are stored in ledgers: add to them, never change one."""

    PRINTED = 0
    OVERLAY = 1
    """Not drawn itself, but over or under a picture of it: what OCR software adds to a scan."""
    UNDRAWN = 2
    """The PDF says that it is not to be drawn, and nothing else shows it (text render mode 3)."""
    NO_INK = 3
    """Drawn, and nothing is to be seen there: in its background's colour, transparent or clipped away."""
    TINY = 4
    """Under 2 pt on a page of larger print."""
    OFF_PAGE = 5
    COVERED = 6
    """Under something that was drawn later."""
    LAYER_OFF = 7
    """In an optional-content layer that is switched off."""

    @property
    def is_hidden(self) -> bool:
        """Whether a reader of the page cannot see the word."""
        return self > WordMark.OVERLAY


WORD_MARKS = tuple(WordMark)
"""Number -> mark: ten times as fast as `WordMark(number)`."""


class Word(NamedTuple):
    """A word of a page's text layer. Units: PDF points, origin top left, page rotation applied.

    A tuple, because a page has hundreds, and each is made twice between renderer and ledger.
    """

    text: str
    x0_pt: float
    y0_pt: float
    x1_pt: float
    y1_pt: float
    mark: WordMark = WordMark.PRINTED


@dataclass(frozen=True, eq=False)
class Page:
    """One rasterized page, exactly as the model sees it."""

    page_no: int
    """1-based; assigned once, when the document is opened, and never recomputed."""
    pixels: Pixels
    dpi: float
    """Effective resolution: pixels per inch of paper, whose size follows for an image from its stated or assumed dpi."""
    width_pt: float
    height_pt: float
    visual_tokens: int
    words: tuple[Word, ...] = ()
    warnings: tuple[str, ...] = ()
    renderer: str = ""
    """`pdfium` or `tifffile` for a page that the first renderer, MuPDF or Pillow, could not draw."""


@dataclass(frozen=True)
class PageMeasure:
    """A page that was measured and not drawn: the numbers that its `Page` would have."""

    width_pt: float
    height_pt: float
    width_px: int
    height_px: int
    dpi: float
    visual_tokens: int


@dataclass(frozen=True, eq=False)
class Message:
    """One turn of a conversation: texts and page images in order."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | Pixels, ...]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_tokens: int = 2048
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Request:
    """One request to an engine. `schema` is the JSON Schema text that constrains the answer, "" for free text.

    `page_ids` names each page image, in their order, the same for the same pixels alone; empty where that is not known.
    """

    key: str
    messages: tuple[Message, ...]
    schema: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    page_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens read and written, as servers count them: visual tokens and the token that ends an answer are included."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Token:
    """One generated token: the text it adds and its log-probability (nats), before temperature.

    The engine `transformers` returns the model's own value, among all tokens. vLLM applies the grammar's mask first: under a schema
    its value is among the allowed tokens, and 0 if only one is allowed. For other servers it is not known which of the two they return.
    """

    text: str
    logprob: float
    margin: float | None = None
    """By how many nats the likeliest other token that the grammar allowed is less likely, negative if it was the likelier one. None where
    no other was allowed, and for all tokens where the engine does not know: only `transformers` does."""


@dataclass(frozen=True)
class Completion:
    """An engine's answer."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    tokens: tuple[Token, ...] = ()


class FailureRow(TypedDict):
    """A `Failure` as a ledger and a record hold it."""

    stage: str
    kind: str
    message: str


class TextLayerRow(TypedDict):
    """The words of a page's text layer as the ledger holds them, in reading order."""

    text: str
    """The words, one a line."""
    boxes: bytes
    """All x0, then all y0, x1 and y1: unsigned 16-bit integers, the low byte first, in units of `unit_pt`."""
    unit_pt: float
    marks: bytes | None
    """One `WordMark` a word; None if all are `PRINTED`."""


class PageLayer(StrEnum):
    """How the text layer of a page does as a witness, and so whether its pixels are read by OCR under `evidence.ocr: scans`."""

    USABLE = "usable"
    NONE = "none"
    """No words: a scan, an image."""
    OCR_SOFTWARE = "ocr_software"
    """Most words were added to a scan by OCR software."""
    GARBAGE = "garbage"
    """Most characters stand for no letter: a font without a table of them."""
    PICTURES = "pictures"
    """Most of the page's ink is where no word of the layer stands: a scan with a stamp, text that is drawn as pictures."""


class OcrRow(TypedDict):
    """A row of `words/`: a page that OCR has looked at."""

    doc_id: str
    page: int
    status: str
    """`read`; `not_needed`, because the text layer is usable; `failed`."""
    layer: str | None
    """A `PageLayer`; None where the page could not be drawn."""
    words: TextLayerRow | None
    """None: none found, or not read."""
    failure: FailureRow | None
    reader: str | None
    """The program that read the page, with its version."""


class PageQuality(TypedDict):
    """How well a page image shows its print, each from 0 to 1 (`render.quality.measure_quality`)."""

    contrast: float
    """Brightness of the paper less that of the ink."""
    sharpness: float
    """The steepest step from one pixel to the next, as a share of the contrast."""
    noise: float
    """The usual step from one pixel to the next."""
    unevenness: float
    """Difference of the brightest and the darkest sixteenth of the page: 0 for a scan, more for a photograph."""


class PageFacts(TypedDict):
    """A page without its pixels and words."""

    page_no: int
    width_px: int
    height_px: int
    dpi: float
    visual_tokens: int
    warnings: list[str]
    renderer: str | None
    """None: the first renderer, or a ledger that does not say."""
    quality: PageQuality | None
    """None: a ledger that does not say."""


class PageRow(PageFacts):
    """A page as the ledger holds it: without its pixels."""

    text_layer: TextLayerRow | None
    """None: the page has none, `evidence.text` is off, or a ledger that does not say."""


class PageFailureRow(TypedDict):
    """A page that could not be drawn."""

    page: int
    kind: str
    message: str


class TokenRow(TypedDict):
    """A `Token` as the ledger holds it."""

    text: str
    logprob: float
    margin: float | None


class SourceRow(TypedDict, total=False):
    """A row of `sources/`: a document as listed and, once it is read, as identified. A manifest's own columns follow."""

    source: str
    size_bytes: int | None
    version: str
    doc_id: str | None
    """sha256 of the document's bytes, 64 hex digits; None until it is read."""
    page_count: int | None
    """None until the document is opened; 0 if that failed."""
    full_url: str | None
    """As in `Document`."""


REREAD = "evidence.model"
"""Stands for a rule's name, of which none has a dot, in the rows of requests that located values and read them again."""


class PlacedValueRow(TypedDict):
    """A value and where it stands; page and box are null where that is not known."""

    path: str
    value: str
    """As text: a string as it is, anything else as JSON."""
    page: int | None
    x0: float | None
    """Corners in PDF points, origin top left, page rotation applied."""
    y0: float | None
    x1: float | None
    y1: float | None


class LedgerRow(TypedDict, total=False):
    """A row of `requests/`, the ledger: one request and its outcome. Its fields are those of `output.ledger.LEDGER_SCHEMA`."""

    key: str | None
    """32 hex digits; None in a row that only identifies a document, which the ledger does not keep."""
    rule: str | None
    """The broken rule for whose fields this request asked again, or `REREAD`; None for a request about a whole record."""
    asked_values: list[PlacedValueRow] | None
    """Of a request whose `rule` is `REREAD`, in the order of their numbers in the answer, from 1."""
    attempt: int
    source: str
    doc_id: str | None
    page_count: int
    first_page: int
    last_page: int
    status: str
    failure: FailureRow | None
    answer: str | None
    """The model's last text, unchanged."""
    finish_reason: str | None
    errors: list[str] | None
    """Why the answer is not valid."""
    asks: int | None
    prompt_tokens: int | None
    completion_tokens: int | None
    tokens: list[TokenRow] | None
    pages: list[PageRow] | None
    page_failures: list[PageFailureRow] | None
    """The other pages are asked without these."""
    model: str | None
    engine: str | None
    fingerprint: str | None
    started_at: datetime | None
    elapsed_s: float | None


class RequestRow(LedgerRow, total=False):
    """A ledger row on its way from the renderer to the engine."""

    size_bytes: int | None
    version: str
    full_url: str | None
    pixels: list[Pixels]
    """Of each page."""


class ReceiptRow(TypedDict, total=False):
    """What the driver learns of a request whose answer is in the ledger, or of a document that needs none (its key is None)."""

    key: str | None
    rule: str | None
    attempt: int
    source: str
    doc_id: str | None
    page_count: int | None
    first_page: int
    last_page: int
    status: str
    failure: FailureRow | None
    pages_shown: int
    """Page images in the request."""
    asks: int | None
    prompt_tokens: int | None
    completion_tokens: int | None
    engine: str | None
    started_at: datetime | None
    elapsed_s: float | None
    actor: str
    """The engine actor's id and process id."""
    alive_s: float
    """For how long its model has been loaded."""
    busy_s: float
    """For how long of that time it had a request."""
