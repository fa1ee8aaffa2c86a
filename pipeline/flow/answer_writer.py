"""Writer of one engine actor: collects answered rows and writes them into the ledger, beside the engine that made them.

    rows -> a shard of the ledger, every few seconds -> receipts for the registry

A row that another process has written, because the request was asked again after a death, is left out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from pipeline.errors import RunError
from pipeline.output import Output
from pipeline.output.ledger import name_rows, write_rows
from pipeline.records import LedgerRow, ReceiptRow
from pipeline.registry import pack_receipts
from pipeline.registry.deaths import EngineId

FIRST_S, LONGEST_S, GROWTH = 0.5, 5.0, 1.3
"""Seconds between two shards: few at first, so that a run of minutes is seen to go on, and then so many that a kill costs little."""
MAX_ROWS = 512
RECEIPT_COLUMNS = (
    *("key", "rule", "attempt", "source", "doc_id", "page_count", "first_page", "last_page", "status", "failure"),
    *("asks", "prompt_tokens", "completion_tokens", "engine", "started_at", "elapsed_s"),
)


class AnswerWriter:
    """Owns the rows between answer and ledger."""

    def __init__(self, output: Output, registry: Any, engine: EngineId, count_load: Callable[[], int]) -> None:
        """`count_load` returns how many requests the engine has."""
        self.output, self.registry, self.engine, self.count_load = output, registry, engine, count_load
        self.rows: dict[str, list[tuple[LedgerRow, ReceiptRow]]] = {}
        """Rows that are not written yet, by the key of their request: its own, and those that asked again. They are written together, so
        that a request that is done has all of them."""
        self.period_s, self.written_s = FIRST_S, time.monotonic()
        self.turn = asyncio.Lock()
        self.timer: asyncio.Task[None] | None = None

    def add(self, rows: Sequence[LedgerRow], alive_s: float, busy_s: float) -> None:
        """Take the rows of an answered request, its own first, and what they say of their engine. Called on the event loop."""
        about = {"actor": f"{self.engine.actor} {self.engine.pid}", "alive_s": alive_s, "busy_s": busy_s}
        self.rows[str(rows[0]["key"])] = [(row, self.make_receipt(row, about)) for row in rows]
        if self.timer is None or self.timer.done():
            self.timer = asyncio.ensure_future(self.write_later())

    def make_receipt(self, row: LedgerRow, about: Mapping[str, Any]) -> ReceiptRow:
        """Return what the driver learns of a row."""
        receipt = {**{name: row.get(name) for name in RECEIPT_COLUMNS}, **about, "pages_shown": len(row.get("pages") or [])}
        return cast(ReceiptRow, receipt)

    async def write_later(self) -> None:
        """Write when it is time, or when there are many rows."""
        while self.rows:
            due_s = self.written_s + self.period_s - time.monotonic()
            if due_s > 0 and len(self.rows) < MAX_ROWS:
                await asyncio.sleep(min(due_s, FIRST_S))
                continue
            if not await self.flush():
                return
            self.period_s = min(LONGEST_S, self.period_s * GROWTH)

    async def flush(self) -> bool:
        """Write the rows that are there; return whether that was possible. What is in the way ends the run, and the rows stay."""
        async with self.turn:
            taken = dict(self.rows)
            if not taken:
                return True
            try:
                await self.write_shard(taken)
            except RunError as error:
                await self.registry.end_run.remote(str(error))
                return False
            for key in taken:
                del self.rows[key]
            self.written_s = time.monotonic()
            return True

    async def write_shard(self, taken: dict[str, list[tuple[LedgerRow, ReceiptRow]]]) -> None:
        """Write one shard and tell the registry of it. Raises RunError."""
        name = name_rows(row for pairs in taken.values() for row, _ in pairs)
        refused, doubtful = await self.registry.begin_shard.remote(self.engine, name, list(taken))
        if doubtful:
            there = await asyncio.to_thread(self.output.requests.list_names, "")
            doubtful = {key: shard for key, shard in doubtful.items() if shard in there}
        granted = [key for key in taken if key not in refused and key not in doubtful]
        if granted:
            await asyncio.to_thread(write_rows, self.output, [row for key in granted for row, _ in taken[key]], name)
        await self.report_shard(name if granted else None, granted, taken)
        for shard in dict.fromkeys(doubtful.values()):  # its writer died before it could tell of it
            await self.report_shard(shard, [key for key in doubtful if doubtful[key] == shard], taken)

    async def report_shard(self, shard: str | None, keys: Sequence[str], taken: Mapping[str, list[tuple[LedgerRow, ReceiptRow]]]) -> None:
        """Tell the registry that these requests are in a shard of the ledger, if there is one, and how many this engine has."""
        receipts = pack_receipts([receipt for key in keys for _, receipt in taken[key]])
        await self.registry.end_shard.remote(self.engine, shard, list(keys), receipts, self.count_load())
