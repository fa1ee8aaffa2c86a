"""Pages of noise and a schema of few tokens, for requests that go to an engine without a run."""

from __future__ import annotations

import json

import numpy as np

from pipeline.records import Pixels

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
