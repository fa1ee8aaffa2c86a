"""Rereading: where an answer has values that no word of its pages shows, the model is asked where they stand, and reads these parts again.

    {"number": "A-7", "total": 119.0}     a scan: nothing witnesses either
      -> location: the pages, "1. number: …", "2. total: …"      {"1": null, "2": {"page": 1, "bbox_2d": [400, 700, 460, 716]}}
      -> reading: the part of the page around this box, alone    {"1": "Total 119.00"}
      -> $.total is `reread` at this place of page 1

Both are rows of the ledger beside the answer's own, as the second answers of rules are (`re_ask`). Whether a reading agrees is decided in
settling (`evidence.readings`), which needs no model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pipeline import schema
from pipeline.engines import Engine
from pipeline.engines.model_files import find_box_units
from pipeline.evidence.boxes import BoxUnits, convert_box, find_largest_number
from pipeline.evidence.match import format_scalar, make_placed_row
from pipeline.evidence.page_index import Box
from pipeline.evidence.readings import Reading, list_unwitnessed_values
from pipeline.evidence.searches import Scalar
from pipeline.evidence.text_layer import unpack_words
from pipeline.job import PARTS_PER_REQUEST, Job
from pipeline.records import REREAD, LedgerRow, PageRow, Pixels, Request, RequestRow, Stage, Status
from pipeline.render.crop import crop_page
from pipeline.schema.prompt import build_location_question, build_messages, build_reading_question
from pipeline.schema.validate import Validator
from pipeline.stages.answers import ask_beside, make_page_ids, make_row_beside
from pipeline.stages.requests import make_failed_row

MAX_VALUES = 48
"""Values of a request that are looked for, the first ones of its answer: one request for their places and six for their readings."""
MOST_REQUESTS = 1 + MAX_VALUES // PARTS_PER_REQUEST
PLACE_TOKENS = 40
"""Of an answer for the place of one value: a token for each digit, and twice what is between them."""
MAX_VALUE_CHARACTERS = 300
"""A longer value is not looked for."""
MAX_READING_CHARACTERS = 400
MARGIN = 0.012
"""Most that is kept around a box, of the page's longer side: 14 px of 1,176. Three quarters of a line's height beside it, so that a
digit which the box cuts off is seen (22/12 is not 2/12), and a quarter above and below: more shows other lines with other values."""
UNIT_PHRASES = {BoxUnits.PIXELS: "pixels of that image", BoxUnits.THOUSANDTHS: "thousandths of that image's width and height, 0 to 1000"}


@dataclass(frozen=True, eq=False)
class PagePart:
    """The part of a page in which a value stands, as the model says."""

    scalar: Scalar
    page_no: int
    box_pt: Box
    pixels: Pixels


class Rereader:
    """Asks one engine for the places of unwitnessed values, and what is printed there."""

    def __init__(self, job: Job, engine: Engine) -> None:
        self.job, self.engine = job, engine
        self.units = find_box_units(job)[0]
        self.most_values = min(MAX_VALUES, job.sections.sampling.max_tokens // PLACE_TOKENS)

    async def reread_values(self, row: RequestRow, value: Any) -> list[LedgerRow]:
        """Return the rows of the requests about the values in an answer that the text layer of its pages does not show.

        None where there are no such values; one of a failure where an answer, or a place in it, is too much for this.
        """
        rows = list[LedgerRow]()
        try:
            await self.add_rows(row, value, rows)
        except Exception as error:  # any: as in `ask_beside`
            failed = make_row_beside(self.job, self.engine, row, REREAD, f"{REREAD} failed")
            rows.append({**failed, **make_failed_row(Stage.GENERATE, error)})
        return rows

    async def add_rows(self, row: RequestRow, value: Any, rows: list[LedgerRow]) -> None:
        """Add these rows one by one."""
        layers = [(page["page_no"], page.get("text_layer")) for page in row["pages"] or []]
        words = [unpack_words(page_no, layer) for page_no, layer in layers if layer]
        missing = list_unwitnessed_values(self.job.schema, value, words)
        scalars = [one for one in missing if len(format_scalar(one.value)) <= MAX_VALUE_CHARACTERS][: self.most_values]
        if not scalars or not row.get("pixels"):
            return
        rows.append(await self.ask_places(row, scalars))
        parts = await asyncio.to_thread(self.cut_parts, row, scalars, rows[0])  # some milliseconds each, in which others are answered
        for start in range(0, len(parts), PARTS_PER_REQUEST):
            rows.append(await self.ask_readings(row, len(rows), parts[start : start + PARTS_PER_REQUEST]))

    async def ask_places(self, row: RequestRow, scalars: Sequence[Scalar]) -> LedgerRow:
        """Return the row of a request for the places of values."""
        pixels = row.get("pixels") or []
        sizes = [(page["width_px"], page["height_px"]) for page in row["pages"] or []]
        asked = build_places_schema(len(scalars), len(pixels), find_largest_number(self.units, sizes))
        values = [(label_scalar(scalar), schema.dump_json(scalar.value)) for scalar in scalars]

        def build(key: str) -> Request:
            messages = build_location_question(build_messages(self.job.system_message, pixels), values, UNIT_PHRASES[self.units])
            return Request(key, messages, json.dumps(asked), self.job.sampling, tuple(make_page_ids(row)))

        found = await ask_beside(self.job, self.engine, row, REREAD, REREAD, build, lambda text: list_answer_errors(text, asked))
        return {
            **found,
            "tokens": None,
            "asked_values": [make_placed_row(one.path, format_scalar(one.value), None, None) for one in scalars],
        }

    def cut_parts(self, row: RequestRow, scalars: Sequence[Scalar], located: LedgerRow) -> list[PagePart]:
        """Return the parts of pages in which the model says that values stand; those that say nothing are left out."""
        if located["status"] != Status.EXTRACTED:
            return []
        places = schema.parse_json(located["answer"] or "")
        found = ((scalar, places[str(number)]) for number, scalar in enumerate(scalars, 1))
        parts = [self.cut_part(scalar, place, row["pages"] or [], row.get("pixels") or []) for scalar, place in found if place]
        return [part for part in parts if part]

    def cut_part(self, scalar: Scalar, place: Any, pages: Sequence[PageRow], pixels: Sequence[Pixels]) -> PagePart | None:
        """Return the part of a page in which the model says that a value stands; None where that is no place (`convert_box`)."""
        number = int(place["page"]) - 1
        page, image = pages[number], pixels[number]
        box_px = convert_box([*map(float, place["bbox_2d"])], self.units, image.shape[1], image.shape[0])
        if box_px is None:
            return None
        height, most = box_px[3] - box_px[1], MARGIN * max(image.shape)
        crop = crop_page(image, box_px, (min(0.75 * height, most), min(0.25 * height, most)), self.job.budget)
        left, top, right, bottom = (edge * 72 / page["dpi"] for edge in box_px)
        return None if crop is None else PagePart(scalar, page["page_no"], (left, top, right, bottom), crop)

    async def ask_readings(self, row: RequestRow, number: int, parts: Sequence[PagePart]) -> LedgerRow:
        """Return the row of a request for the text in parts of pages, which has these alone."""
        asked = build_readings_schema(len(parts))

        def build(key: str) -> Request:
            messages = build_reading_question([part.pixels for part in parts])
            names = (f"{row['doc_id']}/{part.page_no}/part {'-'.join(f'{edge:.1f}' for edge in part.box_pt)}" for part in parts)
            return Request(key, messages, json.dumps(asked), self.job.sampling, tuple(names) if row.get("doc_id") else ())

        name = f"{REREAD} {number}"
        found = await ask_beside(self.job, self.engine, row, REREAD, name, build, lambda text: list_answer_errors(text, asked))
        placed = [make_placed_row(part.scalar.path, format_scalar(part.scalar.value), part.page_no, part.box_pt) for part in parts]
        return {**found, "tokens": None, "asked_values": placed}


def label_scalar(scalar: Scalar) -> str:
    """Return what a value is called in a question: where the record has it, and its title."""
    title = next((str(one["title"]) for one in scalar.schemas if one.get("title")), "")
    name = scalar.path.removeprefix("$.")
    return f"{name} ({title})" if title else name


def build_places_schema(values: int, pages: int, largest: int) -> schema.Schema:
    """Return the schema of an answer that has for each value's number a page and a box, or null."""
    number = {"type": "integer", "minimum": 0, "maximum": largest}
    box = {"type": "array", "minItems": 4, "maxItems": 4, "items": number}
    properties = {"page": {"type": "integer", "minimum": 1, "maximum": pages}, "bbox_2d": box}
    place = {"type": "object", "additionalProperties": False, "required": [*properties], "properties": properties}
    return build_numbered_schema(values, {"anyOf": [place, {"type": "null"}]})


