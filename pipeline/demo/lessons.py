"""Training data: endless batches of synthetic pages, the answers to be written about them, and where the answers are read from.

There are three kinds of lessons. *Spelling* has pages full of random words and trains the vision tower alone. *Copying* asks for
a page's text row by row. *Reading* is the real task: the prompt of the invoice or receipt job, and the record. In the last two,
each character of the answer has the visual token that shows it, which teaches a model of four layers where to look.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from pipeline.demo import documents, drawing, model
from pipeline.demo.documents import HELD_OUT, Form, Sample
from pipeline.demo.sheets import HEIGHT_PX, WIDTH_PX, Pen, Sheet, TextRun, measure_characters
from pipeline.demo.truth import format_answer, split_json
from pipeline.demo.words import draw_word
from pipeline.schema import Schema, prompt

CHARACTER_COLUMNS = 8
LETTERS = {chr(c): i for i, c in enumerate([*range(33, 127), 0x20AC, 0xA3], start=1)}
ROWS_OF_TOKENS, TOKENS_IN_ROW = HEIGHT_PX // 28, WIDTH_PX // 28
PAGE_TOKENS = ROWS_OF_TOKENS * TOKENS_IN_ROW
IGNORED = -100
SCHEMAS = Path(__file__).parents[2] / "schemas"
NAMED_DAY = re.compile(r"(?P<d>\d{1,2}) (?P<m>[A-Z][a-z]+) (?P<y>\d{4})|(?P<M>[A-Z][a-z]+) (?P<D>\d{1,2}), (?P<Y>\d{4})")
NUMBERED_DAY = re.compile(r"(?P<d>\d\d)[./](?P<m>\d\d)[./](?P<y>\d{4})|(?P<Y>\d{4})-(?P<M>\d\d)-(?P<D>\d\d)")

Places = list[tuple[int, int] | None]
"""For each character of an answer, the visual token that shows it, counted over all pages, and the column in that token; None for a
character that is not printed."""


@dataclass
class LessonBatch:
    """Pages and, except in spelling lessons, the conversations about them.

    `pages` (n, 448, 448, 3) uint8, `letters` (n * 256, 8) classes, `ids` and `labels` (documents, length), `places`
    (documents, length, 2): the position of a visual token in `ids` and the column in it.
    """

    pages: Tensor
    letters: Tensor
    ids: Tensor | None = None
    labels: Tensor | None = None
    places: Tensor | None = None

    def to(self, device: str) -> LessonBatch:
        moved: dict[str, Any] = {name: tensor if tensor is None else tensor.to(device) for name, tensor in vars(self).items()}
        return LessonBatch(**moved)


class Lessons(IterableDataset[LessonBatch]):
    """Endless batches. `shares` holds the current shares of spelling and, in the rest, of copying; training changes them."""

    def __init__(self, seed: int, batch_size: int, shares: Any) -> None:
        self.seed, self.batch_size, self.shares = seed, batch_size, shares

    def __iter__(self) -> Iterator[LessonBatch]:
        torch.set_num_threads(1)
        rng = random.Random(self.seed)
        known = model.load_demo_schemas(SCHEMAS)
        processor = model.build_processor(model.build_tokenizer(known))
        while True:
            spelling, copying = self.shares
            if rng.random() < spelling:
                yield scan_sheets([make_spelling_sheet(rng) for _ in range(self.batch_size)], rng)[0]
            else:
                yield from self.make_batches(rng, processor, known, rng.random() < copying)

    def make_batches(self, rng: random.Random, processor: Any, known: dict[str, Schema], copying: bool) -> Iterator[LessonBatch]:
        """Yield four batches of copying or reading lessons on one kind of document, grouped by length so that little is padded."""
        kinds: tuple[tuple[Form, int], ...] = (("invoice", 1), ("receipt", 1), ("invoice", 2))
        form, pages = rng.choices(kinds, (60, 28, 0 if copying else 12))[0]
        count = max(1, self.batch_size // pages)
        samples = [documents.draw_sample(rng.randrange(HELD_OUT), form, pages) for _ in range(4 * count)]
        samples.sort(key=lambda sample: len(format_answer(sample.truth)))
        starts = list(range(0, len(samples), count))
        rng.shuffle(starts)
        for start in starts:
            chosen = samples[start : start + count]
            batch, angles = scan_sheets([sheet for sample in chosen for sheet in sample.sheets], rng)
            document_angles = [angles[at : at + pages] for at in range(0, len(angles), pages)]
            if copying:
                answers = [transcribe_sheet(sample.sheets[0], angle[0]) for sample, angle in zip(chosen, document_angles, strict=True)]
            else:
                answers = [write_record(sample, angle) for sample, angle in zip(chosen, document_angles, strict=True)]
            question = build_question(processor, None if copying else known[form], pages)
            batch.ids, batch.labels, batch.places = build_conversations(processor.tokenizer, question, answers)
            yield batch


def scan_sheets(sheets: list[Sheet], rng: random.Random) -> tuple[LessonBatch, list[float]]:
    """Return a batch of pages, 35 % of them as scans, and the rotation of each page in degrees."""
    images, classes, angles = [], [], []
    for sheet in sheets:
        image, angle = drawing.rasterize_sheet(sheet), 0.0
        if rng.random() < 0.35:
            image, angle = drawing.simulate_scan(image, rng)
        images.append(image)
        classes.append(label_letters(sheet, angle))
        angles.append(angle)
    return LessonBatch(torch.from_numpy(np.stack(images)), torch.from_numpy(np.concatenate(classes))), angles


def locate_characters(run: TextRun, angle_deg: float) -> Iterator[tuple[int, int]]:
    """Yield for each character the visual token of its page that shows the character's centre, and the column in that token."""
    sine, cosine = math.sin(math.radians(angle_deg)), math.cos(math.radians(angle_deg))
    x_px = run.x_px
    for width_px in measure_characters(run.text, run.font, run.size_px):
        dx, dy = x_px + width_px / 2 - WIDTH_PX / 2, run.y_px - 0.3 * run.size_px - HEIGHT_PX / 2
        x = min(max(WIDTH_PX / 2 + dx * cosine + dy * sine, 0.0), WIDTH_PX - 1.0)
        y = min(max(HEIGHT_PX / 2 - dx * sine + dy * cosine, 0.0), HEIGHT_PX - 1.0)
        x_px += width_px
        yield int(y) // 28 * TOKENS_IN_ROW + int(x) // 28, int(x % 28 / 28 * CHARACTER_COLUMNS)


