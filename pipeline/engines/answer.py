"""What every engine that counts tokens itself says the same way: a request's length, and an answer's text. Knows no model.

An answer is made of its tokens:

    [123, 51, 125], their log-probabilities, STOP  ->  Completion('{"total":3}', STOP, Usage(310, 4), (Token('{"total":', -0.01), …))
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from pipeline.errors import DocumentError
from pipeline.records import Completion, FinishReason, Token, Usage


def check_length(prompt_tokens: int, answer_tokens: int, takes: int, allowed: int | None) -> None:
    """Refuse a request that is longer than the job allows, or than the model can read."""
    needed = prompt_tokens + answer_tokens
    if allowed and needed > allowed:
        found = f"the request needs {needed:,} tokens ({prompt_tokens:,} to read and up to {answer_tokens:,} to write)"
        way_out = "lower pages.per_request or sampling.max_tokens, or raise limits.max_request_tokens"
        raise DocumentError("too_long", f"{found}, limits.max_request_tokens allows {allowed:,}: {way_out}")
    if prompt_tokens >= takes:
        found = f"the prompt has {prompt_tokens:,} tokens, the model takes {takes:,}, answer included"
        raise DocumentError("too_long", f"{found}: lower pages.per_request")


def completion(
    tokens: Sequence[int], logprobs: Sequence[float], reason: FinishReason, prompt_tokens: int, bytes_of: Callable[[int], bytes]
) -> Completion:
    """Return tokens, without the one that ended them, as an answer. A character spread over tokens is the last one's."""
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [characters.decode(bytes_of(token)) for token in tokens]
    scored = tuple(Token(text, logprob) for text, logprob in zip(texts, logprobs, strict=True))
    usage = Usage(prompt_tokens, len(tokens) + (reason is FinishReason.STOP))
    return Completion("".join(texts) + characters.decode(b"", final=True), reason, usage, scored)
