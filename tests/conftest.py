"""What tests are given: a desk to work at, and one Ray for all tests that need it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import Desk
from hypothesis import settings

from pipeline import cluster

settings.register_profile("tests", derandomize=True, deadline=None)
settings.load_profile("tests")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[cluster.Resources]:
    """Start Ray once: seconds that each test would have to wait for otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray leaves the log files of the processes it starts to the garbage collector
        resources = cluster.connect()
    yield resources
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.shutdown()
