"""Engine actors for runs without a model, and what lets them run in Ray's workers."""

from __future__ import annotations

import ray

import tests
from pipeline.engines import Engine
from pipeline.flow import ask_pass
from pipeline.job import Job
from tests.support.engines import InkEngine


class InkActor(ask_pass.EngineActor):
    """Loads the engine that counts dark pixels."""

    def load(self, job: Job, threads: int) -> Engine:
        return InkEngine()


def pickle_tests_by_value() -> None:
    """Send classes and functions of `tests/` to Ray's workers by value: the workers do not find this folder on their path."""
    ray.cloudpickle.register_pickle_by_value(tests)
