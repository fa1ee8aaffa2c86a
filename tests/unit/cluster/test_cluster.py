"""Ray is started, on a busy machine at the second attempt, or a cluster is joined; signal handlers stay as they were.

`test_submit.py` joins a real cluster.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline import cluster
from pipeline.errors import JobError, RunError

LATE = Exception("The current node timed out during startup. This could happen because some of the raylet failed to startup")


class Starts:
    """Ray's start, as it goes on machines of several kinds; the real one takes seconds and starts eight processes."""

    def __init__(self, *outcomes: BaseException | None) -> None:
        self.outcomes, self.calls = list(outcomes), list[dict[str, Any]]()

    def __call__(self, address: str, **arguments: Any) -> None:
        seen = {name: os.environ.get(name) for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        self.calls.append(arguments | {"address": address} | seen)
        signal.signal(signal.SIGTERM, lambda *_: None)  # so does Ray, to end the process where it stands
        if outcome := self.outcomes.pop(0):
            raise outcome


@pytest.fixture(autouse=True)
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Ray's nodes, as they are where it listens on loopback, and the address at which it does."""
    found = [{"NodeManagerAddress": "127.0.0.1"}]
    monkeypatch.setattr(ray, "nodes", lambda: found)
    monkeypatch.setattr(cluster, "read_gcs_address", lambda: "127.0.0.1:6379")
    return found


@pytest.fixture(autouse=True)
def listener() -> Iterator[Any]:
    before = signal.signal(signal.SIGTERM, handler := lambda *_: None)
    yield handler
    signal.signal(signal.SIGTERM, before)


def test_the_dashboard_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", starts := Starts(None))
    cluster.start_ray()
    assert starts.calls[0]["include_dashboard"] is False


@pytest.mark.parametrize("before", [{}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "c" * 32}])
def test_each_start_has_a_token_of_its_own_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch, before: dict[str, str]) -> None:
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    for name in names:
        monkeypatch.setenv(name, before[name]) if name in before else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray, "init", starts := Starts(LATE, None))
    cluster.start_ray()
    assert [call["RAY_AUTH_MODE"] for call in starts.calls] == ["token", "token"]
    assert len({call["RAY_AUTH_TOKEN"] for call in starts.calls} | {before.get("RAY_AUTH_TOKEN")}) == 3
    assert {name: os.environ[name] for name in names if name in os.environ} == before


def test_a_ray_that_other_machines_reach_is_stopped(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, str]]) -> None:
    nodes[0]["NodeManagerAddress"] = "192.0.2.2"
    stopped: list[bool] = []
    monkeypatch.setattr(ray, "init", Starts(None))
    monkeypatch.setattr(ray, "shutdown", lambda: stopped.append(True))
    with pytest.raises(RunError, match=r"listens on 192\.0\.2\.2 in place of loopback"):
        cluster.start_ray()
    assert stopped == [True]


def test_a_late_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", starts := Starts(LATE, LATE, None))
    cluster.start_ray()
    assert len(starts.calls) == 3


@pytest.mark.parametrize(("outcomes", "said"), [([LATE] * 3, "timed out"), ([ConnectionError("no such cluster")], "no such cluster")])
def test_ray_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch, outcomes: list[Exception | None], said: str) -> None:
    monkeypatch.setattr(ray, "init", Starts(*outcomes))
    with pytest.raises(RunError, match=f"Ray does not start on this machine: .*{said}"):
        cluster.start_ray()


class Stopped(BaseException):
    """What a process's own handler of SIGTERM raises."""


def test_a_signal_that_comes_while_ray_starts_reaches_the_handler_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise Stopped

    def start(*_: object, **__: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # so does Ray
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(Stopped):
        cluster.start_ray()
    assert signal.getsignal(signal.SIGTERM) is stop


def test_the_signal_handler_stays(monkeypatch: pytest.MonkeyPatch, listener: Any) -> None:
    monkeypatch.setattr(ray, "init", Starts(None))
    cluster.start_ray()
    assert signal.getsignal(signal.SIGTERM) is listener


@pytest.fixture
def listening_address() -> Iterator[str]:
    """Return the address of a server that accepts connections and sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_cluster_is_joined_and_given_this_package(monkeypatch: pytest.MonkeyPatch, listening_address: str) -> None:
    monkeypatch.setattr(ray, "init", starts := Starts(None))
    cluster.join_cluster(listening_address)
    assert starts.calls[0]["address"] == listening_address
    environment = starts.calls[0]["runtime_env"]
    assert ([Path(module).name for module in environment["py_modules"]], environment["excludes"]) == (["pipeline"], ["__pycache__"])


def test_what_a_job_server_started_has_the_package_already(monkeypatch: pytest.MonkeyPatch, listening_address: str) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setattr(ray, "init", starts := Starts(None))
    cluster.join_cluster(listening_address)
    assert starts.calls[0]["runtime_env"] is None


@pytest.mark.parametrize("act", [cluster.start_ray, lambda: cluster.join_cluster("auto")])
def test_the_environments_address_does_not_overrule_the_one_given(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    monkeypatch.setattr(ray, "init", starts := Starts(None))
    act()
    assert (starts.calls[0]["RAY_ADDRESS"], os.environ["RAY_ADDRESS"]) == (None, "elsewhere:6379")


@pytest.mark.parametrize(
    ("given", "environment", "chosen"),
    [
        (None, None, "start"),
        (None, "", "start"),
        (None, "local", "start"),
        (None, "head:6379", "join head:6379"),
        ("auto", "head:6379", "join auto"),
        ("local", "head:6379", "start"),
    ],
)
def test_the_job_comes_before_the_environment(
    monkeypatch: pytest.MonkeyPatch, given: str | None, environment: str | None, chosen: str
) -> None:
    said: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(cluster, "start_ray", lambda: said.append("start"))
    monkeypatch.setattr(cluster, "join_cluster", lambda address: said.append(f"join {address}"))
    monkeypatch.setenv("RAY_ADDRESS", environment) if environment is not None else monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster.connect_ray(given)
    assert said == [chosen]


def test_ray_client_is_refused_with_the_way_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(
        JobError, match=r"a cluster cannot be joined by ray://; `pipeline submit --address http://HEAD:8265` starts a run on it"
    ):
        cluster.read_ray_address()


def test_an_address_in_the_environment_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(JobError, match=r"RAY_ADDRESS is 'http://head:8265': an http\(s\) address is a cluster's job server"):
        cluster.read_ray_address()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:1", "no-such-host.invalid:6379"])
def test_an_address_at_which_nothing_listens_is_refused_at_once(address: str) -> None:
    with pytest.raises(JobError, match=f"nothing answers at {address}: "):
        cluster.check_reachable(address)


@pytest.mark.parametrize("error", [ConnectionError("no raylet"), RuntimeError("no raylet"), SystemExit(15)])
def test_a_cluster_that_cannot_be_joined_is_an_error(monkeypatch: pytest.MonkeyPatch, listening_address: str, error: BaseException) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(ray, "init", Starts(error))
    with pytest.raises(
        JobError, match=f"no Ray cluster to join at {listening_address}: (no raylet|it does not answer as Ray does); one with a token"
    ):
        cluster.join_cluster(listening_address)
