"""Engine actors for runs that load no model. Ray's workers do not find the tests: what goes to them from here goes by value."""

from __future__ import annotations

import sys

import desk
import ray
from desk import Ink

from pipeline import asking
from pipeline.engines import Engine
from pipeline.job import Job


class Quick(asking.Asker):
    """Has each page answered by its ink."""

    def load(self, job: Job, threads: int) -> Engine:
        return Ink()


def by_value(module: str) -> None:
    """Let the classes of a test's module, by its `__name__`, go to Ray's workers."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[module])


for name in (__name__, desk.__name__):
    by_value(name)
