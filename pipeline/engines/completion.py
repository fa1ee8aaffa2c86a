"""Shared parts of the engines that count tokens themselves: length check, tokens to `Completion`, loop detection, own failures.

    [123, 51, 125], their log-probabilities, STOP  ->  Completion('{"total":3}', STOP, Usage(310, 4), (Token('{"total":', -0.01), …))

A model that repeats itself would write until `max_tokens`: `find_loop` looks at the end of an answer from time to time, and an
answer that loops is stopped and fails. The engine `openai` uses it too, on tokens or on characters.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TypeVar

from pipeline.errors import DocumentError
from pipeline.records import Completion, FinishReason, Token, Usage

LOOP_PERIOD = 512
"""A loop is a pattern of up to 512 tokens …"""
LOOP_TIMES = 4
"""… that stands at the end of an answer this many times in a row, exactly the same …"""
LOOP_TOKENS = 512
"""… and fills at least this many tokens. Tables with so many equal rows in sequence are rarer than loops; rows that differ in a
running number are not a loop."""
LOOP_SHOWN = 80
"""Characters of a loop that its failure shows."""
LOOP_EVERY = 64
"""Tokens between two searches, which take 0.4 ms each."""
LOOP_CHARACTERS = 4 * LOOP_TOKENS
"""LOOP_PERIOD and LOOP_TOKENS where only characters are known: JSON has one to four characters to a token, so an answer is hardly
ever stopped sooner than by its tokens. A table's row has about a hundred: twenty equal rows in sequence are still allowed."""
LOOP_EVERY_CHARACTERS = 512
"""Characters between two searches, which take 2 ms at most."""

Written = TypeVar("Written", list[int], list[str], str)
"""The answer so far: tokens, or characters where the server does not report tokens."""


def check_token_length(prompt_tokens: int, answer_tokens: int, context_tokens: int, max_request_tokens: int | None) -> None:
    """Raise DocumentError `too_long` for a request that needs more tokens than the job allows or the model's context has."""
    needed = prompt_tokens + answer_tokens
    if max_request_tokens and needed > max_request_tokens:
        found = f"the request needs {needed:,} tokens ({prompt_tokens:,} to read and up to {answer_tokens:,} to write)"
        way_out = "lower pages.per_request or sampling.max_tokens, or raise limits.max_request_tokens"
        raise DocumentError("too_long", f"{found}, limits.max_request_tokens allows {max_request_tokens:,}: {way_out}")
    if prompt_tokens >= context_tokens:
        found = f"the prompt has {prompt_tokens:,} tokens, the model takes {context_tokens:,}, answer included"
        raise DocumentError("too_long", f"{found}: lower pages.per_request")


class TokenClock:
    """Measures for how long an engine has had requests and no token."""

    def __init__(self) -> None:
        self.requests, self.last_token_s, self.lock = 0, 0.0, Lock()

    @contextmanager
    def count_request(self) -> Iterator[None]:
        """Count a request as long as it is under way; the first one starts the clock."""
        with self.lock:
            if not self.requests:
                self.note_token()
            self.requests += 1
        try:
            yield
        finally:
            with self.lock:
                self.requests -= 1

    def note_token(self) -> None:
        """Note that the engine has written a token, of whichever request."""
        self.last_token_s = time.monotonic()

    def measure_silence_s(self) -> float:
        """Return the seconds since the last token; 0 while there are no requests."""
        return time.monotonic() - self.last_token_s if self.requests else 0.0


def build_completion(
    tokens: Sequence[int],
    logprobs: Sequence[float] | None,
    reason: FinishReason,
    prompt_tokens: int,
    decode_token: Callable[[int], bytes],
    margins: Sequence[float | None] | None = None,
) -> Completion:
    """Return the completion made of these tokens, which lack the end token. A character spread over tokens belongs to the last one.

    Without log-probabilities it has no tokens, as that of a server that reports none.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [decoder.decode(decode_token(token)) for token in tokens]
    scored = () if logprobs is None else tuple(map(Token, texts, logprobs, margins or [None] * len(texts)))
    usage = Usage(prompt_tokens, len(tokens) + (reason is FinishReason.STOP))
    return Completion("".join(texts) + decoder.decode(b"", final=True), reason, usage, scored)


def make_loop_error(text: str, period: int, written: int, unit: str = "tokens") -> DocumentError:
    """Return the failure that shows a loop; of a long one, its beginning."""
    shown = repr(text) if len(text) <= LOOP_SHOWN else f"{text[:LOOP_SHOWN]!r}… ({period:,} {unit})"
    return DocumentError("loop", f"the answer repeats {shown} and was stopped after {written:,} {unit}")


def find_loop(written: Written, longest: int = LOOP_PERIOD, least: int = LOOP_TOKENS) -> Written:
    """Return the pattern that the end of an answer repeats, rotated to where the repetition begins; empty when there is no loop.

    Reads the tail backwards and computes, for each prefix of it, the length of its longest proper border (the prefix function of
    Knuth, Morris and Pratt): the prefix's length minus its border is its shortest period. Each token is read twice at most.
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
    """Return an exception that one request caused as that request's own failure."""
    if isinstance(error, DocumentError):
        return error
    return DocumentError("engine", f"the engine failed on this request: {type(error).__name__}: {error}")
