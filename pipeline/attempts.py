"""What became of the requests so far -> those that are done, and those that are to be asked once more.

Knows neither files nor documents: an outcome is a row with `key`, `attempt`, `status` and `failure`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import JobError
from pipeline.records import Status

Outcome = Mapping[str, Any]
WRITTEN = re.compile(r"failed(?::(?:(?P<stage>\w+)/)?(?P<kind>\w+))?")


@dataclass(frozen=True)
class Asked:
    """What the ledger says: requests that are not to be asked, and how often those were that are to be asked once more."""

    done: frozenset[str]
    attempts: Mapping[str, int]

    def with_done(self, keys: Set[str]) -> Asked:
        """Return this after some more requests were answered."""
        return replace(self, done=self.done | keys)


@dataclass(frozen=True)
class Retry:
    """Which failures are to be asked once more: those of a stage, of a kind, or all of them."""

    stage: str | None = None
    kind: str | None = None

    @classmethod
    def parse(cls, text: str) -> Retry:
        """Return what `failed`, `failed:KIND` or `failed:STAGE/KIND` says. Raises JobError."""
        found = WRITTEN.fullmatch(text)
        if not found:
            raise JobError(f"retry is {text!r}; allowed are failed, failed:KIND and failed:STAGE/KIND, as in failed:timeout")
        return cls(**found.groupdict())

    def wants(self, outcome: Outcome) -> bool:
        failure = outcome["failure"]
        if outcome["status"] != Status.FAILED:
            return False
        return self.stage in (None, failure["stage"]) and self.kind in (None, failure["kind"])


def newest(attempts: Iterable[Outcome]) -> Outcome:
    """Return the newest successful attempt of a request, or else the newest."""
    return max(attempts, key=lambda row: (row["status"] != Status.FAILED, row["attempt"]))


def asked(outcomes: Iterable[Outcome], retry: Retry | None = None) -> Asked:
    """Return what is done when these failures are to be asked once more."""
    requests: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        requests.setdefault(outcome["key"], []).append(outcome)
    again = {key: max(row["attempt"] for row in attempts) for key, attempts in requests.items() if retry and retry.wants(newest(attempts))}
    return Asked(frozenset(requests.keys() - again.keys()), again)
