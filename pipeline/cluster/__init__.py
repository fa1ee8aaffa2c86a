"""Ray: starts it on this machine or joins a cluster, says what machines there are, and stops it. An address comes in, resources go out."""

from __future__ import annotations

import atexit
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import JobError, RunError
from pipeline.scratch import PRIVATE_UMASK, open_scratch_folder

LOCAL, AUTO = "local", "auto"
PACKAGE = Path(__file__).parents[1]
"""This package, which Ray sends to the machines of a cluster that lack it: 7 MiB, nearly all of them the demonstration model."""
EXCLUDED = ["__pycache__"]
"""What is not sent with it, in the syntax of .gitignore."""
ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by a job server in the processes that it starts: their runtime environment."""
AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
DEFAULT_PORTS = {"http": 80, "https": 443}
DEVICES = Path("/dev")
"""Where Linux shows GPUs: `nvidia0`, AMD's as `kfd`, those of Windows as `dxg`."""
REACHED_S = 10.0
RAY_START_ATTEMPTS = 3
THREADS_S = 3.0
"""How long Ray Data's threads may take to end."""
IDLE_THREAD = "Prefetcher"
"""Name of a daemon thread of Ray Data that waits for work and never ends; this is harmless."""
STOPPED = "the run stopped: {}; run the same command again to resume it"
RAISED = re.compile(r"^((?:\w+\.)*)([A-Z]\w*): (.+)$", re.MULTILINE)
"""The line of a traceback that says what was raised."""
UNNEEDED_STARTS = ("start_monitor", "start_log_monitor", "start_api_server")
"""Methods of Ray's `Node` that start what serves a cluster that grows, a log on the terminal, and a dashboard."""
STARTED: set[str] = set()
"""Address of the Ray that this process started and has not stopped."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs of a cluster."""

    cpus: float
    gpus: float
    machines: tuple[tuple[float, float], ...] = ()
    """CPUs and GPUs of each machine; empty where there is one."""

    @property
    def per_machine(self) -> tuple[tuple[float, float], ...]:
        return self.machines or ((self.cpus, self.gpus),)


def connect_ray(address: str | None = None) -> Resources:
    """Join the Ray cluster at an address, or start Ray on this machine, and return what there is.

    Without an address RAY_ADDRESS decides; `local` starts Ray whatever that says. A Ray that is started here is closed to others,
    because Ray runs anyone's code (CVE-2023-48022): see `close_local_ray`. Raises JobError, RunError.
    """
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    import ray

    if not ray.is_initialized():
        if (wanted := address or read_ray_address()) == LOCAL:
            start_ray()
            STARTED.add(read_gcs_address())
        else:
            join_cluster(wanted)
    return read_resources()


def is_ray_connected() -> bool:
    """Say whether this process has started or joined Ray; does not import it."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def read_resources() -> Resources:
    """Return what the cluster has now."""
    import ray

    found = ray.cluster_resources()
    machines = (node["Resources"] for node in ray.nodes() if node["Alive"])
    each = tuple((machine.get("CPU", 0.0), machine.get("GPU", 0.0)) for machine in machines)
    return Resources(found.get("CPU", 1.0), found.get("GPU", 0.0), each)


def may_have_gpus(address: str | None) -> bool:
    """Say, without starting or joining Ray, whether it might have a GPU: a cluster might, this machine if it shows a device of one.

    Raises JobError for a RAY_ADDRESS that cannot be joined.
    """
    if (address or read_ray_address()) != LOCAL:
        return True
    return any(file.name.startswith("nvidia") or file.name in ("kfd", "dxg") for file in DEVICES.iterdir())


def read_ray_address() -> str:
    """Return the address in RAY_ADDRESS, by default `local`. Raises JobError for one that cannot be joined."""
    from pipeline.job.sections import check_cluster_address  # not for the registry's process, which needs little of this

    address = os.environ.get("RAY_ADDRESS") or LOCAL
    try:
        check_cluster_address(address)
    except ValueError as error:
        raise JobError(f"the environment's RAY_ADDRESS is {address!r}: {error}") from None
    return address


@contextmanager
def hide_ray_addresses() -> Iterator[None]:
    """Hide the addresses in the environment from Ray, which prefers them to its argument."""
    hidden = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def keep_signal_handlers() -> Iterator[None]:
    """Restore the SIGTERM handler that Ray replaces by one that ends the process at once, and call it if the signal came meanwhile."""
    listener = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # raised by Ray's handler
        if callable(listener):
            listener(signal.SIGTERM, None)
        raise
    finally:
        if callable(listener) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, listener)


@contextmanager
def close_local_ray() -> Iterator[None]:
    """Have the Ray that is started in the block serve this run alone, whatever the environment and Ray's defaults say.

    All its ports listen on loopback; a random token of its own guards them (Ray 2.52 and newer), which stands in the environment of its
    processes and nowhere else; what its processes write is private. Afterwards the environment of this process is as it was.
    """
    from ray._private import ray_constants  # Ray has no public way to listen on loopback: it replaces 127.0.0.1 by another address

    own = {AUTH_MODE: "token", AUTH_TOKEN: secrets.token_hex(32), "TMPDIR": str(open_scratch_folder())}
    before = {name: os.environ.get(name) for name in (*own, AUTH_TOKEN_FILE)}
    os.environ.pop(AUTH_TOKEN_FILE, None)
    os.environ.update(own)
    is_cluster_wanted, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    umask = os.umask(PRIVATE_UMASK)
    try:
        reload_ray_token()
        yield
    finally:
        os.umask(umask)
        ray_constants.ENABLE_RAY_CLUSTER = is_cluster_wanted
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def skip_unneeded_processes() -> Iterator[None]:
    """Have the Ray that is started in the block do without three Python processes that no run on one machine needs.

    They take 2 CPU seconds, and Ray waits for the last; it has an option for none of them (`include_dashboard=False` starts a small one).
    """
    from ray._private.node import Node

    methods = {name: getattr(Node, name) for name in UNNEEDED_STARTS}
    for name in UNNEEDED_STARTS:
        setattr(Node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(Node, name, method)


def reload_ray_token() -> None:
    """Have Ray read its token from the environment again; it keeps the one that it read first."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled, without type stubs

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@hide_ray_addresses()
@keep_signal_handlers()
def start_ray() -> None:
    """Start Ray, closed to others; again, if the machine is so busy that its processes miss their deadline of 15 s (ray#65983).

    Raises RunError, also where Ray listens on an address that other machines reach.
    """
    import ray

    try:
        folder = open_scratch_folder() / "ray"  # Ray makes its folders 0777, whatever the umask: this one keeps others out
    except OSError as error:
        raise RunError(f"there is no folder for temporary files: {error.strerror or error}; set TMPDIR to one") from None
    for left in reversed(range(RAY_START_ATTEMPTS)):
        try:
            with close_local_ray(), skip_unneeded_processes():
                ray.init(LOCAL, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, _temp_dir=str(folder))
            break
        except Exception as error:  # any: a raylet that is late is a bare Exception
            if not left or "timed out during startup" not in str(error):
                raise RunError(f"Ray does not start on this machine: {error}") from error
    if open_to := [found for node in ray.nodes() if not ip_address(found := node["NodeManagerAddress"]).is_loopback]:
        ray.shutdown()
        raise RunError(f"Ray {ray.__version__} listens on {open_to[0]} in place of loopback: install a version that pyproject.toml allows")


