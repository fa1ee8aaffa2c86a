"""Work for a cluster that is joined from outside (`ray://`) -> the same work as a task within it, watched from here.

Ray Data needs a process of the cluster for its driver, which Ray's client is not: it fails there for want of a core worker.
Knows nothing of what the work does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline import cluster, events
from pipeline.errors import PipelineError
from pipeline.report import Report

POLL_S = 1.0
STOP_S = 60.0
"""How long work that is stopped may take to write what it has."""
Listeners = dict[str, Callable[[Any], None] | None]


@ray.remote(num_cpus=0)
class Mailbox:
    """Where the work writes what it has to tell, the newest of each kind and all events, for who looks from outside."""

    def __init__(self) -> None:
        self.newest, self.events = dict[str, Any](), list[tuple[str, dict[str, Any]]]()

    def put(self, kind: str, word: Any) -> None:
        self.newest[kind] = word

    def note(self, name: str, facts: dict[str, Any]) -> None:
        self.events.append((name, facts))

    def hear(self) -> None:
        """Return when all has come that was told before."""

    def take(self) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
        taken, self.newest, self.events = (self.newest, self.events), {}, []
        return taken


def run_in_cluster(work: Callable[..., Report], given: dict[str, Any], listened: list[str], with_events: bool, board: Any) -> Report:
    """The task within the cluster: do the work, and tell the board what is listened to."""

    def told(kind: str) -> Callable[[Any], None]:
        return lambda word: board.put.remote(kind, word)

    try:
        with events.attach_handler(events.CallbackHandler(board.note.remote)) if with_events else nullcontext():
            return work(**given, **{kind: told(kind) for kind in listened})
    finally:
        ray.get(board.hear.remote())


def run_remotely(work: Callable[..., Report], given: dict[str, Any], listeners: Listeners) -> Report:
    """Do some work within the cluster and return its report; listeners hear here, if late, what it tells them there.

    Raises the PipelineError that the work raises, and RunError when its process dies. An interrupt ends the work as well.
    """
    listened = {kind: listen for kind, listen in listeners.items() if listen}
    board = cast(Any, Mailbox).remote()
    doing = ray.remote(num_cpus=0, max_retries=0)(run_in_cluster).remote(work, given, list(listened), events.are_heard(), board)
    try:
        over = False
        while not over:
            over = bool(ray.wait([doing], timeout=POLL_S)[0])
            words, happened = ray.get(board.take.remote())
            for kind, word in words.items():
                listened[kind](word)
            for name, facts in happened:
                events.emit_event(name, **facts)
        return ray.get(doing)
    except RayError as error:
        raise convert_remote_error(error) from error
    except KeyboardInterrupt:
        ray.cancel(doing)
        ray.wait([doing], timeout=STOP_S)
        raise


def convert_remote_error(error: RayError) -> PipelineError:
    """Return what the work raised, or that its process is gone."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, PipelineError):
        return error.cause
    return cluster.convert_worker_error(error, "the run stopped: {}; run the same command again to resume it")