def label_letters(sheet: Sheet, angle_deg: float) -> NDArray[np.int64]:
    """Return the class of the character centred in each column of each visual token, 0 for none: (256, 8)."""
    found = np.zeros((PAGE_TOKENS, CHARACTER_COLUMNS), np.int64)
    for run in sheet.runs:
        for letter, (cell, column) in zip(run.text, locate_characters(run, angle_deg), strict=True):
            if letter in LETTERS:
                found[cell, column] = LETTERS[letter]
    return found


def make_spelling_sheet(rng: random.Random) -> Sheet:
    """Return a page filled with random words, numbers and signs, with another font in each row."""
    pen = Pen(rng)
    sheet = pen.sheets[0]
    while pen.count_free_rows() > 0:
        fonts = Pen(rng)
        pen.plain, pen.bold, pen.size_px, x_px = fonts.plain, fonts.bold, fonts.size_px, pen.left_px
        while x_px < pen.right_px - 10:
            bold = rng.random() < 0.3
            word = "".join(rng.choices("".join(LETTERS), k=rng.randint(1, 6))) if rng.random() < 0.25 else draw_word(rng)
            width_px = pen.measure_text(word, bold)
            if x_px + width_px > WIDTH_PX - 4:
                break
            pen.write(word, x_px, bold=bold)
            x_px += width_px + rng.choice((pen.size_px * 0.27, rng.uniform(4, 60)))
        pen.next_row()
    return sheet


def write_record(sample: Sample, angles: list[float]) -> tuple[str, Places]:
    """Return a document's record as the model should write it, and the place of each of its characters."""
    runs: dict[str, tuple[TextRun, list[tuple[int, int]]]] = {}
    for page, (sheet, angle) in enumerate(zip(sample.sheets, angles, strict=True)):
        for run in sheet.runs:
            if run.shows:
                runs[run.shows] = run, [(page * PAGE_TOKENS + cell, column) for cell, column in locate_characters(run, angle)]
    text, places = "", Places()
    for piece, path in split_json(sample.truth):
        shown = runs.get(path) or runs.get(path.replace("currency", "total")) or runs.get(path.rpartition(".")[0])
        text += piece
        if shown is None or piece == "null":
            places += [None] * len(piece)
        else:
            run, where = shown
            places += [None if at is None else where[at] for at in align_value(piece, path, run.text)]
    return text, places