@hide_ray_addresses()
@keep_signal_handlers()
def join_cluster(address: str) -> None:
    """Join a running cluster, and send this package to its workers unless a job server has done so. Raises JobError."""
    import ray
    from ray.exceptions import RayError

    check_reachable(address)
    reload_ray_token()  # a Ray that was started here before had another one
    environment = None if SUBMITTED in os.environ else {"py_modules": [str(PACKAGE)], "excludes": EXCLUDED}
    try:
        ray.init(address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ImportError, RayError, SystemExit) as error:  # Ray raises the last on its own SIGTERM
        raise JobError(f"there is no Ray cluster to join at {address}: {explain_join_error(error)}", key="ray.address") from None


def explain_join_error(error: BaseException) -> str:
    """Return why joining a cluster failed."""
    why = " ".join(str(error).split())[:300] if not isinstance(error, SystemExit) else "it does not answer as Ray does"
    return why if os.environ.get(AUTH_MODE) == "token" else f"{why}; one with a token wants RAY_AUTH_MODE=token and it here, too"


def check_reachable(address: str) -> None:
    """Raise JobError where nothing listens at an address: Ray itself would try for two minutes."""
    place = urlsplit(address if "://" in address else f"//{address}")
    if address == AUTO or place.hostname is None:
        return
    try:
        socket.create_connection((place.hostname, place.port or DEFAULT_PORTS.get(place.scheme, 0)), REACHED_S).close()
    except OSError as error:
        raise JobError(f"nothing answers at {address}: {error.strerror or error}") from None


def read_gcs_address() -> str:
    """Return the address of the cluster that this process is connected to."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def make_driver_affinity() -> Any:
    """Return the strategy that keeps an actor on the driver's machine, which a run cannot outlive anyway."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def is_started_here() -> bool:
    """Say whether the Ray that this process is connected to was started by it, for one run."""
    return read_gcs_address() in STARTED


def is_node_alive(node: str | None) -> bool:
    """Say whether a node, by its id, is alive."""
    import ray

    return any(found["NodeID"] == node and found["Alive"] for found in ray.nodes())


def stop_ray(threads: Set[threading.Thread]) -> None:
    """Stop Ray once all threads but these have ended, or had `THREADS_S` to: stopping it under a running thread can end this process.

    Those that list documents call nothing of Ray.
    """
    import ray

    from pipeline.sources import LISTING_THREAD  # not for the registry's process, which needs little of this

    deadline = time.monotonic() + THREADS_S
    for thread in {thread for thread in threading.enumerate() if not thread.name.startswith((IDLE_THREAD, LISTING_THREAD))} - threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    ray.shutdown()
    STARTED.clear()
    if helpers := sys.modules.get(f"{__name__}.helper_actors"):
        helpers.restore_helper_actors()
    reload_ray_token()  # the next Ray of this process has another than one that was started here


def exit_without_destructors() -> None:
    """Have this process exit with os._exit after Ray's atexit handler; its C++ destructors can deadlock (Ray 2.60, on a busy machine)."""
    atexit.register(os._exit, 0)


def convert_worker_error(error: Exception, sentence: str) -> RunError:
    """Return a worker's exception as a RunError: its own message if it is this package's, else the sentence with the traceback as cause.

    Only the text of a worker's exception comes over from its process.
    """
    from ray.exceptions import RayError

    text = str(error).partition("\nThe above exception was the direct cause")[0].strip()
    module, name, message = (RAISED.findall(text) or [("", "", text.partition("\n")[0])])[-1]
    if module == "pipeline.errors.":
        return RunError(message)
    broken = RunError(sentence.format(f"{name}: {message}".removeprefix(": ")[:300]))
    broken.__cause__ = RayError(text)
    return broken
