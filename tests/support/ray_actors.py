"""Engine actors for runs without a model, and what lets them run in Ray's workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

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


class Method:
    """A method of an actor, called in this process."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def remote(self, *arguments: Any) -> Any:
        outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if asyncio.iscoroutine(result := self.method(*arguments)):
            return asyncio.ensure_future(result)
        outcome.set_result(result)
        return outcome


class LocalActor:
    """An actor's handle for an object of this process."""

    def __init__(self, target: object) -> None:
        self.target = target

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self.target, name))


def pickle_tests_by_value() -> None:
    """Send classes and functions of `tests/` to Ray's workers by value: the workers do not find this folder on their path."""
    ray.cloudpickle.register_pickle_by_value(tests)
