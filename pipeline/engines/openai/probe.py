"""A server that answers -> how it is best spoken to, found out by asking it. Knows no network and no document.

    json_schema   response_format with the strict schema     the server decodes under it
    tool          a call of one tool is forced               its arguments are the record
    prompt        the schema stands in the prompt            nothing is forced: the validator and the re-ask do the work

The first of these that the server obeys is taken. A server may refuse a way, or take it and ignore it, or refuse the job's
schema in it: so it is told to say hello under a schema that wants another word, and then asked for a record of an empty page.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from pipeline.budget import ImageSize, PixelBudget, count_visual_tokens, fit_image, list_canvases
from pipeline.engines.openai.chat import ServerProfile, Structure
from pipeline.errors import DocumentError, JobError
from pipeline.records import Completion, Message, Request, Sampling
from pipeline.schema.prompt import build_messages

Ask = Callable[[Request, ServerProfile], Awaitable[Completion]]
WAYS: tuple[Structure, ...] = ("json_schema", "tool", "prompt")
WORD = "k3v9"
PROBE_SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "enum": [WORD]}},
    "required": ["word"],
    "additionalProperties": False,
}
HELLO_TOKENS = 256
"""Room for a model that thinks first."""
RECORD_TOKENS = 16
"""Enough to see that the schema is taken."""
SMALL = ImageSize(56, 56)


@dataclass(frozen=True)
class ProbeSubject:
    """What a job asks for: probed with it, so that nothing is refused later."""

    system: str
    schema: str
    sampling: Sampling

    def hello(self) -> Request:
        """Return a question whose answer shows whether a schema is obeyed."""
        sampling = replace(self.sampling, max_tokens=HELLO_TOKENS)
        return Request("hello", (Message("user", ("Say hello.",)),), json.dumps(PROBE_SCHEMA), sampling)

    def record(self, size: ImageSize = SMALL) -> Request:
        """Return the job's own question about an empty page."""
        page = np.full((size.height_px, size.width_px, 3), 255, np.uint8)
        return Request("record", build_messages(self.system, [page]), self.schema, replace(self.sampling, max_tokens=RECORD_TOKENS))


async def probe_server(
    ask: Ask, subject: ProbeSubject, start: ServerProfile, structure: Structure | None, logprobs: bool | None
) -> ServerProfile:
    """Return how a server is spoken to; what is given stays as it is.

    Raises JobError when it refuses every way, and whatever else `ask` raises.
    """
    refusal = ""
    for way, scores in product([structure] if structure else WAYS, [True, False] if logprobs is None else [logprobs]):
        dialect = replace(start, structure=way, logprobs=scores)
        try:
            if structure or way == "prompt" or is_schema_obeyed((await ask(subject.hello(), dialect)).text):
                await ask(subject.record(), dialect)
                return dialect
        except DocumentError as error:
            if error.kind != "refused":
                raise
            refusal = error.message
    way_out = "model.base_url mostly ends in /v1, model.name is the server's own, model.extra_body can take keys away"
    raise JobError(f"it refuses to be asked: {refusal.rstrip('.')}; {way_out}")


async def check_page_sizes(ask: Ask, subject: ProbeSubject, dialect: ServerProfile, budget: PixelBudget) -> None:
    """Raise JobError when a server resizes pages: the largest page then costs other tokens, compared with the smallest, than planned.

    It would take the bounds with each request, but only if it was started with `--trust-request-mm-kwargs`; without them the
    checkpoint's own hold, which are as wide as any budget.
    """
    small, large = find_extreme_sizes(budget)
    if small == large:
        return
    read = [(await ask(subject.record(size), dialect)).usage.prompt_tokens for size in (small, large)]
    planned = count_visual_tokens(large) - count_visual_tokens(small)
    if read[1] - read[0] != planned:
        sizes = f"pages of {small.width_px}x{small.height_px} and {large.width_px}x{large.height_px} px"
        found = f"it resizes pages: {sizes} should differ by {planned:,} tokens and differ by {read[1] - read[0]:,}"
        way_out = "start it without min_pixels and max_pixels, or set pages.min_pixels and pages.max_pixels to what it has"
        raise JobError(f"{found}; {way_out}")


def find_extreme_sizes(budget: PixelBudget) -> tuple[ImageSize, ImageSize]:
    """Return the smallest and the largest size of a page; twice the same where all have that."""
    if budget.resized_height and budget.resized_width:
        return (fit_image(1, 1, budget),) * 2
    sizes = sorted(list_canvases(1, 1, budget), key=count_visual_tokens)
    return sizes[0], sizes[-1]


def is_schema_obeyed(text: str) -> bool:
    """Say whether an answer keeps to the schema of the hello."""
    try:
        return bool(json.loads(text) == {"word": WORD})
    except ValueError:
        return False


def list_models(cards: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the models that a server lists, adapters left out."""
    return [str(card["id"]) for card in cards if card.get("id") and not card.get("parent")]


def is_vllm_server(cards: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether a list of models is vLLM's, which signs it."""
    return any(card.get("owned_by") == "vllm" for card in cards)
