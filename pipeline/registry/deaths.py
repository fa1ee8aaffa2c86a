"""Deaths of engines: which request they count for, and how often an engine was replaced."""

from __future__ import annotations

from typing import NamedTuple

WITHOUT_REASON = "its process ended without a message"


class EngineId(NamedTuple):
    """One process of an engine actor, which keeps its actor's id when it is replaced."""

    actor: str
    pid: int


class DeathRecord:
    """How engines died, and how often: the deaths of requests asked alone do not count against the engine."""

    MAX_PARDONS = 3
    """Deaths of requests asked alone that do not count, as long as no request is answered in between: an engine that dies of every
    request is broken itself."""

    def __init__(self) -> None:
        self.alone: dict[EngineId, str] = {}
        """The request that an engine has with no other; those that wait for it to end are under way, but not to blame."""
        self.reasons: dict[EngineId, str | None] = {}
        """Why engines died; None for an end that counts for no request."""
        self.pardons, self.replaced, self.last_reason = 0, 0, WITHOUT_REASON

    def begin_alone(self, engine: EngineId, key: str) -> None:
        """Note that a request is asked with no other."""
        self.alone[engine] = key

    def end_alone(self, engine: EngineId) -> None:
        """Note that this request is answered."""
        self.alone.pop(engine, None)

    def record_death(self, engine: EngineId, reason: str) -> None:
        """Keep why an engine died."""
        self.reasons.setdefault(engine, reason)

    def forget(self, engine: EngineId) -> None:
        """Note the end of a process that counts for no request: its machine has gone, or it had nothing to do."""
        self.reasons.setdefault(engine, None)

    def is_known(self, engine: EngineId) -> bool:
        """Say whether it is known how an engine died."""
        return engine in self.reasons

    def judge(self, engine: EngineId, key: str) -> tuple[bool, str]:
        """Return whether the death of an engine counts for a request that it had, and why it died."""
        reason = self.reasons.get(engine)
        return reason is not None and self.alone.get(engine, key) == key, reason or ""

    def count_replacement(self, dead: EngineId) -> tuple[int, str]:
        """Count an engine that replaces a dead one; return how many there were, pardoned ones left out, and why the last one died."""
        self.record_death(dead, WITHOUT_REASON)
        self.last_reason = self.reasons[dead] or self.last_reason
        if dead in self.alone and self.pardons < self.MAX_PARDONS:
            self.pardons += 1
        else:
            self.replaced += 1
        return self.replaced, self.last_reason

    def pardon_again(self) -> None:
        """Note that requests were answered."""
        self.pardons = 0
