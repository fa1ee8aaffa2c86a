"""Registry of a run: which document asks which request, which engines there are, what is written, and the news of it for the driver.

It is an actor on the driver's machine that everything reports to in few, small calls: a claim for each document, two calls for each
shard of the ledger. Nothing in this file needs Ray, so it can be tested alone.

A request goes through these states; what is asked again after a death is written once:

    claimed    a document has the request          `claim`
    writing    an engine is about to write it      `begin_shard`
    done       it is in the ledger                 `end_shard`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.flow.quarantine import DeathRecord, EngineId
from pipeline.output.ledger import LedgerState
from pipeline.records import ReceiptRow, SourceRow


@dataclass(frozen=True)
class EngineEntry:
    """An engine that has loaded its model."""

    id: EngineId
    node: str
    handle: Any
    """Ray's handle of the actor."""
    load: int = 0
    """Requests that it had when it was last heard of."""


@dataclass
class News:
    """What has happened since the driver asked last."""

    receipts: list[ReceiptRow] = field(default_factory=list)
    """Requests that are in the ledger."""
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
        self.state: LedgerState | None = None
        self.owners: dict[str, str] = {}
        self.writing: dict[str, tuple[EngineId, str]] = {}
        self.news = News()
        self.fatal: str | None = None
        self.is_gate_open = False
        self.record = DeathRecord()
        self.nodes: dict[str, str] = {}
        self.pids: dict[str, int] = {}
        """The newest process of each engine actor."""
        self.engines: dict[str, EngineEntry] = {}

    # ---- what renderers call -----------------------------------------------------------------------------------------------------

    def is_open(self) -> bool:
        """Say whether the first documents have proven good, or there is no such trial."""
        return self.is_gate_open

    def claim(self, document: SourceRow, keys: list[str]) -> dict[str, int]:
        """Return the keys that this document shall ask, each with the number of its attempt, from 1.

        A request that is done is not asked again, and of several files with the same bytes one is asked. A document that shall ask none
        is news.
        """
        assert self.state is not None
        source = document["source"]
        owner = self.owners.setdefault(document["doc_id"] or f"unread {source}", source)
        is_done = self.state.done.find(keys)
        attempts = self.state.attempts
        wanted = {key: attempts.get(key, 0) + 1 for key, done in zip(keys, is_done, strict=True) if not done} if owner == source else {}
        if not wanted:
            self.news.identified.append(document)
        return wanted

    def list_engines(self, is_full: bool) -> list[EngineEntry]:
        """Return the engines; the caller says whether it waits because all that it knows have as many requests as they take."""
        self.news.is_full |= is_full
        return list(self.engines.values())

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
        self.engines.pop(engine.actor, None)
        if is_replacement and self.is_node_alive(before):
            return self.record.count_replacement(last)
        self.record.forget(last)
        return 0, ""

    def add_engine(self, entry: EngineEntry) -> None:
        """Take an engine that has loaded its model."""
        self.engines[entry.id.actor] = entry
        self.news.loaded[entry.id.actor] = entry.node

    def remove_engine(self, actor: str) -> None:
        """Take away an engine that is ended because it has nothing to do: its end is no death."""
        self.engines.pop(actor, None)
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
        self.engines.pop(engine.actor, None)
        self.record.record_death(engine, reason)

    def begin_shard(self, engine: EngineId, shard: str, keys: Sequence[str]) -> tuple[set[str], dict[str, str]]:
        """Return which of these requests an engine shall not write, and those that it shall not if a shard of this name is there.

        The former are done, or another engine writes them; the latter were to be written by a process that has died since.
        """
        assert self.state is not None
        refused = {key for key, done in zip(keys, self.state.done.find(keys), strict=True) if done}
        doubtful: dict[str, str] = {}
        for key in keys:
            writer, name = self.writing.get(key, (engine, shard))
            if writer != engine and self.pids.get(writer.actor) == writer.pid:
                refused.add(key)
            elif writer != engine:
                doubtful[key] = name
        self.writing.update((key, (engine, shard)) for key in keys if key not in refused)
        return refused, doubtful

    def end_shard(self, engine: EngineId, shard: str | None, receipts: list[ReceiptRow], load: int) -> None:
        """Take what an engine has written, and how many requests it has."""
        assert self.state is not None
        for receipt in receipts:
            key = str(receipt["key"])
            self.state.done.add(key)
            self.writing.pop(key, None)
        self.news.receipts += receipts
        if shard:
            self.news.shards.append((shard, len(receipts)))
        if receipts:
            self.record.pardon_again()
        if found := self.engines.get(engine.actor):
            self.engines[engine.actor] = EngineEntry(found.id, found.node, found.handle, load)

    # ---- what the driver calls ---------------------------------------------------------------------------------------------------

    def begin_round(self, state: LedgerState, is_open: bool) -> None:
        """Begin to ask what this state does not have; `is_open` says that no trial of the first documents is made."""
        self.state, self.owners, self.writing = state, {}, {}
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
        return [entry for entry in self.engines.values() if not entry.load]
