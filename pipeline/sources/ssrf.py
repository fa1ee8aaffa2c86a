"""Connections protected against server-side request forgery (SSRF): a host and a port in, a socket to a public address out.

The author of a URL must not reach the private network that this process runs in. A name is therefore looked up once, all its
addresses are checked, and the connection goes to a checked address, even if the name resolves to another one a moment later (DNS
rebinding). Certificates are checked against the name. Every step has a deadline, including the name look-up, for which the
operating system has none.
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
"""Timeout for each address of a host, so that an unreachable one leaves time for the next."""

# Own tables, from IANA's registries of special-purpose addresses: Python's `is_global` said that 6to4 is public before
# 3.11.10, and still says so of 10.0.0.1 behind NAT64 and of 168.63.129.16.
NOT_PUBLIC_4 = tuple(
    ip_network(net)
    for net in (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 "
        "192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 "
        "168.63.129.16/32"  # Azure's host, from within its virtual machines
    ).split()
)
PUBLIC_6 = ip_network("2000::/3")
"""All unicast addresses allocated so far; loopback, link-local, unique local, site-local and multicast ones are outside."""
NOT_PUBLIC_6 = tuple(ip_network(net) for net in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))
"""Teredo and other protocol assignments, documentation, 6to4, documentation."""
NAT64 = ip_network("64:ff9b::/96")

Address = tuple[Any, ...]
"""A socket address: (address, port), for IPv6 with flow info and scope id."""


def connect_checked(host: str, port: int, secure: bool, allow_private: bool, deadline: float) -> socket.socket:
    """Return a connection to a checked address of a host; if `secure`, with TLS and a certificate verified for the host name.

    Raises DocumentError `refused` for an address that is not public, TimeoutError, and OSError.
    """
    found = look_up_host(host, port, deadline)
    for _, (address, *_) in found:
        if not allow_private and not is_public_address(ip_address(address.partition("%")[0])):
            remedy = "`source.allow_private: true` lets it in"
            raise DocumentError("refused", f"{host} has the address {address}, which is not public; {remedy}")
    connection = dial_addresses(found, deadline)
    if not secure:
        return connection
    with connection:  # wrap_socket detaches it on success
        connection.settimeout(compute_time_left(deadline))
        return make_tls_context().wrap_socket(connection, server_hostname=host, suppress_ragged_eofs=False)


def is_public_address(address: IPv4Address | IPv6Address) -> bool:
    """Say whether an address is public. An IPv6 address that embeds an IPv4 address is public if that is."""
    if isinstance(address, IPv4Address):
        return not any(address in net for net in NOT_PUBLIC_4)
    if address.ipv4_mapped or address in NAT64:
        return is_public_address(IPv4Address(int(address) & 0xFFFFFFFF))
    return address in PUBLIC_6 and not any(address in net for net in NOT_PUBLIC_6)


def look_up_host(host: str, port: int, deadline: float) -> list[tuple[int, Address]]:
    """Return the address families and addresses of a host. Runs in a thread: the system's look-up takes no timeout.

    Raises TimeoutError, and what `socket.getaddrinfo` raises.
    """
    results: SimpleQueue[Any] = SimpleQueue()

    def resolve() -> None:
        try:
            results.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            results.put(error)

    Thread(target=resolve, daemon=True).start()
    try:
        found = results.get(timeout=compute_time_left(deadline))
    except Empty:
        raise TimeoutError from None
    if isinstance(found, Exception):
        raise found
    return [(family, address) for family, _, _, _, address in found]


def dial_addresses(found: list[tuple[int, Address]], deadline: float) -> socket.socket:
    """Return a connection to the first address that accepts one. Raises the last OSError if none does."""
    problem = OSError("its name has no address")
    for family, address in found:
        try:
            return connect_address(family, address, min(compute_time_left(deadline), ADDRESS_CONNECT_S))
        except OSError as error:
            problem = error
    raise problem


def connect_address(family: int, address: Address, timeout_s: float) -> socket.socket:
    """Return a TCP connection to an address; no name is looked up."""
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
    """Return the TLS settings of this process; it trusts the system's certificates, or those of SSL_CERT_FILE."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
