"""Claims of a renderer: which requests its documents shall ask, asked of the registry for many documents in one call."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from pipeline.records import SourceRow
from pipeline.stages.render import DRAWN_UNCLAIMED

CLAIM_PERIOD_S = 0.5
"""How long a document waits for others at most. A call costs the registry half a millisecond, and drawing a page takes 20."""
CLAIMS_AT_ONCE = 32


class ClaimBatcher:
    """Collects the claims of documents. Used on one event loop."""

    def __init__(self, registry: Any) -> None:
        self.registry, self.sent_s = registry, float("-inf")
        self.waiting: list[tuple[SourceRow, list[str], asyncio.Future[dict[str, int]]]] = []
        self.sending: set[asyncio.Task[None]] = set()

    async def claim(self, document: SourceRow, keys: list[str]) -> dict[str, int]:
        """Return the keys that a document shall ask, each with the number of its attempt, from 1.

        Asked at once if there are more than are drawn unclaimed, because then nothing is drawn before the answer.
        """
        loop = asyncio.get_running_loop()
        claimed: asyncio.Future[dict[str, int]] = loop.create_future()
        self.waiting.append((document, keys, claimed))
        if len(keys) > DRAWN_UNCLAIMED or len(self.waiting) >= CLAIMS_AT_ONCE:
            self.send_waiting()
        elif len(self.waiting) == 1:
            loop.call_later(max(0.0, self.sent_s + CLAIM_PERIOD_S - time.monotonic()), self.send_waiting)
        return await claimed

    def send_waiting(self) -> None:
        """Send what waits."""
        waiting, self.waiting = self.waiting, []
        if waiting:
            self.sent_s = time.monotonic()
            self.sending.add(task := asyncio.ensure_future(self.send_claims(waiting)))
            task.add_done_callback(self.sending.discard)

    async def send_claims(self, waiting: list[tuple[SourceRow, list[str], asyncio.Future[dict[str, int]]]]) -> None:
        """Ask the registry for these documents, and tell those that wait."""
        try:
            found = await self.registry.claim.remote([(document, keys) for document, keys, _ in waiting])
        except Exception as error:  # any: who waits for a claim raises it
            for _, _, claimed in waiting:
                claimed.set_exception(error)
        else:
            for (_, _, claimed), wanted in zip(waiting, found, strict=True):
                claimed.set_result(wanted)
