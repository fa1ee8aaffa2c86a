"""Nearly the same text: a text and a page come in, and the place of the page that differs least from it goes out.

It places a box and verifies nothing: a text with one letter changed is found just as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from pipeline.evidence.letters import read_query
from pipeline.evidence.page_index import Find, PageIndex

MIN_LETTERS = 6
LETTERS_PER_EDIT = 6
MAX_EDITS = 6
MAX_TRIES = 12
"""Most places of a page that are compared letter by letter."""


def find_similar(page: PageIndex, text: str) -> tuple[Find, int] | None:
    """Return the place that differs least from a text, by whole words, and the edits between its letters and digits and those of the text.

    None where more than one of `LETTERS_PER_EDIT` letters differ, or `MAX_EDITS` in all. A page is searched once for each text: the items
    of a table have texts in common.
    """
    if text not in page.found_similar:
        page.found_similar[text] = search_similar(page, text)
    return page.found_similar[text]


def search_similar(page: PageIndex, text: str) -> tuple[Find, int] | None:
    """Return what `find_similar` does, by searching the page."""
    wanted, letters = read_query(text).letters.replace("~", ""), page.loose_letters.letters
    most = min(MAX_EDITS, len(wanted) // LETTERS_PER_EDIT)
    if len(wanted) < MIN_LETTERS:
        return None
    best: tuple[int, int, int] | None = None
    for start in list_starts(letters, wanted, most):
        left = max(0, start - most)
        edits, begin, end = compare_inside(wanted, letters[left : start + len(wanted) + most], most if best is None else best[0] - 1)
        if edits >= 0:
            best = edits, left + begin, left + end
            if not edits:
                break
    if best is None:
        return None
    edits, begin, end = best
    starts, ends = page.loose_letters.starts, page.loose_letters.ends
    first = max((at for at in starts if at <= begin), default=0)
    last = min((at for at in ends if at >= end), default=len(letters))
    return Find(starts[first], ends[last]), edits + begin - first + last - end


def list_starts(letters: str, wanted: str, most: int) -> list[int]:
    """Return where a text may begin, by its pieces that stand in the letters as they are: of n + 2 pieces of a text with n edits two are
    unchanged, and say about the same."""
    size, found = len(wanted) // (most + 2), list[tuple[int, int]]()
    for piece in range(most + 2):
        offset, count = piece * size, 0
        at = letters.find(wanted[offset : offset + size])
        while at >= 0 and count < MAX_TRIES:
            found.append((max(0, at - offset), piece))
            at, count = letters.find(wanted[offset : offset + size], at + 1), count + 1
    found.sort()
    agreed = [one for (one, piece), (other, next_piece) in pairwise(found) if other - one <= most and piece != next_piece]
    return list(dict.fromkeys(agreed))[:MAX_TRIES]


def compare_inside(wanted: str, within: str, most: int) -> tuple[int, int, int]:
    """Return the fewest edits between a text and a part of another, and where this part begins and ends; -1 for more than `most` edits.

    The part that ends first counts, and of those that end there the one whose length is nearest to the text's.
    """
    ends = list(count_edits(wanted, within, is_anchored=False))
    edits = min(ends, default=most + 1)
    if edits > most:
        return -1, 0, 0
    end = ends.index(edits) + 1
    lengths = count_edits(wanted[::-1], within[max(0, end - len(wanted) - most) : end][::-1], is_anchored=True)
    length = min((abs(length - len(wanted)), length) for length, found in enumerate(lengths, 1) if found == edits)[1]
    return edits, end - length, end


def count_edits(wanted: str, within: str, is_anchored: bool) -> Iterator[int]:
    """Yield for each letter of another text the fewest edits between a text and a part that ends there; `is_anchored`: the part from 0 on.

    Myers' bit vectors (1999) in the form of Hyyrö (2001): a column of the table of edits is two numbers with a bit for each letter.
    """
    letters: dict[str, int] = {}
    for at, letter in enumerate(wanted):
        letters[letter] = letters.get(letter, 0) | 1 << at
    full, top, edits = (1 << len(wanted)) - 1, 1 << len(wanted) - 1, len(wanted)
    up, down = full, 0
    for letter in within:
        same = letters.get(letter, 0)
        across = ((same & up) + up ^ up) | same
        right, left = down | ~(across | up) & full, up & across
        edits += bool(right & top) - bool(left & top)
        right, left = right << 1 | is_anchored, left << 1
        up, down = (left | ~(same | down | right)) & full, right & (same | down) & full
        yield edits
