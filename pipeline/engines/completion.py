"""What every engine that counts tokens itself says the same way: a request's length, and an answer's text. Knows no model.

An answer is made of its tokens:

    [123, 51, 125], their log-probabilities, STOP  ->  Completion('{"total":3}', STOP, Usage(310, 4), (Token('{"total":', -0.01), …))
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import TypeVar

from pipeline.errors import DocumentError
from pipeline.records import Completion, FinishReason, Token, Usage


def check_token_length(prompt_tokens: int, answer_tokens: int, takes: int, allowed: int | None) -> None:
    """Refuse a request that is longer than the job allows, or than the model can read."""
    needed = prompt_tokens + answer_tokens
    if allowed and needed > allowed:
        found = f"the request needs {needed:,} tokens ({prompt_tokens:,} to read and up to {answer_tokens:,} to write)"
        way_out = "lower pages.per_request or sampling.max_tokens, or raise limits.max_request_tokens"
        raise DocumentError("too_long", f"{found}, limits.max_request_tokens allows {allowed:,}: {way_out}")
    if prompt_tokens >= takes:
        found = f"the prompt has {prompt_tokens:,} tokens, the model takes {takes:,}, answer included"
        raise DocumentError("too_long", f"{found}: lower pages.per_request")


def build_completion(
    tokens: Sequence[int], logprobs: Sequence[float], reason: FinishReason, prompt_tokens: int, bytes_of: Callable[[int], bytes]
) -> Completion:
    """Return tokens, without the one that ended them, as an answer. A character spread over tokens is the last one's."""
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [characters.decode(bytes_of(token)) for token in tokens]
    scored = tuple(Token(text, logprob) for text, logprob in zip(texts, logprobs, strict=True))
    usage = Usage(prompt_tokens, len(tokens) + (reason is FinishReason.STOP))
    return Completion("".join(texts) + characters.decode(b"", final=True), reason, usage, scored)


LOOP_PERIOD = 512
"""An answer that repeats up to 512 tokens …"""
LOOP_TIMES = 4
"""… this many times, one after the other, to the letter …"""
LOOP_TOKENS = 512
"""… and for this long will not end by itself. Tables with so many equal rows in sequence are rarer than loops; rows that only
count on are no loop."""
LOOP_SHOWN = 80
"""Characters of a loop that its failure shows."""
LOOP_EVERY = 64
"""How many tokens are written between two looks of 0.4 ms each."""
LOOP_CHARACTERS = 4 * LOOP_TOKENS
"""What stands for 512 tokens, and for the longest period, where only characters are known: JSON has one to four to a token, so that
hardly anything is stopped sooner than by its tokens. A table's row has some hundred: twenty equal ones, one after the other, pass."""
LOOP_EVERY_CHARACTERS = 512
"""How many characters are written between two looks of 2 ms at most."""

Written = TypeVar("Written", list[int], list[str], str)
"""Tokens, or characters where nobody says which tokens they are."""


def make_loop_error(text: str, period: int, written: int, unit: str = "tokens") -> DocumentError:
    """Return the failure that names a loop; a long one is shown by its beginning."""
    shown = repr(text) if len(text) <= LOOP_SHOWN else f"{text[:LOOP_SHOWN]!r}… ({period:,} {unit})"
    return DocumentError("loop", f"the answer repeats {shown} and was stopped after {written:,} {unit}")


def find_loop(written: Written, longest: int = LOOP_PERIOD, least: int = LOOP_TOKENS) -> Written:
    """Return the pattern that the last tokens repeat, as it stands where they begin to; nothing when they repeat none.

    Reads the tail from its end and keeps, for each of its beginnings, the length of the longest shorter beginning that it ends with
    (Knuth, Morris and Pratt's prefix function): what is missing to the whole is its shortest period. Each token is looked at twice.
    """
    tail = written[: -longest * LOOP_TIMES - 1 : -1]
    border, borders = 0, [0]
    for end in range(1, len(tail)):
        while border and tail[end] != tail[border]:
            border = borders[border - 1]
        border += tail[end] == tail[border]
        borders.append(border)
        period = end + 1 - border
        if end + 1 >= max(least, LOOP_TIMES * period):
            start = len(written) - end - 1
            while start and written[start - 1] == written[start - 1 + period]:
                start -= 1
            return written[start : start + period]
    return written[:0]


def convert_request_error(error: Exception) -> DocumentError:
    """Return what went wrong with one request as its own failure."""
    if isinstance(error, DocumentError):
        return error
    return DocumentError("engine", f"the engine failed on this request: {type(error).__name__}: {error}")
