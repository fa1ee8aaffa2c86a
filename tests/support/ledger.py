"""Ledgers written by tests, as engine actors write them."""

from __future__ import annotations

from typing import Any

from pipeline.output import Output
from pipeline.output.ledger import write_rows


class LedgerWriter:
    """Collects rows and writes them in one shard, by `flush` or at the end of the block."""

    def __init__(self, output: Output) -> None:
        self.output, self.rows = output, list[Any]()

    def add(self, row: Any) -> None:
        self.rows.append(row)

    def flush(self) -> None:
        if self.rows:
            write_rows(self.output, self.rows)
        self.rows = []

    def __enter__(self) -> LedgerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
