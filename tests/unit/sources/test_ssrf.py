"""Which addresses are public, and that look-ups and connections end in time. Refusals over a real connection: test_http.py."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from pipeline.sources import ssrf


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    "address",
    "0.0.0.0 10.1.2.3 100.64.0.1 100.100.100.200 127.0.0.1 127.9.9.9 168.63.129.16 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.192 "
    "192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 "
    ":: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:a9fe:a9fe ::ffff:0:10.0.0.1 64:ff9b::10.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b:1::1.1.1.1 "
    "100::1 2001::1 2001:db8::1 2002:7f00:1:: 2002:a9fe:a9fe:: 2002:808:808:: 3fff::1 5f00::1 "
    "fc00::1 fd00:ec2::254 fe80::1 fec0::1 ff02::1".split(),
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not ssrf.is_public_address(ip_address(address))


@pytest.mark.parametrize(
    "address",
    "1.1.1.1 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 172.15.0.1 172.32.0.1 192.0.1.1 198.17.0.1 198.20.0.1 223.255.255.255 "
    "::ffff:1.1.1.1 64:ff9b::1.1.1.1 2001:4860:4860::8888 2606:4700::1111 2a00:1450::1".split(),
)
def test_addresses_that_are_public(address: str) -> None:
    assert ssrf.is_public_address(ip_address(address))


def test_after_an_unreachable_address_the_next_one_is_tried(port: int) -> None:
    found = [(socket.AF_INET6, ("::1", 0, 0, 0)), (socket.AF_INET, ("127.0.0.1", port))]
    with ssrf.dial_addresses(found, time.monotonic() + 20) as connection:
        assert connection.getpeername() == ("127.0.0.1", port)


def test_no_address_at_all_is_an_error() -> None:
    with pytest.raises(OSError, match="no address"):
        ssrf.dial_addresses([], time.monotonic() + 20)


def test_after_the_deadline_nothing_is_connected_to(port: int) -> None:
    with pytest.raises(TimeoutError):
        ssrf.dial_addresses([(socket.AF_INET, ("127.0.0.1", port))], time.monotonic())


def test_a_silent_name_server_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: stopped.wait() and [])
    with pytest.raises(TimeoutError):
        ssrf.look_up_host("files.example", 80, time.monotonic() + 0.3)
    stopped.set()


@pytest.mark.parametrize("error", [socket.gaierror(socket.EAI_NONAME, "unknown"), UnicodeError("label too long")])
def test_an_error_of_the_look_up_is_raised(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def look_up(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(type(error)):
        ssrf.look_up_host("files.example", 80, time.monotonic() + 20)