def build_readings_schema(parts: int) -> schema.Schema:
    """Return the schema of an answer that has for each part's number its text, or null."""
    return build_numbered_schema(parts, {"anyOf": [{"type": "string", "maxLength": MAX_READING_CHARACTERS}, {"type": "null"}]})


def build_numbered_schema(count: int, inner: schema.Schema) -> schema.Schema:
    """Return the schema of an object with the properties 1 to `count`."""
    names = [str(number) for number in range(1, count + 1)]
    return {"type": "object", "additionalProperties": False, "required": names, "properties": dict.fromkeys(names, inner)}


def list_answer_errors(text: str, asked: schema.Schema) -> list[str]:
    """Return why an answer is not what was asked; nothing if it is."""
    try:
        value = schema.parse_json(text)
    except ValueError as error:
        return [str(error)]
    return [*map(str, Validator(asked).find_violations(value))]


def collect_readings(rows: Iterable[LedgerRow]) -> dict[str, Reading]:
    """Return what was read of the values in the answer to one request, by their paths in it, given its rows of the ledger.

    A value whose place or reading was asked and not answered is left out.
    """
    found = dict[str, Reading]()
    rows = [row for row in rows if row.get("asked_values")]
    for row in sorted(rows, key=lambda row: any(asked["page"] is not None for asked in row["asked_values"] or [])):  # places first
        is_answered = row["status"] == Status.EXTRACTED
        texts = schema.parse_json(row["answer"] or "") if is_answered else {}
        for number, asked in enumerate(row["asked_values"] or [], 1):
            if not is_answered:
                found.pop(asked["path"], None)
            elif asked["page"] is None:
                found[asked["path"]] = Reading(asked["value"])
            else:
                box = cast(Box, tuple(asked[corner] for corner in ("x0", "y0", "x1", "y1")))
                found[asked["path"]] = Reading(asked["value"], asked["page"], box, texts[str(number)] or "")
    return found
