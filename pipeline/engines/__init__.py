"""Engines answer requests. One protocol, one file for each way of serving; batching is each engine's own business."""

from __future__ import annotations

from typing import Protocol

from pipeline.records import Completion, Request


class Engine(Protocol):
    """A loaded model that answers.

    Runs without Ray, so that it can be tested and measured alone. Hundreds of `complete` calls may wait at once.
    """

    name: str
    """`transformers`, `vllm` or `openai`."""
    model: str
    """The checkpoint's hub id or folder, as records show it."""

    async def complete(self, request: Request) -> Completion:
        """Return the answer to one request.

        Raises DocumentError when this request alone cannot be answered (too long, unusable schema), EngineDead when
        the engine is beyond use.
        """
        ...

    def close(self) -> None:
        """Release the model. Requests still waiting fail with EngineDead."""
        ...
