"""HTTP downloads: addresses, redirects, limits, certificates. The servers are real and listen on the loopback interface."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DocumentError
from pipeline.records import Document
from pipeline.sources import http, read_document, ssrf
from pipeline.sources.http import DownloadPolicy, fetch_url

BODY = b"%PDF-1.7 and so on"
ALLOW_PRIVATE = DownloadPolicy(allow_private=True, download_s=20)
SHORT_DEADLINE = DownloadPolicy(allow_private=True, download_s=0.4)
MAX_BYTES = 1000
PUBLIC_ADDRESS = "93.184.215.14"
OK_LINE = b"HTTP/1.1 200 OK\r\n"
CHUNKED_HEAD = OK_LINE + b"Transfer-Encoding: chunked\r\n\r\n"

ResponseWriter = Callable[[socket.socket], None]


def make_response(data: bytes = BODY, status: str = "200 OK", *headers: str) -> bytes:
    """Return a complete response."""
    return "\r\n".join((f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", *headers, "", "")).encode() + data


def make_redirect(location: str, status: str = "302 Found") -> bytes:
    return make_response(b"", status, f"Location: {location}")


class HttpSite:
    """A server on the loopback interface that sends exact bytes, also invalid HTTP, which http.server cannot."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes | ResponseWriter] = {"/a.pdf": make_response()}
        self.requests: list[str] = []
        self.stopped = threading.Event()
        self.context: ssl.SSLContext | None = None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self) -> None:
        while not self.stopped.is_set():
            connection, _ = self.listener.accept()
            self.threads.append(threading.Thread(target=self.serve, args=(connection,)))
            self.threads[-1].start()

    def serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                if self.context:
                    connection = self.context.wrap_socket(connection, server_side=True)
                with connection, connection.makefile("rb") as lines:
                    request = b"".join(takewhile(bytes.strip, lines)).decode("latin-1")
                    self.requests.append(request)
                    response = self.pages.get(request.split(" ")[1], b"")
                    response(connection) if callable(response) else connection.sendall(response)
        except (OSError, IndexError):
            pass  # the client closed the connection or sent a TLS handshake, as many of these tests provoke

    def drip(self, head: bytes, piece: bytes) -> ResponseWriter:
        """Return a response that starts with `head` and then sends a piece every 50 ms without end."""

        def write(connection: socket.socket) -> None:
            connection.sendall(head)
            while not self.stopped.wait(0.05):
                connection.sendall(piece)

        return write

    def flood(self, head: bytes, piece: bytes) -> ResponseWriter:
        """Return a response that starts with `head` and then sends pieces without end, as fast as it can."""

        def write(connection: socket.socket) -> None:
            connection.sendall(head)
            while not self.stopped.is_set():
                connection.sendall(piece)

        return write

    def close(self) -> None:
        self.stopped.set()
        socket.create_connection(("127.0.0.1", self.port)).close()
        for thread in self.threads:
            thread.join()
        self.listener.close()


@pytest.fixture
def site() -> Iterator[HttpSite]:
    site = HttpSite()
    yield site
    site.close()


