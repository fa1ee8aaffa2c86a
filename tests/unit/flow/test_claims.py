"""Claims of a renderer: many documents in a call, and none that waits long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from pipeline.flow import claims
from pipeline.flow.claims import ClaimBatcher
from tests.support.ray_actors import LocalActor

Calls = list[list[str]]


class Registry:
    """Grants every request, and keeps which documents came in which call."""

    def __init__(self) -> None:
        self.calls: Calls = []

    def claim(self, documents: list[tuple[Any, list[str]]]) -> list[dict[str, int]]:
        self.calls.append([document["source"] for document, _ in documents])
        return [dict.fromkeys(keys, 1) for _, keys in documents]


def ask(sizes: dict[str, int], registry: Any) -> list[dict[str, int]]:
    """Claim documents of so many requests, all at once."""

    async def gather() -> list[dict[str, int]]:
        batcher = ClaimBatcher(LocalActor(registry))
        documents: list[Awaitable[dict[str, int]]] = [
            batcher.claim({"source": source}, [f"{source} {page}" for page in range(pages)]) for source, pages in sizes.items()
        ]
        return await asyncio.gather(*documents)

    return asyncio.run(asyncio.wait_for(gather(), 60))


def test_documents_that_come_together_are_claimed_in_one_call() -> None:
    registry = Registry()
    claimed = ask({f"{number}.pdf": 2 for number in range(10)}, registry)
    assert registry.calls == [[f"{number}.pdf" for number in range(10)]]
    assert claimed == [{f"{number}.pdf 0": 1, f"{number}.pdf 1": 1} for number in range(10)]


def test_a_call_has_so_many_documents_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "CLAIMS_AT_ONCE", 4)
    registry = Registry()
    ask({f"{number}.pdf": 1 for number in range(10)}, registry)
    assert [len(call) for call in registry.calls] == [4, 4, 2]


def test_a_document_of_many_requests_does_not_wait_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "CLAIM_PERIOD_S", 3600.0)
    registry = Registry()
    ask({"a.pdf": 1, "b.pdf": 5}, registry)
    assert registry.calls == [["a.pdf", "b.pdf"]]


def test_who_waits_learns_that_the_registry_is_gone() -> None:
    class Gone:
        async def claim(self, documents: Any) -> None:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        ask({"a.pdf": 1}, Gone())
