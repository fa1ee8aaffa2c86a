"""Engine actors for runs that load no model. Ray's workers do not find the tests: what goes to them from here goes by value."""

from __future__ import annotations

import sys

import ray

from pipeline.engines import Engine
from pipeline.flow import ask_pass
from pipeline.job import Job
from tests.support import workspace
from tests.support.engines import InkEngine


class InkActor(ask_pass.EngineActor):
    """Has each page answered by its ink."""

    def load(self, job: Job, threads: int) -> Engine:
        return InkEngine()


def pickle_by_value(module: str) -> None:
    """Let the classes of a test's module, by its `__name__`, go to Ray's workers."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[module])


for name in (__name__, workspace.__name__):
    pickle_by_value(name)