class FakeResolver:
    """Replaces name look-ups by scripted results, the last one repeated, and records the names and the addresses connected to.

    A connection to any public address goes to the test's server instead; nothing leaves this machine.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, site: HttpSite, *results: list[str]) -> None:
        self.results, self.hosts, self.connected, self.port = list(results), list[str](), list[str](), site.port
        real_connect = socket.socket.connect

        def connect(connection: socket.socket, address: Any) -> None:
            self.connected.append(address[0])
            real_connect(connection, ("127.0.0.1", site.port))

        monkeypatch.setattr(socket, "getaddrinfo", self.look_up)
        monkeypatch.setattr(socket.socket, "connect", connect)

    def look_up(self, host: str, port: int, **_: Any) -> list[Any]:
        self.hosts.append(host)
        addresses = self.results.pop(0) if len(self.results) > 1 else self.results[0]
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for family, address in zip(families, addresses, strict=True)]


def fetch_error(url: str, policy: DownloadPolicy = ALLOW_PRIVATE, max_bytes: int = MAX_BYTES) -> DocumentError:
    with pytest.raises(DocumentError) as caught:
        fetch_url(url, max_bytes, policy)
    return caught.value


# ---- Addresses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0", "[::1]", "[::ffff:127.0.0.1]", "１２７.0.0.1"]
)
def test_no_spelling_of_loopback_is_connected_to(site: HttpSite, host: str) -> None:
    assert fetch_error(f"http://{host}:{site.port}/a.pdf", DownloadPolicy()).kind in ("refused", "unreadable")
    assert site.requests == []


def test_loopback_is_refused_by_name_unless_the_job_allows_it(site: HttpSite) -> None:
    error = fetch_error(f"{site.url}/a.pdf", DownloadPolicy())
    assert error.kind == "refused"
    assert str(error) == (
        f"{site.url}/a.pdf cannot be fetched: 127.0.0.1 has the address 127.0.0.1, which is not public; "
        "`source.allow_private: true` lets it in"
    )
    assert fetch_url(f"{site.url}/a.pdf", MAX_BYTES, ALLOW_PRIVATE) == BODY


def test_reading_a_document_fetches_it_from_public_addresses_by_default(site: HttpSite) -> None:
    document = Document(f"{site.url}/a.pdf", None, "")
    assert read_document(document, Path(), MAX_BYTES, ALLOW_PRIVATE) == BODY
    with pytest.raises(DocumentError, match="not public"):
        read_document(document, Path(), MAX_BYTES)


def test_a_name_is_looked_up_once_and_its_checked_address_is_connected_to(site: HttpSite, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = FakeResolver(monkeypatch, site, [PUBLIC_ADDRESS], ["127.0.0.1"])
    assert fetch_url("http://files.example/a.pdf", MAX_BYTES) == BODY
    assert (resolver.hosts, resolver.connected) == (["files.example"], [PUBLIC_ADDRESS])
    assert "\r\nHost: files.example\r\n" in site.requests[0]


def test_a_name_with_one_private_address_among_public_ones_is_refused(site: HttpSite, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = FakeResolver(monkeypatch, site, [PUBLIC_ADDRESS, "2606:4700::1111", "::ffff:10.0.0.1"])
    assert "::ffff:10.0.0.1" in str(fetch_error("http://files.example/a.pdf", DownloadPolicy()))
    assert resolver.connected == []


def test_a_name_that_is_rebound_is_checked_again_at_each_redirect(site: HttpSite, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = FakeResolver(monkeypatch, site, [PUBLIC_ADDRESS], [PUBLIC_ADDRESS], ["169.254.169.254"])
    site.pages |= {"/one": make_redirect("/two"), "/two": make_redirect("http://files.example/latest/meta-data")}
    assert "169.254.169.254" in str(fetch_error("http://files.example/one", DownloadPolicy()))
    assert resolver.connected == [PUBLIC_ADDRESS, PUBLIC_ADDRESS]


def test_proxies_of_the_environment_are_not_used(site: HttpSite, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, site.url)
    closed = socket.create_server(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()
    assert fetch_error(f"http://127.0.0.1:{port}/a.pdf").kind == "unreadable"
    assert site.requests == []


# ---- Redirects and URLs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirects_are_followed(site: HttpSite, status: str) -> None:
    site.pages |= {"/old": make_redirect("a.pdf?x=1#top", status), "/a.pdf?x=1": make_response(b"new")}
    assert fetch_url(f"{site.url}/old", MAX_BYTES, ALLOW_PRIVATE) == b"new"


def test_five_redirects_are_followed_and_six_are_not(site: HttpSite) -> None:
    site.pages |= {f"/{n}": make_redirect(f"/{n - 1}") for n in range(1, 7)} | {"/0": make_response()}
    assert fetch_url(f"{site.url}/5", MAX_BYTES, ALLOW_PRIVATE) == BODY
    assert fetch_error(f"{site.url}/6").kind == "refused"


@pytest.mark.parametrize(
    "location",
    ["http://169.254.169.254/latest/meta-data", "//10.0.0.1/a", "http://[::ffff:a00:1]/", "file:///etc/passwd", "ftp://127.0.0.1/a",
     "data:,x", "http://me:secret@files.example/a.pdf", "http://[x/?secret", "https://files.example:99999/secret"],
)  # fmt: skip
def test_redirects_to_where_a_url_may_not_lead_are_refused(site: HttpSite, monkeypatch: pytest.MonkeyPatch, location: str) -> None:
    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        address = PUBLIC_ADDRESS if host.endswith(".example") else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    resolver = FakeResolver(monkeypatch, site, [PUBLIC_ADDRESS])
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    site.pages["/old"] = make_redirect(location)
    error = fetch_error("http://files.example/old", DownloadPolicy())
    assert (error.kind, resolver.connected) == ("refused", [PUBLIC_ADDRESS])
    assert "secret" not in str(error)


@pytest.mark.parametrize("status", ["300 Choices", "304 Not Modified", "302 Found"])
def test_a_redirect_to_nowhere_is_unreadable(site: HttpSite, status: str) -> None:
    site.pages["/old"] = make_response(b"", status)
    assert fetch_error(f"{site.url}/old").kind == "unreadable"


@pytest.mark.parametrize(
    ("written", "sent"),
    [("/a b/ü%20.pdf?q=a b&r=%41[1]#page", "/a%20b/%C3%BC%20.pdf?q=a%20b&r=%41[1]"), ("", "/"), ("?x=1", "/?x=1"), ("/@x/%2A", "/@x/%2A")],
)
def test_path_and_query_are_percent_encoded(site: HttpSite, written: str, sent: str) -> None:
    site.pages[sent] = make_response()
    assert fetch_url(site.url + written, MAX_BYTES, ALLOW_PRIVATE) == BODY


@pytest.mark.parametrize(
    "url",
    ["http://me:secret@127.0.0.1/", "http://secret@127.0.0.1/", "http://me:sec/secret@127.0.0.1/", "http://secret\\@127.0.0.1/", "http:///?secret",
     "http://127.0.0.1/?x\r\nX: secret", "ht\ttp://127.0.0.1/?secret", "file://127.0.0.1/?secret", "http://127.0.0.1/*?secret", "http://a%00b/?secret",
     "http://127.0.0.1:0x50/?secret", "http://[127.0.0.1/?secret", "http://.../?secret", f"http://127.0.0.1/?secret{'x' * 9000}"],
)  # fmt: skip
def test_urls_that_are_refused_before_anything_is_looked_up(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.delattr(socket, "getaddrinfo")
    error = fetch_error(url)
    assert error.kind == "refused"
    assert "secret" not in str(error)


def test_a_listed_url_keeps_all_but_credentials() -> None:
    assert http.format_listed_url("https://x.example/@scope/a.pdf?mail=a@b.c") == "https://x.example/@scope/a.pdf?mail=a@b.c"
    assert http.format_listed_url("https://me:pa@ss?w@x.example/a.pdf") == "https://***@x.example/a.pdf"
    assert http.redact_query("https://x.example/a.pdf?signature=secret") == "https://x.example/a.pdf?…"


# ---- Limits -------------------------------------------------------------------------------------------------------


def test_a_body_as_large_as_allowed(site: HttpSite) -> None:
    site.pages["/b"] = make_response(b"x" * MAX_BYTES)
    assert len(fetch_url(f"{site.url}/b", MAX_BYTES, ALLOW_PRIVATE)) == MAX_BYTES
    assert fetch_error(f"{site.url}/b", max_bytes=MAX_BYTES - 1).kind == "too_large"


def test_one_byte_more_than_allowed_is_too_large_without_a_length_too(site: HttpSite) -> None:
    site.pages["/open"] = OK_LINE + b"\r\n" + b"x" * MAX_BYTES
    assert fetch_error(f"{site.url}/open", max_bytes=MAX_BYTES - 1).kind == "too_large"


def test_an_announced_length_that_is_too_large_fails_before_the_body_arrives(site: HttpSite) -> None:
    site.pages["/silence"] = site.drip(OK_LINE + b"Content-Length: 1001\r\n\r\n", b"")
    assert fetch_error(f"{site.url}/silence", SHORT_DEADLINE, 1000).kind == "too_large"


def test_chunks_and_bodies_without_a_length(site: HttpSite) -> None:
    site.pages["/chunks"] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n%PDF-\r\n3;x=y\r\n1.7\r\n0\r\nX: y\r\n\r\n"
    site.pages["/open"] = b"HTTP/1.0 200 OK\r\n\r\n%PDF-1.7"
    assert [fetch_url(site.url + path, MAX_BYTES, ALLOW_PRIVATE) for path in ("/chunks", "/open")] == [b"%PDF-1.7"] * 2


ENDLESS = {
    "a body": (OK_LINE + b"\r\n", b"x" * 4096),
    "a body that is announced": (OK_LINE + b"Content-Length: 99999999999\r\n\r\n", b"x" * 4096),
    "chunks": (CHUNKED_HEAD, b"800\r\n" + b"x" * 2048 + b"\r\n"),
    "one chunk": (CHUNKED_HEAD + b"fffffffffffff\r\n", b"x" * 4096),
    "a chunk of -1 bytes": (CHUNKED_HEAD + b"-1\r\n", b"x" * 4096),
    "trailers": (CHUNKED_HEAD + b"1\r\nx\r\n0\r\n", b"X: y\r\n" * 512),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 99),
}


@pytest.mark.parametrize(("head", "piece"), ENDLESS.values(), ids=ENDLESS)
def test_an_endless_response_is_too_large(site: HttpSite, head: bytes, piece: bytes) -> None:
    site.pages["/flood"] = site.flood(head, piece)
    assert fetch_error(f"{site.url}/flood").kind == "too_large"


@pytest.mark.parametrize(
    "head", [b"", OK_LINE, OK_LINE + b"X: ", OK_LINE + b"Content-Length: 900\r\n\r\n", OK_LINE + b"\r\n", CHUNKED_HEAD], ids=repr
)
def test_a_slow_endless_response_ends_at_the_deadline(site: HttpSite, head: bytes) -> None:
    site.pages["/drip"] = site.drip(head, b"1")
    error = fetch_error(f"{site.url}/drip", SHORT_DEADLINE)
    assert (error.kind, "`limits.download_s`" in str(error)) == ("timeout", True)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_silent_server_times_out(site: HttpSite, scheme: str) -> None:
    site.pages["/silence"] = lambda _: site.stopped.wait() and None
    assert fetch_error(f"{scheme}://127.0.0.1:{site.port}/silence", SHORT_DEADLINE).kind == "timeout"


def test_redirects_share_one_deadline(site: HttpSite) -> None:
    def slowly(connection: socket.socket) -> None:
        site.stopped.wait(0.15)
        connection.sendall(make_redirect("/round"))

    site.pages["/round"] = slowly
    assert fetch_error(f"{site.url}/round", SHORT_DEADLINE).kind == "timeout"


@pytest.mark.parametrize("name", ["Content-Encoding: gzip", "Content-Encoding: identity, br", "Transfer-Encoding: gzip, chunked"])
def test_a_compressed_body_is_refused(site: HttpSite, name: str) -> None:
    site.pages["/packed"] = make_response(b"\x1f\x8b", "200 OK", name)
    assert fetch_error(f"{site.url}/packed").kind == "refused"
    assert "\r\nAccept-Encoding: identity\r\n" in site.requests[0]


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        (make_response(BODY, "404 Not Found"), "vanished"),
        (make_response(BODY, "410 Gone"), "vanished"),
        (make_response(BODY, "403 Forbidden"), "unreadable"),
        (make_response(BODY, "206 Partial Content"), "unreadable"),
        (make_response(BODY, "503 Later"), "unreadable"),
        (make_response(b"", "204 No Content"), "unreadable"),
        (OK_LINE + b"Content-Length: 900\r\n\r\n" + BODY, "unreadable"),
        (CHUNKED_HEAD + b"5\r\nabcde\r\n", "unreadable"),
        (CHUNKED_HEAD + b"oops\r\nabcde\r\n", "unreadable"),
        (b"SSH-2.0-OpenSSH_9.6\r\nsecret", "unreadable"),
        (b"HTTP/2.0 200 OK\r\n\r\n", "unreadable"),
        (b"", "unreadable"),
        (OK_LINE + b"X: y\r\n" * 200 + b"\r\n", "unreadable"),
        (OK_LINE + b"X: " + b"y" * 70_000 + b"\r\n\r\n", "unreadable"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_other_responses_have_a_kind(site: HttpSite, response: bytes, kind: str) -> None:
    site.pages["/odd"] = response
    error = fetch_error(f"{site.url}/odd")
    assert error.kind == kind
    assert "secret" not in str(error)


def test_an_unknown_host_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    error = fetch_error("https://nowhere.example/a.pdf?signature=secret", DownloadPolicy())
    assert str(error) == "https://nowhere.example/a.pdf?… cannot be fetched: Name or service not known"


# ---- Certificates -------------------------------------------------------------------------------------------------


@pytest.fixture
def certified(site: HttpSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make the site serve TLS as files.example with a self-signed certificate; yield the certificate's file."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed; it makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    curve = (
        "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=files.example -addext subjectAltName=DNS:files.example"
    )
    command = ["openssl", "req", "-x509", *curve.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    site.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    site.context.load_cert_chain(certificate, key)
    ssrf.make_tls_context.cache_clear()
    yield certificate
    ssrf.make_tls_context.cache_clear()


def test_an_untrusted_certificate_is_refused(site: HttpSite, certified: Path) -> None:
    error = fetch_error(f"https://127.0.0.1:{site.port}/a.pdf")
    assert (error.kind, "certificate" in str(error)) == ("refused", True)
    assert site.requests == []


def test_a_certificate_is_checked_against_the_name_and_not_the_address(
    site: HttpSite, certified: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certified))
    resolver = FakeResolver(monkeypatch, site, [PUBLIC_ADDRESS])
    seen = []
    assert site.context
    site.context.sni_callback = lambda _, name, __: seen.append(name)
    assert fetch_url("https://files.example/a.pdf", MAX_BYTES) == BODY
    assert fetch_error("https://other.example/a.pdf", DownloadPolicy()).kind == "refused"
    assert (resolver.connected, seen) == ([PUBLIC_ADDRESS] * 2, ["files.example", "other.example"])


def test_a_redirect_does_not_lead_from_https_to_http(site: HttpSite, certified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certified))
    FakeResolver(monkeypatch, site, [PUBLIC_ADDRESS])
    site.pages |= {
        "/old": make_redirect("http://files.example/a.pdf?signature=secret"),
        "/older": make_redirect("https://files.example/a.pdf"),
    }
    assert fetch_url("https://files.example/older", MAX_BYTES) == BODY
    error = fetch_error("https://files.example/old", DownloadPolicy())
    assert (error.kind, "from https to http" in str(error), "secret" in str(error)) == ("refused", True, False)


def test_a_body_without_a_length_that_tls_does_not_end_is_cut_short(
    site: HttpSite, certified: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certified))
    FakeResolver(monkeypatch, site, [PUBLIC_ADDRESS])
    site.pages["/open"] = OK_LINE + b"\r\n" + BODY
    assert fetch_error("https://files.example/open", DownloadPolicy()).kind == "unreadable"
