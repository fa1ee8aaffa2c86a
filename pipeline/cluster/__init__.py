"""Ray, started on this machine or joined elsewhere: what machines there are. Knows nothing of documents."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.cluster import bundle
from pipeline.errors import JobError, RunError
from pipeline.job.sections import check_cluster_address

LOCAL, AUTO = "local", "auto"
ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What a job server gives to the processes that it starts: their runtime environment."""
DEFAULT_PORTS = {"ray": 10001, "http": 80, "https": 443}
REACHED_S = 10.0
RAY_START_ATTEMPTS = 3
LATE = "Starting Ray client server failed"
"""What Ray says when the process that it starts for whoever comes by `ray://` is late, as it is on a busy machine."""
THREADS_S = 3.0
"""How long Ray Data's threads may take to notice that it is over; one of them only waits, for good and to nobody's harm."""
RAISED = re.compile(r"^((?:\w+\.)*)([A-Z]\w*): (.+)$", re.MULTILINE)
"""The line of a traceback that says what was raised."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@dataclass(frozen=True)
class Resources:
    """What Ray may hand out."""

    cpus: float
    gpus: float
    machines: tuple[tuple[float, float], ...] = ()
    """CPUs and GPUs of each machine; nothing where all are on one."""

    @property
    def per_machine(self) -> tuple[tuple[float, float], ...]:
        return self.machines or ((self.cpus, self.gpus),)


def connect_ray(address: str | None = None) -> Resources:
    """Join the Ray cluster at an address, or start Ray on this machine, and return what there is.

    Without an address the environment's RAY_ADDRESS decides, and `local` starts one whatever it says. Of a Ray that is started
    here the dashboard and job server, which run anyone's code (CVE-2023-48022), stay off. Raises JobError, RunError.
    """
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    import ray

    if not ray.is_initialized():
        if (wanted := address or read_ray_address()) == LOCAL:
            start_ray()
        else:
            join_cluster(wanted)
    return read_resources()


def read_resources() -> Resources:
    """Return what there is now."""
    import ray

    found = ray.cluster_resources()
    machines = (node["Resources"] for node in ray.nodes() if node["Alive"])
    each = tuple((machine.get("CPU", 0.0), machine.get("GPU", 0.0)) for machine in machines)
    return Resources(found.get("CPU", 1.0), found.get("GPU", 0.0), each)


def read_ray_address() -> str:
    """Return the address in RAY_ADDRESS. Raises JobError where that is none."""
    address = os.environ.get("RAY_ADDRESS") or LOCAL
    try:
        check_cluster_address(address)
    except ValueError as error:
        raise JobError(f"the environment's RAY_ADDRESS is {address!r}: {error}") from None
    return address


def is_outside_cluster(address: str | None) -> bool:
    """Say whether the cluster at an address is joined by Ray's client, from outside."""
    import ray

    if ray.is_initialized():
        return bool(ray.util.client.ray.is_connected())
    return (address or read_ray_address()).startswith("ray://")


@contextmanager
def hide_ray_addresses() -> Iterator[None]:
    """Hide from Ray the addresses in the environment, which it prefers to the one that it is given."""
    hidden = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def keep_signal_handlers() -> Iterator[None]:
    """Leave SIGTERM to whoever listened before: Ray would end this process where it stands."""
    listener = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(listener) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, listener)


@hide_ray_addresses()
@keep_signal_handlers()
def start_ray() -> None:
    """Start Ray; again, if the machine is so busy that Ray's own processes miss their deadline of 15 s (ray#65983). Raises RunError."""
    import ray

    for left in reversed(range(RAY_START_ATTEMPTS)):
        try:
            ray.init(LOCAL, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            break
        except Exception as error:  # any: a raylet that is late is a bare Exception
            if not left or "timed out during startup" not in str(error):
                raise RunError(f"Ray does not start on this machine: {error}") from error


@hide_ray_addresses()
@keep_signal_handlers()
def join_cluster(address: str) -> None:
    """Join a Ray cluster that runs already, and take this package to its workers, unless its job server did; again, if it is too busy.

    Raises JobError.
    """
    import ray
    from ray.exceptions import RayError

    check_reachable(address)
    with tempfile.TemporaryDirectory() as folder:
        sent = {} if SUBMITTED in os.environ else {"py_modules": [str(bundle.copy_package(Path(folder)))]}
        for left in reversed(range(RAY_START_ATTEMPTS)):
            try:
                ray.init(address, runtime_env=sent, log_to_driver=False, logging_level=logging.ERROR)
                break
            except (OSError, RuntimeError, ValueError, ImportError, RayError, SystemExit) as error:  # the last is Ray's own SIGTERM
                if not left or LATE not in str(error):
                    raise JobError(f"there is no Ray cluster to join at {address}: {explain_join_error(error)}") from None


def explain_join_error(error: BaseException) -> str:
    """Return why a cluster was not joined."""
    why = " ".join(str(error).split())[:300] if not isinstance(error, SystemExit) else "it does not answer as Ray does"
    return why if os.environ.get("RAY_AUTH_MODE") == "token" else f"{why}; one with a token wants RAY_AUTH_MODE=token and it here, too"


def check_reachable(address: str) -> None:
    """Raise JobError where nobody listens at an address: Ray itself would try for two minutes."""
    place = urlsplit(address if "://" in address else f"//{address}")
    if address == AUTO or place.hostname is None:
        return
    try:
        socket.create_connection((place.hostname, place.port or DEFAULT_PORTS.get(place.scheme, 0)), REACHED_S).close()
    except OSError as error:
        raise JobError(f"nobody answers at {address}: {error.strerror or error}") from None


def read_gcs_address() -> str:
    """Return the address at which the cluster that was joined is joined again."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def make_driver_affinity() -> Any:
    """Return the strategy that keeps an actor on the driver's machine, which a run cannot outlive anyway."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def is_node_alive(node: str | None) -> bool:
    """Say whether a node, by its id, is one of the cluster still."""
    import ray

    return any(found["NodeID"] == node and found["Alive"] for found in ray.nodes())


def stop_ray(threads: Set[threading.Thread]) -> None:
    """Stop Ray, when all threads but these have ended, or had time to: pulled away from under them, it can end this process.

    A driver that is a task itself leaves that to whoever started it.
    """
    import ray

    if ray.is_initialized() and ray.get_runtime_context().get_task_id() is not None:
        return
    deadline = time.monotonic() + THREADS_S
    for thread in set(threading.enumerate()) - threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    ray.shutdown()


def convert_worker_error(error: Exception, sentence: str) -> RunError:
    """Return what a worker raised as the end of this run: its message, or a sentence about it with its traceback as the cause.

    Of a worker's exception only the text comes over from its process.
    """
    from ray.exceptions import RayError

    text = str(error).partition("\nThe above exception was the direct cause")[0].strip()
    module, name, message = (RAISED.findall(text) or [("", "", text.partition("\n")[0])])[-1]
    if module == "pipeline.errors.":
        return RunError(message)
    broken = RunError(sentence.format(f"{name}: {message}".removeprefix(": ")[:300]))
    broken.__cause__ = RayError(text)
    return broken
