"""Certainty of values: takes an answer's JSON text and its tokens, and returns what the log-probabilities say of each value's tokens.

    '{"total":19.99}'  and  ('{"', 0.0) ('total', 0.0) ('":', 0.0) ('19', -0.2) ('.99', -0.1) ('}', 0.0)   ->   {"$.total": -0.15}

Values are scalars, and the empty list and object. A token that is partly outside of a value counts for it, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # public in its module, not in its stub

from pipeline.records import TokenRow
from pipeline.schema import join_path

PUNCTUATION = " \t\n\r,:]}"


def score_values(answer: str, tokens: Sequence[TokenRow]) -> dict[str, float]:
    """Return the mean log-probability (nats) of each value's own tokens by its path; nothing where the tokens are not those of the answer.

    `answer` must be a JSON text that `parse_json` reads.
    """
    return {path: score.mean for path, score in score_tokens(answer, tokens).items()}


@dataclass(frozen=True, slots=True)
class TokenScore:
    """Log-probabilities (nats) of a value's own tokens: without those to which the grammar allowed no alternative, where that is known."""

    total: float
    count: int
    least: float = 0.0
    first: float = 0.0
    margin: float | None = None
    """The least margin of its tokens (`records.Token`); None where the engine gives none."""

    @property
    def mean(self) -> float:
        return self.total / self.count


def score_tokens(answer: str, tokens: Sequence[TokenRow]) -> dict[str, TokenScore]:
    """Return the scores of each value's tokens by its path; nothing where the tokens are not those of the answer."""
    if "".join(token["text"] for token in tokens) != answer:
        return {}
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token["text"]))
    are_known = any(token.get("margin") is not None for token in tokens)
    found: dict[str, TokenScore] = {}
    first = 0
    for path, start, end in find_values(answer):
        while ends[first + 1] <= start:
            first += 1
        last = first
        while ends[last + 1] < end:
            last += 1
        found[path] = score_own_tokens(tokens[first : last + 1], are_known)
    return found


def score_own_tokens(tokens: Sequence[TokenRow], are_known: bool) -> TokenScore:
    """Return the score of a value's tokens; of all of them if no alternative was allowed to any, or that is not known."""
    own = [token for token in tokens if token["margin"] is not None] if are_known else []
    scores = [token["logprob"] for token in own or tokens]
    margin = min((float(token["margin"] or 0.0) for token in own), default=None)
    return TokenScore(sum(scores), len(scores), min(scores), scores[0], margin)


def find_values(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the path of each value in a JSON text, where it starts, and the position after it."""
    yield from walk_values(text, skip_space(text, 0), "$", [0])


def walk_values(text: str, start: int, path: str, position: list[int]) -> Iterator[tuple[str, int, int]]:
    """Yield the values inside the one that begins at `start`; afterwards `position[0]` is the position after it."""
    if text[start] not in "[{":
        position[0] = find_scalar_end(text, start)
        yield path, start, position[0]
        return
    here, closing, count = skip_space(text, start + 1), {"[": "]", "{": "}"}[text[start]], 0
    if text[here] == closing:
        yield path, start, here + 1
    while text[here] != closing:
        step: str | int = count
        if closing == "}":
            step, here = scanstring(text, here + 1)
            here = skip_space(text, text.index(":", here) + 1)
        yield from walk_values(text, here, join_path(path, step), position)
        here, count = skip_space(text, position[0]), count + 1
        if text[here] == ",":
            here = skip_space(text, here + 1)
    position[0] = here + 1


def find_scalar_end(text: str, start: int) -> int:
    """Return the position after the string, number or literal that begins at `start`."""
    if text[start] == '"':
        return int(scanstring(text, start + 1)[1])
    return next((index for index in range(start, len(text)) if text[index] in PUNCTUATION), len(text))


def skip_space(text: str, start: int) -> int:
    """Return the position of the next character that is no whitespace of JSON."""
    match = json.decoder.WHITESPACE.match(text, start)  # type: ignore[attr-defined]  # as above
    return int(match.end())
