"""Server probe: finds out by short requests how a Chat Completions server takes a schema, and whether it resizes pages.

    json_schema   response_format with the strict schema     the server constrains its decoding
    tool          a forced call of one tool                  the call's arguments are the record
    prompt        the schema in the prompt                   not constrained: the validator and the re-ask correct the answer

The first of these that the server obeys is taken. A server may refuse one, accept it and ignore it, or refuse the job's schema in it.
So the probe asks for "hello" under a schema that allows only another word, and then for the job's record of an empty page.
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

Send = Callable[[Request, ServerProfile], Awaitable[Completion]]
STRUCTURES: tuple[Structure, ...] = ("json_schema", "tool", "prompt")
WORD = "k3v9"
PROBE_SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "enum": [WORD]}},
    "required": ["word"],
    "additionalProperties": False,
}
HELLO_TOKENS = 256
"""Enough for a model that writes its reasoning first."""
RECORD_TOKENS = 16
"""Enough to see that the server accepts the schema."""
SMALL_PAGE = ImageSize(56, 56)


@dataclass(frozen=True)
class ProbeSubject:
    """The parts of a job that probe requests are made of: what the server accepts here it accepts in the run."""

    system: str
    schema: str
    sampling: Sampling

    def build_hello_request(self) -> Request:
        """Return a request whose answer shows whether the server obeys a schema."""
        sampling = replace(self.sampling, max_tokens=HELLO_TOKENS)
        return Request("hello", (Message("user", ("Say hello.",)),), json.dumps(PROBE_SCHEMA), sampling)

    def build_record_request(self, size: ImageSize = SMALL_PAGE) -> Request:
        """Return the job's own request for an empty page."""
        page = np.full((size.height_px, size.width_px, 3), 255, np.uint8)
        return Request("record", build_messages(self.system, [page]), self.schema, replace(self.sampling, max_tokens=RECORD_TOKENS))


async def probe_server(
    send: Send, subject: ProbeSubject, base: ServerProfile, structure: Structure | None, logprobs: bool | None
) -> ServerProfile:
    """Return `base` with the structure and log-probabilities that the server supports; those that are given are not probed.

    Raises JobError when the server refuses all of them, and what `send` raises.
    """
    refusal = ""
    for tried, scores in product([structure] if structure else STRUCTURES, [True, False] if logprobs is None else [logprobs]):
        profile = replace(base, structure=tried, logprobs=scores)
        try:
            if structure or tried == "prompt" or is_schema_obeyed((await send(subject.build_hello_request(), profile)).text):
                await send(subject.build_record_request(), profile)
                return profile
        except DocumentError as error:
            if error.kind != "refused":
                raise
            refusal = error.message
    hint = "model.base_url usually ends in /v1, model.name must be the server's name of the model, model.extra_body can remove keys"
    raise JobError(f"it refuses every request: {refusal.rstrip('.')}; {hint}")


async def check_page_sizes(send: Send, subject: ProbeSubject, profile: ServerProfile, budget: PixelBudget) -> None:
    """Raise JobError when a vLLM server resizes pages: the largest and the smallest page then differ by other tokens than planned.

    The bounds are not sent with the requests: vLLM accepts them only if it was started with `--trust-request-mm-kwargs`. By default
    the checkpoint's own bounds apply, which are wider than any budget.
    """
    small, large = find_extreme_sizes(budget)
    if small == large:
        return
    read = [(await send(subject.build_record_request(size), profile)).usage.prompt_tokens for size in (small, large)]
    planned = count_visual_tokens(large, budget.cell_px) - count_visual_tokens(small, budget.cell_px)
    if read[1] - read[0] != planned:
        sizes = f"pages of {small.width_px}x{small.height_px} and {large.width_px}x{large.height_px} px"
        found = f"it resizes pages: {sizes} should differ by {planned:,} tokens and differ by {read[1] - read[0]:,}"
        hint = (
            "start it without min_pixels and max_pixels, set pages.min_pixels and pages.max_pixels to its values, or set model.cell_px "
            f"where a visual token of its model is not {budget.cell_px}x{budget.cell_px} px (32 for Qwen3-VL)"
        )
        raise JobError(f"{found}; {hint}")


def find_extreme_sizes(budget: PixelBudget) -> tuple[ImageSize, ImageSize]:
    """Return the smallest and the largest page size of a budget, which are equal for a fixed size."""
    if budget.resized_height and budget.resized_width:
        return (fit_image(1, 1, budget),) * 2
    sizes = sorted(list_canvases(1, 1, budget), key=lambda size: count_visual_tokens(size, budget.cell_px))
    return sizes[0], sizes[-1]


def is_schema_obeyed(text: str) -> bool:
    """Return whether an answer satisfies `PROBE_SCHEMA`."""
    try:
        return bool(json.loads(text) == {"word": WORD})
    except ValueError:
        return False


def list_models(cards: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names in a server's list of models, without adapters."""
    return [str(card["id"]) for card in cards if card.get("id") and not card.get("parent")]


def is_vllm_server(cards: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a list of models comes from vLLM, which names itself as the owner."""
    return any(card.get("owned_by") == "vllm" for card in cards)
