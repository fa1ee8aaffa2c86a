"""Ray starts, on a busy machine at the second try, and leaves the signals to whoever listened before."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from pipeline import cluster
from pipeline.errors import RunError

LATE = Exception("The current node timed out during startup. This could happen because some of the raylet failed to startup")


class Starts:
    """Ray's start, as it goes on machines of several kinds; the real one takes seconds and starts eight processes."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes, self.calls = list(outcomes), list[dict[str, Any]]()

    def __call__(self, **arguments: Any) -> None:
        self.calls.append(arguments)
        signal.signal(signal.SIGTERM, lambda *_: None)  # so does Ray, to end the process where it stands
        if outcome := self.outcomes.pop(0):
            raise outcome


@pytest.fixture(autouse=True)
def listener() -> Iterator[Any]:
    before = signal.signal(signal.SIGTERM, heard := lambda *_: None)
    yield heard
    signal.signal(signal.SIGTERM, before)


def test_the_dashboard_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", starts := Starts(None))
    cluster.start()
    assert starts.calls[0]["include_dashboard"] is False


def test_a_late_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", starts := Starts(LATE, LATE, None))
    cluster.start()
    assert len(starts.calls) == 3


@pytest.mark.parametrize(("outcomes", "said"), [([LATE] * 3, "timed out"), ([ConnectionError("no such cluster")], "no such cluster")])
def test_ray_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch, outcomes: list[Exception | None], said: str) -> None:
    monkeypatch.setattr(ray, "init", Starts(*outcomes))
    with pytest.raises(RunError, match=f"Ray does not start on this machine: .*{said}"):
        cluster.start()


def test_who_listened_to_signals_goes_on_to(monkeypatch: pytest.MonkeyPatch, listener: Any) -> None:
    monkeypatch.setattr(ray, "init", Starts(None))
    cluster.start()
    assert signal.getsignal(signal.SIGTERM) is listener
