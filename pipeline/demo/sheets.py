"""Page layout of the synthetic documents: places rows of text on sheets, with positions and fonts; `drawing.py` draws them.

A sheet is 57 mm square: at the jobs' 200 dpi 448×448 px (16 rows of 16 visual tokens), with print of 14 to 17 px. The demonstration model
was trained on pages of this size only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache

import pymupdf

DPI = 200
WIDTH_PX, HEIGHT_PX = 448, 448
FONT_FAMILIES = (("helv", "hebo"), ("tiro", "tibo"), ("cour", "cobo"), ("helv", "heit"), ("tiro", "tiit"))


@dataclass(frozen=True)
class TextRun:
    """A piece of text in one font. Units: pixels at 200 dpi; `y_px` is the baseline."""

    text: str
    x_px: float
    y_px: float
    font: str
    size_px: float
    shows: str = ""
    """The path of the record's value that the text shows, such as `$.total`."""


@dataclass(frozen=True)
class Rule:
    """A thin straight line. Units: pixels at 200 dpi."""

    x0_px: float
    y0_px: float
    x1_px: float
    y1_px: float


@dataclass
class Sheet:
    """One page: its texts and lines."""

    runs: list[TextRun] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)


@cache
def read_advances(font: str) -> tuple[float, ...]:
    """Return each Latin-1 character's advance width in ems, and the euro sign's at its WinAnsi code 128."""
    metrics = pymupdf.Font(font)
    return tuple(metrics.glyph_advance(0x20AC if code == 128 else code) for code in range(256))


def measure_characters(text: str, font: str, size_px: float) -> list[float]:
    """Return the advance of each character in pixels."""
    widths = read_advances(font)
    return [widths[128 if c == "\u20ac" else ord(c)] * size_px for c in text]


class Pen:
    """Writes rows of text on sheets from top to bottom, in one document's fonts, sizes and margins."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.plain, self.bold = rng.choice(FONT_FAMILIES)
        self.size_px = rng.uniform(13.5, 15.0) if self.plain == "cour" else rng.uniform(14.0, 17.0)
        self.pitch_px = rng.uniform(26.5, 28.5)
        self.left_px = rng.uniform(12, 30)
        self.right_px = WIDTH_PX - rng.uniform(12, 30)
        self.first_px = rng.uniform(22, 32)
        self.sheets = [Sheet()]
        self.y_px = self.first_px

    def measure_text(self, text: str, bold: bool = False, scale: float = 1.0) -> float:
        return sum(measure_characters(text, self.bold if bold else self.plain, self.size_px * scale))

    def write(self, text: str, x_px: float, align: str = "left", bold: bool = False, scale: float = 1.0, shows: str = "") -> None:
        """Place a text on the current row; `x_px` is its left end, middle or right end."""
        width_px = self.measure_text(text, bold, scale)
        start_px = x_px - {"left": 0.0, "middle": width_px / 2, "right": width_px}[align]
        font = self.bold if bold else self.plain
        self.sheets[-1].runs.append(TextRun(text, start_px, self.y_px, font, self.size_px * scale, shows))

    def draw_rule(self) -> None:
        """Draw a line under the current row."""
        y_px = self.y_px + self.size_px * 0.4
        self.sheets[-1].rules.append(Rule(self.left_px, y_px, self.right_px, y_px))

    def next_row(self, rows: float = 1.0) -> None:
        self.y_px += rows * self.pitch_px

    def count_free_rows(self) -> int:
        """Return how many rows still fit."""
        return int((HEIGHT_PX - 12 - self.y_px) / self.pitch_px) + 1

    def start_page(self) -> None:
        self.sheets.append(Sheet())
        self.y_px = self.first_px
