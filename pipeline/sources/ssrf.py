"""A host and a port -> a connection to a public address of that host. Knows not what is said over it.

Whoever names a host shall not reach the network that this runs in. So a name is looked up once, every address it has is
checked, and the connection goes to an address that was checked, whatever the name means a moment later. Certificates
are checked against the name. Everything has a deadline, also what the system's own calls have none for.
"""

from __future__ import annotations

import socket
import ssl
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from pipeline.deadline import compute_time_left
from pipeline.errors import DocumentError

ADDRESS_CONNECT_S = 10.0
"""For one address of several, so that one that is dead leaves time for the next."""

# Own tables, from IANA's registries of special-purpose addresses: Python's `is_global` took 6to4 for public before 3.11.10,
# and still takes 10.0.0.1 behind NAT64 and 168.63.129.16 for it.
NOT_PUBLIC_4 = tuple(
    ip_network(net)
    for net in (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 "
        "192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 "
        "168.63.129.16/32"  # Azure's host, from within its virtual machines
    ).split()
)
PUBLIC_6 = ip_network("2000::/3")
"""All that has been given out; loopback, link-local, unique local, site-local and multicast addresses are not in it."""
NOT_PUBLIC_6 = tuple(ip_network(net) for net in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))
"""Teredo and other protocols' own, documentation, 6to4, documentation."""
NAT64 = ip_network("64:ff9b::/96")

Address = tuple[Any, ...]
"""What a socket connects to: an address and a port, for IPv6 two numbers more."""


def connect_checked(host: str, port: int, secure: bool, allow_private: bool, deadline: float) -> socket.socket:
    """Return a connection to an address that was checked; a secure one speaks TLS and has shown a certificate for the name.

    Raises DocumentError `refused` for an address that is not public, TimeoutError, and OSError.
    """
    found = look_up_host(host, port, deadline)
    for _, (address, *_) in found:
        if not allow_private and not is_public_address(ip_address(address.partition("%")[0])):
            lets_in = "`source.allow_private: true` lets it in"
            raise DocumentError("refused", f"{host} has the address {address}, which is not public; {lets_in}")
    connection = dial_addresses(found, deadline)
    if not secure:
        return connection
    with connection:  # which is empty once the other has taken it over
        connection.settimeout(compute_time_left(deadline))
        return make_tls_context().wrap_socket(connection, server_hostname=host, suppress_ragged_eofs=False)


def is_public_address(address: IPv4Address | IPv6Address) -> bool:
    """Say whether an address is anyone's on the internet. One that embeds another is as public as that."""
    if isinstance(address, IPv4Address):
        return not any(address in net for net in NOT_PUBLIC_4)
    if address.ipv4_mapped or address in NAT64:
        return is_public_address(IPv4Address(int(address) & 0xFFFFFFFF))
    return address in PUBLIC_6 and not any(address in net for net in NOT_PUBLIC_6)


def look_up_host(host: str, port: int, deadline: float) -> list[tuple[int, Address]]:
    """Return the addresses of a host. In a thread of its own, for the system's look-up knows no deadline."""
    answers: SimpleQueue[Any] = SimpleQueue()

    def wait() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    Thread(target=wait, daemon=True).start()
    try:
        found = answers.get(timeout=compute_time_left(deadline))
    except Empty:
        raise TimeoutError from None
    if isinstance(found, Exception):
        raise found
    return [(family, address) for family, _, _, _, address in found]


def dial_addresses(found: list[tuple[int, Address]], deadline: float) -> socket.socket:
    """Return a connection to the first of these addresses that takes one."""
    problem = OSError("its name has no address")
    for family, address in found:
        try:
            return connect_address(family, address, min(compute_time_left(deadline), ADDRESS_CONNECT_S))
        except OSError as error:
            problem = error
    raise problem


def connect_address(family: int, address: Address, timeout_s: float) -> socket.socket:
    """Return a connection to an address, without looking anything up."""
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


@cache
def make_tls_context() -> ssl.SSLContext:
    """Return how this process checks certificates: against the system's, or those of SSL_CERT_FILE."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
