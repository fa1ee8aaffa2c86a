"""Registry of a run: which document asks which request, which engines there are, what is written, and the news of it for the driver.

It is an actor on the driver's machine that everything reports to in few calls: each has the claims of many documents, or the keys of a
shard of the ledger. Receipts pass through it unopened. Nothing here needs Ray, so it can be tested alone, and it imports little, because
its process starts with a run.

A request goes through these states; what is asked again after a death is written once:

    claimed    a document has the request          `claim`
    writing    an engine is about to write it      `begin_shard`
    done       it is in the ledger                 `end_shard`
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

from pipeline.output.key_set import KeySet
from pipeline.records import ReceiptRow, SourceRow
from pipeline.registry.deaths import DeathRecord, EngineId


@dataclass(frozen=True)
class EngineEntry:
    """An engine that has loaded its model."""

    id: EngineId
    node: str
    handle: Any
    """Ray's handle of the actor."""


@dataclass(frozen=True)
class EngineList:
    """The engines of a run, as far as the caller does not know them."""

    number: int
    """Of this list: it grows with each change."""
    added: list[EngineEntry]
    """Engines that the caller's list lacks."""
    ids: list[EngineId] | None
    """All engines; None where the caller's list is this one."""
    loads: list[int]
    """How many requests each of them had when it was last heard of."""


@dataclass
class Owner:
    """The document that asks the requests of all files with its bytes."""

    source: str
    left: set[str]
    """Keys that are not in the ledger yet."""


@dataclass
class News:
    """What has happened since the driver asked last."""

    receipts: list[bytes] = field(default_factory=list)
    """Requests that are in the ledger, as `pack_receipts` packs those of a shard."""
    shards: list[tuple[str, int]] = field(default_factory=list)
    """Shards of the ledger, and how many requests each has."""
    identified: list[SourceRow] = field(default_factory=list)
    """Documents that were identified and need no request."""
    loaded: dict[str, str] = field(default_factory=dict)
    """Engine actors that have loaded their model, and the nodes where they live; of all times."""
    nodes: list[str] = field(default_factory=list)
    """Nodes on which engine actors live, or lived last, loaded or not."""
    is_full: bool = False
    """Requests wait because all engines have as many as they take."""
    fatal: str | None = None
    """Why the run cannot go on."""


