"""Nearly the same text: a text and a page come in, and the place of the page that differs least from it goes out.

It places a box and verifies nothing: a text with one letter changed is found just as well.
"""

from __future__ import annotations

from itertools import pairwise

from pipeline.evidence.page_index import Find, PageIndex, fold_text, squeeze_letters

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
    wanted, letters = squeeze_letters(fold_text(text), ""), page.loose_letters.letters
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

    Sellers' algorithm: a row for each letter of `wanted`, whose cells hold the edits and the beginning. `within` begins up to 2 * MAX_EDITS
    letters before the part, so that a row's cells further from its diagonal are left out.
    """
    band, far = 2 * MAX_EDITS, (most + 1, 0)
    row = [(0, at) for at in range(len(within) + 1)]
    for count, letter in enumerate(wanted, 1):
        new = [far] * len(row)
        first, last = max(1, count - band), min(len(within), count + 2 * band)
        left = new[first - 1] = (count, 0) if first == 1 else far
        least = left[0]
        for at in range(first, last + 1):
            (edits, begin), above = row[at - 1], row[at]
            edits += letter != within[at - 1]
            if above[0] + 1 < edits:
                edits, begin = above[0] + 1, above[1]
            if left[0] + 1 < edits:
                edits, begin = left[0] + 1, left[1]
            left = new[at] = edits, begin
            least = min(least, edits)
        row = new
        if least > most:
            return -1, 0, 0
    (edits, begin), end = min((cell, at) for at, cell in enumerate(row))
    return (edits, begin, end) if edits <= most else (-1, 0, 0)
