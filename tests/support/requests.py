"""Pages of noise and a schema of few tokens, for requests that go to an engine without a run."""

from __future__ import annotations

import asyncio
import json

import numpy as np

from pipeline.engines import Engine
from pipeline.records import Pixels, Request

FLAT = json.dumps({
    "type": "object",
    "additionalProperties": False,
    "required": ["invoice_number", "kind", "total"],
    "properties": {
        "invoice_number": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["invoice", "receipt", None]},
        "total": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 999},
    },
})  # fmt: skip


def make_noise(seed: int = 0, height: int = 56, width: int = 84) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def answer_and_close(engine: Engine, *requests: Request) -> list[str]:
    """Return the answers to requests that are asked together, and close the engine."""

    async def gather() -> list[str]:
        return [completion.text for completion in await asyncio.gather(*map(engine.complete, requests))]

    try:
        return asyncio.run(gather())
    finally:
        engine.close()