class RequestRegistry:
    """What an ask pass knows, in one place."""

    def __init__(self, is_node_alive: Callable[[str | None], bool]) -> None:
        self.is_node_alive = is_node_alive
        self.done, self.attempts = KeySet(), cast(Mapping[str, int], {})
        self.owners: dict[str, Owner] = {}
        """By doc_id: documents with requests that are not in the ledger yet. A file with the same bytes as one that is through asks
        nothing, because its requests are done."""
        self.claimed: dict[str, str] = {}
        """The doc_ids of these documents by the keys of those requests."""
        self.writing: dict[str, tuple[EngineId, str]] = {}
        self.news = News()
        self.fatal: str | None = None
        self.is_gate_open = False
        self.record = DeathRecord()
        self.nodes: dict[str, str] = {}
        self.pids: dict[str, int] = {}
        """The newest process of each engine actor."""
        self.engines: dict[str, EngineEntry] = {}
        self.loads: dict[str, int] = {}
        """Requests that each engine had when it was last heard of."""
        self.list_number = 0
        self.added_at: dict[str, int] = {}
        """The number of the list in which each engine is for the first time."""

    # ---- what renderers call -----------------------------------------------------------------------------------------------------

    def is_open(self) -> bool:
        """Say whether the first documents have proven good, or there is no such trial."""
        return self.is_gate_open

    def claim(self, documents: Sequence[tuple[SourceRow, list[str]]]) -> list[dict[str, int]]:
        """Return for each document, given with the keys of its requests, those that it shall ask, each with the number of its attempt,
        from 1.

        A request that is done is not asked again, and of several files with the same bytes one is asked. A document that shall ask none
        is news.
        """
        is_done = iter(self.done.find([key for _, keys in documents for key in keys]).tolist())
        return [self.claim_undone(document, [key for key in keys if not next(is_done)]) for document, keys in documents]

    def claim_undone(self, document: SourceRow, keys: list[str]) -> dict[str, int]:
        """Return what a document shall ask of these requests, none of which is done."""
        source = document["source"]
        doc_id = document["doc_id"] or f"unread {source}"
        owner = self.owners.get(doc_id)
        if not keys or (owner and owner.source != source):
            self.news.identified.append(document)
            return {}
        self.owners[doc_id] = Owner(source, set(keys))
        self.claimed.update(dict.fromkeys(keys, doc_id))
        return {key: self.attempts.get(key, 0) + 1 for key in keys}

    def list_engines(self, number: int, is_full: bool) -> EngineList:
        """Return the engines, those in full that the list of this number lacks.

        The caller says whether it waits because all that it knows have as many requests as they take.
        """
        self.news.is_full |= is_full
        loads = [self.loads[actor] for actor in self.engines]
        if number == self.list_number:
            return EngineList(number, [], None, loads)
        added = [entry for actor, entry in self.engines.items() if self.added_at[actor] > number]
        return EngineList(self.list_number, added, [entry.id for entry in self.engines.values()], loads)

    def judge_death(self, engine: EngineId, key: str) -> tuple[bool, str] | None:
        """Return whether the death of an engine counts for a request that it had, and why it died; None while that is not known.

        It does not where the engine asked another request alone, where its machine is gone, or where it was not needed any more.
        """
        if not self.record.is_known(engine) and self.is_node_alive(self.nodes.get(engine.actor)):
            return None
        return self.record.judge(engine, key)

    def end_run(self, reason: str) -> None:
        """Note why the run cannot go on."""
        self.fatal = self.fatal or reason

    # ---- what engines call -------------------------------------------------------------------------------------------------------

    def begin_process(self, engine: EngineId, node: str, is_replacement: bool) -> tuple[int, str]:
        """Note a new process of an engine actor; return how many engines were replaced, and why the last one died.

        Where the machine of its last process has gone, that is not the engine's failure.
        """
        before, self.nodes[engine.actor] = self.nodes.get(engine.actor), node
        last = EngineId(engine.actor, self.pids.get(engine.actor, 0))
        self.pids[engine.actor] = engine.pid
        self.drop_engine(engine.actor)
        if is_replacement and self.is_node_alive(before):
            return self.record.count_replacement(last)
        self.record.forget(last)
        return 0, ""

    def drop_engine(self, actor: str) -> None:
        """Make a list without the engine of an actor."""
        self.list_number += 1
        self.engines.pop(actor, None)

    def add_engine(self, entry: EngineEntry) -> None:
        """Take an engine that has loaded its model."""
        self.drop_engine(entry.id.actor)
        self.engines[entry.id.actor], self.added_at[entry.id.actor], self.loads[entry.id.actor] = entry, self.list_number, 0
        self.news.loaded[entry.id.actor] = entry.node

    def remove_engine(self, actor: str) -> None:
        """Take away an engine that is ended because it has nothing to do: its end is no death."""
        self.drop_engine(actor)
        self.nodes.pop(actor, None)
        self.record.forget(EngineId(actor, self.pids.pop(actor, 0)))

    def begin_alone(self, engine: EngineId, key: str) -> None:
        """Note that an engine asks a request with no other."""
        self.record.begin_alone(engine, key)

    def end_alone(self, engine: EngineId) -> None:
        """Note that the request that was asked with no other is answered."""
        self.record.end_alone(engine)

    def record_death(self, engine: EngineId, reason: str) -> None:
        """Keep why an engine ends its process."""
        self.drop_engine(engine.actor)
        self.record.record_death(engine, reason)

    def begin_shard(self, engine: EngineId, shard: str, keys: Sequence[str]) -> tuple[set[str], dict[str, str]]:
        """Return which of these requests an engine shall not write, and those that it shall not if a shard of this name is there.

        The former are done, or another engine writes them; the latter were to be written by a process that has died since.
        """
        refused = {key for key, done in zip(keys, self.done.find(keys).tolist(), strict=True) if done}
        doubtful: dict[str, str] = {}
        for key in keys:
            writer, name = self.writing.get(key, (engine, shard))
            if writer != engine and self.pids.get(writer.actor) == writer.pid:
                refused.add(key)
            elif writer != engine:
                doubtful[key] = name
        self.writing.update((key, (engine, shard)) for key in keys if key not in refused)
        return refused, doubtful

    def end_shard(self, engine: EngineId, shard: str | None, keys: Sequence[str], receipts: bytes, load: int) -> None:
        """Take what an engine has written, the keys and their packed receipts, and how many requests it has."""
        self.loads[engine.actor] = load
        if not shard:
            return
        self.done.update(keys)
        for key in keys:
            self.writing.pop(key, None)
            self.release_claim(key)
        self.news.receipts.append(receipts)
        self.news.shards.append((shard, len(keys)))
        self.record.pardon_again()

    def release_claim(self, key: str) -> None:
        """Forget who asked a request that is done."""
        doc_id = self.claimed.pop(key, "")
        if owner := self.owners.get(doc_id):
            owner.left.discard(key)
            if not owner.left:
                del self.owners[doc_id]

    # ---- what the driver calls ---------------------------------------------------------------------------------------------------

    def begin_round(self, done: KeySet, attempts: Mapping[str, int], is_open: bool) -> None:
        """Begin to ask what is not done, or is retried after so many attempts; `is_open`: no trial of the first documents is made."""
        self.done, self.attempts, self.owners, self.claimed, self.writing = done, attempts, {}, {}, {}
        self.is_gate_open = is_open

    def open_gate(self) -> None:
        """Let the documents after the first ones be asked."""
        self.is_gate_open = True

    def take_news(self) -> News:
        """Return what has happened since the last call."""
        news, self.news = self.news, News(loaded=self.news.loaded)
        news.nodes, news.fatal = list(self.nodes.values()), self.fatal
        return news

    def list_idle_engines(self) -> list[EngineEntry]:
        """Return the engines that had no request when they were last heard of."""
        return [entry for actor, entry in self.engines.items() if not self.loads.get(actor)]


def pack_receipts(receipts: list[ReceiptRow]) -> bytes:
    """Return receipts as they pass through the registry: as JSON, which costs less than Ray's own way for many small values."""
    return json.dumps(receipts, default=datetime.isoformat).encode()


def unpack_receipts(packed: bytes) -> list[ReceiptRow]:
    """Return what was packed by an engine of this run."""
    receipts = json.loads(packed)
    for receipt in receipts:
        if receipt.get("started_at"):
            receipt["started_at"] = datetime.fromisoformat(receipt["started_at"])
    return cast(list[ReceiptRow], receipts)
