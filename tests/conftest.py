"""Fixtures of all tests: a workspace, one Ray and one server of each kind per session; and a marker for each folder."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from pipeline import cluster
from pipeline.engines.model_files import DEMO_CHECKPOINT
from tests.support import azure, buckets, gcs, s3
from tests.support.vllm_server import serve_vllm
from tests.support.workspace import PASSWORD, Workspace

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and processes that tests start would, too
settings.register_profile("tests", derandomize=True, deadline=None)
settings.load_profile("tests")
FOLDER = Path(__file__).parent
FOLDERS = ("unit", "engines", "processes", "terminal", "ray", "vllm")
"""In this order: the quick ones first, and Ray, once it has been started, disturbs no others."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with the name of its folder, and sort them by folder; a file directly in `tests/` has unit tests."""
    for item in items:
        item.add_marker(get_folder(item))
    items.sort(key=lambda item: FOLDERS.index(get_folder(item)))


def get_folder(item: pytest.Item) -> str:
    folder = item.path.relative_to(FOLDER).parts[0]
    return folder if folder in FOLDERS else "unit"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


@dataclass(frozen=True)
class StoreEnvironment:
    """Where the tests' object stores are, for this process and Ray's workers: a file that is written when S3's server starts, and ports."""

    aws_config: Path
    gcs_port: int
    azure_port: int


@pytest.fixture(scope="session")
def store_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreEnvironment]:
    """Configure all object stores; their servers start when a test needs them."""
    with pytest.MonkeyPatch.context() as patch:
        config = s3.isolate_environment(patch, tmp_path_factory.mktemp("aws"))
        environment = StoreEnvironment(config, buckets.find_free_port(), buckets.find_free_port())
        gcs.isolate_environment(patch, environment.gcs_port)
        azure.isolate_environment(patch, environment.azure_port)
        yield environment


@pytest.fixture(scope="session")
def bucket(store_environment: StoreEnvironment) -> Iterator[s3.Bucket]:
    """Start an S3 server once."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with s3.serve_bucket(store_environment.aws_config) as made:
        yield made


@pytest.fixture(scope="session")
def gcs_bucket(store_environment: StoreEnvironment) -> Iterator[gcs.Bucket]:
    """Start an emulator of Google Cloud Storage once."""
    pytest.importorskip("gcp_storage_emulator")
    pytest.importorskip("gcsfs")
    with gcs.serve_bucket(store_environment.gcs_port) as made:
        yield made


@pytest.fixture(scope="session")
def azure_bucket(store_environment: StoreEnvironment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[azure.Bucket]:
    """Start an emulator of Azure Blob Storage once."""
    pytest.importorskip("adlfs")
    program = buckets.require_program("azurite-blob")
    with azure.serve_bucket(program, store_environment.azure_port, tmp_path_factory.mktemp("azurite")) as made:
        yield made


@pytest.fixture(scope="session", params=buckets.SCHEMES)
def any_bucket(request: pytest.FixtureRequest) -> buckets.Bucket:
    """Each of the object stores."""
    return buckets.start_bucket(request, request.param)


@pytest.fixture(scope="session")
def vllm_server() -> Iterator[str]:
    """Start vLLM's server with the demonstration model once; it takes a minute."""
    with serve_vllm(DEMO_CHECKPOINT) as address:
        yield address


@pytest.fixture(scope="session")
def ray_session(store_environment: StoreEnvironment) -> Iterator[cluster.Resources]:
    """Start Ray once; it takes seconds."""
    import ray

    from tests.support.ray_actors import pickle_tests_by_value

    pickle_tests_by_value()
    patch = pytest.MonkeyPatch()
    patch.setenv("SLIP_PASSWORD", PASSWORD)  # Ray's workers have the environment that it was started in
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray leaves the log files of the processes it starts to the garbage collector
        resources = cluster.connect_ray()
    yield resources
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.shutdown()
    patch.undo()