def align_value(value: str, path: str, printed: str) -> list[int | None]:
    """Return for each character of a JSON value the index of the printed character that it is read from, or None."""
    inner = value.strip('"')
    quote: list[int | None] = [None] if value.startswith('"') else []
    if path.endswith("date"):
        return quote + align_day(printed) + quote
    if path.endswith("currency") and inner not in printed:
        sign = next((at for at, letter in enumerate(printed) if letter in "\u20ac$\u00a3"), None)
        return quote + [sign] * len(inner) + quote
    if path.endswith("payment_method"):
        return quote + [0] * len(inner) + quote
    if re.fullmatch(r"\d+\.\d\d", inner):
        return align_money(inner, printed)
    start = printed.find(inner) if path.endswith("quantity") and printed.startswith(inner) else printed.rfind(inner)
    if start < 0:
        return [None] * len(value)
    return quote + list(range(start, start + len(inner))) + quote


def align_day(printed: str) -> list[int | None]:
    """Return the printed character for each character of YYYY-MM-DD; a month's name is read from its first two letters."""
    match = NUMBERED_DAY.search(printed) or NAMED_DAY.search(printed)
    if match is None:
        return [None] * 10
    year, month, day = (match.start(name) if match[name] else match.start(name.upper()) for name in "ymd")
    length = len(match["d"] or match["D"])
    days = [day, day + 1] if length == 2 else [day, day]
    return [*range(year, year + 4), month, month, month + 1, days[0], *days]


def align_money(value: str, printed: str) -> list[int | None]:
    """Return the printed character for each character of an amount, such as 1234.56 in 1.234,56: digit by digit, from the right."""
    digits = [at for at, letter in enumerate(printed) if letter.isdigit()]
    count = len(value) - 1
    if len(digits) < count:
        return [None] * len(value)
    whole, fraction = digits[-count:-2], digits[-2:]
    return [*whole, fraction[0] - 1, *fraction]


def transcribe_sheet(sheet: Sheet, angle_deg: float) -> tuple[str, Places]:
    """Return a page's text row by row, and the place of each of its characters."""
    text, places = "", Places()
    rows: dict[float, list[TextRun]] = {}
    for run in sheet.runs:
        rows.setdefault(run.y_px, []).append(run)
    for y_px in sorted(rows):
        for run in sorted(rows[y_px], key=lambda run: run.x_px):
            text += run.text
            places += locate_characters(run, angle_deg)
            text += " "
            places.append(None)
        text = text[:-1] + "\n"
    return text, places


def build_question(processor: Any, schema: Schema | None, pages: int) -> str:
    """Return the prompt as the engine writes it, with each page's visual tokens; without a schema, the pages alone."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}] * pages}]
    if schema is not None:
        turns[0]["content"] = [*turns[0]["content"], {"type": "text", "text": prompt.ASK}]
        turns.insert(0, {"role": "system", "content": prompt.build_system_message(schema)})
    text: str = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return text.replace("<|image_pad|>", "<|image_pad|>" * PAGE_TOKENS)


def build_conversations(tokenizer: Any, question: str, answers: list[tuple[str, Places]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids (documents, length), padded at the end; labels, for the answers' tokens only; and the places of these tokens."""
    start = tokenizer(question)["input_ids"]
    image_positions = [at for at, token in enumerate(start) if token == tokenizer.convert_tokens_to_ids("<|image_pad|>")]
    encoded = [tokenizer(text + "<|im_end|>", return_offsets_mapping=True) for text, _ in answers]
    length = len(start) + max(len(one["input_ids"]) for one in encoded)
    ids = torch.full((len(answers), length), tokenizer.pad_token_id)
    labels = torch.full((len(answers), length), IGNORED)
    places = torch.full((len(answers), length, 2), IGNORED)
    for row, (one, (_, where)) in enumerate(zip(encoded, answers, strict=True)):
        stop = len(start) + len(one["input_ids"])
        ids[row, :stop] = torch.tensor(start + one["input_ids"])
        labels[row, len(start) : stop] = torch.tensor(one["input_ids"])
        at = [where[first] if first < len(where) else None for first, _ in one["offset_mapping"]]
        located = [(IGNORED, IGNORED) if place is None else (image_positions[place[0]], place[1]) for place in at]
        places[row, len(start) : stop] = torch.tensor(located)
    return ids, labels, places
