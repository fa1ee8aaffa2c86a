"""Parts of sentences that many messages have."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from difflib import get_close_matches


def format_count(count: int, noun: str) -> str:
    """Return `1 record` or `2,000 records`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def format_duration(seconds: float, decimals: int = 1) -> str:
    """Return seconds as `7.5 s` or `1:02:03`."""
    return f"{seconds:.{decimals}f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))


def truncate_text(text: str, length: int) -> str:
    """Return a text of at most so many characters, the last one an ellipsis where something is left out."""
    return text if len(text) <= length else text[: length - 1] + "…"


def suggest_word(word: str, known: Collection[str]) -> str:
    """Return "; did you mean '…'?" with the most similar known word, or "" if none is similar."""
    close = get_close_matches(word, sorted(known), 1, 0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
