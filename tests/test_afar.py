"""Work within a cluster is heard from outside. `test_submit.py` does it by Ray's client; here the cluster is this machine's."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import pytest
import ray

from pipeline import afar, events
from pipeline.errors import JobError
from pipeline.report import Report

pytestmark = pytest.mark.usefixtures("ray_session")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers do not find the tests


def work(name: str, on_progress: Callable[[int], None] | None = None) -> Report:
    """Count to three, aloud."""
    for number in range(1, 4):
        events.event("counted", number=number)
        if on_progress:
            on_progress(number)
    if name == "wrong":
        raise JobError("there is no such job")
    return Report(name, "out", "demo", True)


def test_what_happens_there_is_heard_here(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[int] = []
    with caplog.at_level(logging.INFO, logger="pipeline.events"):
        assert afar.done(work, {"name": "right"}, {"on_progress": heard.append}).job == "right"
    assert heard[-1] == 3
    assert [(record.msg, vars(record)["facts"]) for record in caplog.records] == [("counted", {"number": number}) for number in (1, 2, 3)]


def test_what_is_wrong_there_is_wrong_here() -> None:
    with pytest.raises(JobError, match="there is no such job"):
        afar.done(work, {"name": "wrong"}, {"on_progress": None})
