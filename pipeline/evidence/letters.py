"""Letters and digits of texts: what is compared of them, and where their runs begin and end.

Total: EUR 1,234.50     totaleur1~234~50      `~`: between two digits of different runs
"""

from __future__ import annotations

import re
import unicodedata
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.evidence.numbers import YEAR_DIGITS

RUN = re.compile(r"[^\W_]+")
MAX_CODE = 0x30000
"""Characters from here on, of historic scripts and private use, are no letters."""
BEYOND = re.compile(f"[{chr(MAX_CODE)}-\U0010ffff]")
DIGIT = 2


@dataclass(frozen=True, slots=True)
class TextQuery:
    """A text to look for, as `read_query` prepares it once for all pages."""

    letters: str
    """Its letters and digits, with `~` between numbers."""
    sign: str
    """All of its characters, for a text without any."""
    head: str
    tail: str
    """The marks before its first letter or digit and after its last one."""
    is_number_first: bool
    is_number_last: bool
    """Whether a digit begins or ends it, which must not be part of a longer number."""
    joining: str
    """The marks that would make it one."""


class LetterIndex:
    """The letters and digits of a text, with `~` between two digits of different runs, and where its runs begin and end."""

    def __init__(self, text: str) -> None:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        kinds = classify_letters()[np.minimum(codes, MAX_CODE)]
        edges = np.flatnonzero(np.diff(kinds > 0, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        self.spans = starts.tolist(), ends.tolist()
        self.lengths, kept = np.cumsum(ends - starts), codes[kinds > 0]
        is_between = (kinds[ends[:-1] - 1] == DIGIT) & (kinds[starts[1:]] == DIGIT)
        shifts = np.concatenate([[0], np.cumsum(is_between)])[: len(starts)]
        self.letters = np.insert(kept, self.lengths[:-1][is_between], ord("~")).tobytes().decode("utf-32-le", "surrogatepass")
        self.place_runs(self.lengths + shifts)

    def place_runs(self, ends: NDArray[np.int64]) -> None:
        """Note where in the text the runs begin and end that end here in the letters."""
        begins = ends - np.diff(self.lengths, prepend=0)
        self.starts = dict(zip(begins.tolist(), self.spans[0], strict=True))
        self.ends = dict(zip(ends.tolist(), self.spans[1], strict=True))

    def drop_marks(self) -> LetterIndex:
        """Return the index without a mark between numbers."""
        if "~" not in self.letters:
            return self
        loose = copy(self)
        loose.letters = self.letters.replace("~", "")
        loose.place_runs(self.lengths)
        return loose


@lru_cache(maxsize=1)
def classify_letters() -> NDArray[np.uint8]:
    """Return for each character whether it is part of a run: 1 for letters, `DIGIT`, 0 for others and for all from `MAX_CODE` on."""
    kinds = np.zeros(MAX_CODE + 1, np.uint8)
    for run in RUN.finditer("".join(map(chr, range(MAX_CODE)))):
        kinds[run.start() : run.end()] = 1
        kinds[[run.start() + at for at, letter in enumerate(run[0]) if letter.isdigit()]] = DIGIT
    return kinds


@lru_cache(maxsize=4096)
def read_query(text: str) -> TextQuery:
    """Return a text as it is looked for."""
    folded = fold_text(text)
    letters, runs = squeeze_letters(folded), list(RUN.finditer(folded))
    head, tail = (folded[: runs[0].start()], folded[runs[-1].end() :]) if runs else ("", "")
    joining = ".,'’/:-" if letters.isdigit() and len(letters) != YEAR_DIGITS else ".,'’"
    return TextQuery(letters, "".join(folded.split()), head, tail, letters[:1].isdigit(), letters[-1:].isdigit(), joining)


def squeeze_letters(text: str) -> str:
    """Return the letters of a text as its `LetterIndex` has them, sooner for a short one."""
    runs = RUN.findall(BEYOND.sub(" ", text))
    letters = "".join(runs[:1])
    for before, run in pairwise(runs):
        letters += f"~{run}" if before[-1].isdigit() and run[0].isdigit() else run
    return letters


def fold_text(text: str) -> str:
    """Return a text without differences of case, ligatures, widths of characters and soft hyphens."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).replace("\u00ad", "").casefold()


def fold_words(words: list[str]) -> list[str]:
    """Return words without these differences."""
    return fold_text("\n".join(words)).split("\n")
