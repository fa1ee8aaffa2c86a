"""What is fetched comes from a public address, in time and in bounds, or a sentence says why not. Servers here are real."""

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
OPEN = DownloadPolicy(allow_private=True, download_s=20)
HASTY = DownloadPolicy(allow_private=True, download_s=0.4)
MOST = 1000
PUBLIC = "93.184.215.14"
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"

Answer = Callable[[socket.socket], None]


def plain(data: bytes = BODY, status: str = "200 OK", *headers: str) -> bytes:
    """Return a whole answer."""
    return "\r\n".join((f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", *headers, "", "")).encode() + data


def to(location: str, status: str = "302 Found") -> bytes:
    return plain(b"", status, f"Location: {location}")


class Site:
    """A server on loopback that sends what a test says, byte by byte; http.server would not tell lies."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes | Answer] = {"/a.pdf": plain()}
        self.asked: list[str] = []
        self.over = threading.Event()
        self.context: ssl.SSLContext | None = None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self) -> None:
        while not self.over.is_set():
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
                    self.asked.append(request)
                    answer = self.pages.get(request.split(" ")[1], b"")
                    answer(connection) if callable(answer) else connection.sendall(answer)
        except (OSError, IndexError):
            pass  # the other side has had enough, or sends a handshake: what many of these tests are about

    def drip(self, head: bytes, drop: bytes) -> Answer:
        """Return an answer that begins with `head` and never ends, a drop at a time."""

        def answer(connection: socket.socket) -> None:
            connection.sendall(head)
            while not self.over.wait(0.05):
                connection.sendall(drop)

        return answer

    def flood(self, head: bytes, wave: bytes) -> Answer:
        """Return an answer that begins with `head` and never ends, as fast as it goes."""

        def answer(connection: socket.socket) -> None:
            connection.sendall(head)
            while not self.over.is_set():
                connection.sendall(wave)

        return answer

    def close(self) -> None:
        self.over.set()
        socket.create_connection(("127.0.0.1", self.port)).close()
        for thread in self.threads:
            thread.join()
        self.listener.close()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


class Names:
    """A resolver that answers as told, one answer after the other and the last for ever, and counts the questions.

    Whatever public address is dialled then leads to the test's server: nothing leaves this machine.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, site: Site, *answers: list[str]) -> None:
        self.answers, self.asked, self.dialled, self.port = list(answers), list[str](), list[str](), site.port
        dial = socket.socket.connect

        def connect(connection: socket.socket, address: Any) -> None:
            self.dialled.append(address[0])
            dial(connection, ("127.0.0.1", site.port))

        monkeypatch.setattr(socket, "getaddrinfo", self.look_up)
        monkeypatch.setattr(socket.socket, "connect", connect)

    def look_up(self, host: str, port: int, **_: Any) -> list[Any]:
        self.asked.append(host)
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for family, address in zip(families, addresses, strict=True)]


def failure(url: str, access: DownloadPolicy = OPEN, max_bytes: int = MOST) -> DocumentError:
    with pytest.raises(DocumentError) as caught:
        fetch_url(url, max_bytes, access)
    return caught.value


# ---- Addresses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0", "[::1]", "[::ffff:127.0.0.1]", "１２７.0.0.1"]
)
def test_no_way_of_writing_loopback_leads_there(site: Site, host: str) -> None:
    assert failure(f"http://{host}:{site.port}/a.pdf", DownloadPolicy()).kind in ("refused", "unreadable")
    assert site.asked == []


def test_loopback_is_refused_by_name_unless_the_job_allows_it(site: Site) -> None:
    error = failure(f"{site.url}/a.pdf", DownloadPolicy())
    assert error.kind == "refused"
    assert str(error) == (
        f"{site.url}/a.pdf cannot be fetched: 127.0.0.1 has the address 127.0.0.1, which is not public; "
        "`source.allow_private: true` lets it in"
    )
    assert fetch_url(f"{site.url}/a.pdf", MOST, OPEN) == BODY


def test_a_document_is_fetched_when_it_is_read_and_from_public_addresses_unless_told(site: Site) -> None:
    document = Document(f"{site.url}/a.pdf", None, "")
    assert read_document(document, Path(), MOST, OPEN) == BODY
    with pytest.raises(DocumentError, match="not public"):
        read_document(document, Path(), MOST)


def test_a_name_is_looked_up_once_and_its_checked_address_dialled(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch, site, [PUBLIC], ["127.0.0.1"])
    assert fetch_url("http://files.example/a.pdf", MOST) == BODY
    assert (names.asked, names.dialled) == (["files.example"], [PUBLIC])
    assert "\r\nHost: files.example\r\n" in site.asked[0]


def test_a_name_with_one_private_address_among_public_ones_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch, site, [PUBLIC, "2606:4700::1111", "::ffff:10.0.0.1"])
    assert "::ffff:10.0.0.1" in str(failure("http://files.example/a.pdf", DownloadPolicy()))
    assert names.dialled == []


def test_a_name_that_is_rebound_is_checked_again_at_each_redirect(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch, site, [PUBLIC], [PUBLIC], ["169.254.169.254"])
    site.pages |= {"/one": to("/two"), "/two": to("http://files.example/latest/meta-data")}
    assert "169.254.169.254" in str(failure("http://files.example/one", DownloadPolicy()))
    assert names.dialled == [PUBLIC, PUBLIC]


def test_proxies_of_the_environment_are_not_asked(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, site.url)
    closed = socket.create_server(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()
    assert failure(f"http://127.0.0.1:{port}/a.pdf").kind == "unreadable"
    assert site.asked == []


# ---- Redirects and URLs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirects_are_followed(site: Site, status: str) -> None:
    site.pages |= {"/old": to("a.pdf?x=1#top", status), "/a.pdf?x=1": plain(b"new")}
    assert fetch_url(f"{site.url}/old", MOST, OPEN) == b"new"


def test_five_redirects_are_followed_and_six_are_not(site: Site) -> None:
    site.pages |= {f"/{n}": to(f"/{n - 1}") for n in range(1, 7)} | {"/0": plain()}
    assert fetch_url(f"{site.url}/5", MOST, OPEN) == BODY
    assert failure(f"{site.url}/6").kind == "refused"


@pytest.mark.parametrize(
    "location",
    ["http://169.254.169.254/latest/meta-data", "//10.0.0.1/a", "http://[::ffff:a00:1]/", "file:///etc/passwd", "ftp://127.0.0.1/a",
     "data:,x", "http://me:secret@files.example/a.pdf", "http://[x/?secret", "https://files.example:99999/secret"],
)  # fmt: skip
def test_redirects_to_where_a_url_may_not_lead_are_refused(site: Site, monkeypatch: pytest.MonkeyPatch, location: str) -> None:
    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        address = PUBLIC if host.endswith(".example") else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    names = Names(monkeypatch, site, [PUBLIC])
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    site.pages["/old"] = to(location)
    error = failure("http://files.example/old", DownloadPolicy())
    assert (error.kind, names.dialled) == ("refused", [PUBLIC])
    assert "secret" not in str(error)


@pytest.mark.parametrize("status", ["300 Choices", "304 Not Modified", "302 Found"])
def test_a_redirect_to_nowhere_is_unreadable(site: Site, status: str) -> None:
    site.pages["/old"] = plain(b"", status)
    assert failure(f"{site.url}/old").kind == "unreadable"


@pytest.mark.parametrize(
    ("written", "sent"),
    [("/a b/ü%20.pdf?q=a b&r=%41[1]#page", "/a%20b/%C3%BC%20.pdf?q=a%20b&r=%41[1]"), ("", "/"), ("?x=1", "/?x=1"), ("/@x/%2A", "/@x/%2A")],
)
def test_what_a_url_asks_for(site: Site, written: str, sent: str) -> None:
    site.pages[sent] = plain()
    assert fetch_url(site.url + written, MOST, OPEN) == BODY


@pytest.mark.parametrize(
    "url",
    ["http://me:secret@127.0.0.1/", "http://secret@127.0.0.1/", "http://me:sec/secret@127.0.0.1/", "http://secret\\@127.0.0.1/", "http:///?secret",
     "http://127.0.0.1/?x\r\nX: secret", "ht\ttp://127.0.0.1/?secret", "file://127.0.0.1/?secret", "http://127.0.0.1/*?secret", "http://a%00b/?secret",
     "http://127.0.0.1:0x50/?secret", "http://[127.0.0.1/?secret", "http://.../?secret", f"http://127.0.0.1/?secret{'x' * 9000}"],
)  # fmt: skip
def test_urls_that_are_refused_before_anything_is_looked_up(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.delattr(socket, "getaddrinfo")
    error = failure(url)
    assert error.kind == "refused"
    assert "secret" not in str(error)


def test_a_name_keeps_all_but_a_password() -> None:
    assert http.format_listed_url("https://x.example/@scope/a.pdf?mail=a@b.c") == "https://x.example/@scope/a.pdf?mail=a@b.c"
    assert http.format_listed_url("https://me:pa@ss?w@x.example/a.pdf") == "https://***@x.example/a.pdf"
    assert http.redact_query("https://x.example/a.pdf?signature=secret") == "https://x.example/a.pdf?…"


# ---- Bounds -------------------------------------------------------------------------------------------------------


def test_a_body_as_large_as_allowed(site: Site) -> None:
    site.pages["/b"] = plain(b"x" * MOST)
    assert len(fetch_url(f"{site.url}/b", MOST, OPEN)) == MOST
    assert failure(f"{site.url}/b", max_bytes=MOST - 1).kind == "too_large"


def test_one_byte_more_than_allowed_is_too_large_without_a_length_too(site: Site) -> None:
    site.pages["/open"] = OK + b"\r\n" + b"x" * MOST
    assert failure(f"{site.url}/open", max_bytes=MOST - 1).kind == "too_large"


def test_a_length_that_is_too_large_is_not_waited_for(site: Site) -> None:
    site.pages["/silence"] = site.drip(OK + b"Content-Length: 1001\r\n\r\n", b"")
    assert failure(f"{site.url}/silence", HASTY, 1000).kind == "too_large"


def test_chunks_and_bodies_without_a_length(site: Site) -> None:
    site.pages["/chunks"] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n%PDF-\r\n3;x=y\r\n1.7\r\n0\r\nX: y\r\n\r\n"
    site.pages["/open"] = b"HTTP/1.0 200 OK\r\n\r\n%PDF-1.7"
    assert [fetch_url(site.url + path, MOST, OPEN) for path in ("/chunks", "/open")] == [b"%PDF-1.7"] * 2


ENDLESS = {
    "a body": (OK + b"\r\n", b"x" * 4096),
    "a body that is announced": (OK + b"Content-Length: 99999999999\r\n\r\n", b"x" * 4096),
    "chunks": (CHUNKED, b"800\r\n" + b"x" * 2048 + b"\r\n"),
    "one chunk": (CHUNKED + b"fffffffffffff\r\n", b"x" * 4096),
    "a chunk of -1 bytes": (CHUNKED + b"-1\r\n", b"x" * 4096),
    "trailers": (CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n" * 512),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 99),
}


@pytest.mark.parametrize(("head", "wave"), ENDLESS.values(), ids=ENDLESS)
def test_what_never_ends_is_too_large(site: Site, head: bytes, wave: bytes) -> None:
    site.pages["/flood"] = site.flood(head, wave)
    assert failure(f"{site.url}/flood").kind == "too_large"


@pytest.mark.parametrize("head", [b"", OK, OK + b"X: ", OK + b"Content-Length: 900\r\n\r\n", OK + b"\r\n", CHUNKED], ids=repr)
def test_drop_by_drop_is_no_way_around_the_deadline(site: Site, head: bytes) -> None:
    site.pages["/drip"] = site.drip(head, b"1")
    error = failure(f"{site.url}/drip", HASTY)
    assert (error.kind, "`limits.download_s`" in str(error)) == ("timeout", True)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_says_nothing_is_given_up(site: Site, scheme: str) -> None:
    site.pages["/silence"] = lambda _: site.over.wait() and None
    assert failure(f"{scheme}://127.0.0.1:{site.port}/silence", HASTY).kind == "timeout"


def test_redirects_share_one_deadline(site: Site) -> None:
    def slowly(connection: socket.socket) -> None:
        site.over.wait(0.15)
        connection.sendall(to("/round"))

    site.pages["/round"] = slowly
    assert failure(f"{site.url}/round", HASTY).kind == "timeout"


@pytest.mark.parametrize("name", ["Content-Encoding: gzip", "Content-Encoding: identity, br", "Transfer-Encoding: gzip, chunked"])
def test_what_is_packed_is_refused(site: Site, name: str) -> None:
    site.pages["/packed"] = plain(b"\x1f\x8b", "200 OK", name)
    assert failure(f"{site.url}/packed").kind == "refused"
    assert "\r\nAccept-Encoding: identity\r\n" in site.asked[0]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (plain(BODY, "404 Not Found"), "vanished"),
        (plain(BODY, "410 Gone"), "vanished"),
        (plain(BODY, "403 Forbidden"), "unreadable"),
        (plain(BODY, "206 Partial Content"), "unreadable"),
        (plain(BODY, "503 Later"), "unreadable"),
        (plain(b"", "204 No Content"), "unreadable"),
        (OK + b"Content-Length: 900\r\n\r\n" + BODY, "unreadable"),
        (CHUNKED + b"5\r\nabcde\r\n", "unreadable"),
        (CHUNKED + b"oops\r\nabcde\r\n", "unreadable"),
        (b"SSH-2.0-OpenSSH_9.6\r\nsecret", "unreadable"),
        (b"HTTP/2.0 200 OK\r\n\r\n", "unreadable"),
        (b"", "unreadable"),
        (OK + b"X: y\r\n" * 200 + b"\r\n", "unreadable"),
        (OK + b"X: " + b"y" * 70_000 + b"\r\n\r\n", "unreadable"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_other_answers_have_a_kind(site: Site, answer: bytes, kind: str) -> None:
    site.pages["/odd"] = answer
    error = failure(f"{site.url}/odd")
    assert error.kind == kind
    assert "secret" not in str(error)


def test_a_host_that_nobody_knows_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    error = failure("https://nowhere.example/a.pdf?signature=secret", DownloadPolicy())
    assert str(error) == "https://nowhere.example/a.pdf?… cannot be fetched: Name or service not known"


# ---- Certificates -------------------------------------------------------------------------------------------------


@pytest.fixture
def certified(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Have the site speak TLS as files.example, with a certificate that it signed itself."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    curve = (
        "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=files.example -addext subjectAltName=DNS:files.example"
    )
    made = ["openssl", "req", "-x509", *curve.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    site.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    site.context.load_cert_chain(certificate, key)
    ssrf.make_tls_context.cache_clear()
    yield certificate
    ssrf.make_tls_context.cache_clear()


def test_a_certificate_that_nobody_vouches_for_is_refused(site: Site, certified: Path) -> None:
    error = failure(f"https://127.0.0.1:{site.port}/a.pdf")
    assert (error.kind, "certificate" in str(error)) == ("refused", True)
    assert site.asked == []


def test_a_certificate_counts_for_the_name_and_not_for_the_address(site: Site, certified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certified))
    names = Names(monkeypatch, site, [PUBLIC])
    seen = []
    assert site.context
    site.context.sni_callback = lambda _, name, __: seen.append(name)
    assert fetch_url("https://files.example/a.pdf", MOST) == BODY
    assert failure("https://other.example/a.pdf", DownloadPolicy()).kind == "refused"
    assert (names.dialled, seen) == ([PUBLIC] * 2, ["files.example", "other.example"])


def test_a_redirect_does_not_lead_from_https_to_http(site: Site, certified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certified))
    Names(monkeypatch, site, [PUBLIC])
    site.pages |= {"/old": to("http://files.example/a.pdf?signature=secret"), "/older": to("https://files.example/a.pdf")}
    assert fetch_url("https://files.example/older", MOST) == BODY
    error = failure("https://files.example/old", DownloadPolicy())
    assert (error.kind, "from https to http" in str(error), "secret" in str(error)) == ("refused", True, False)


def test_a_body_without_a_length_that_tls_does_not_end_is_cut_short(site: Site, certified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certified))
    Names(monkeypatch, site, [PUBLIC])
    site.pages["/open"] = OK + b"\r\n" + BODY
    assert failure("https://files.example/open", DownloadPolicy()).kind == "unreadable"
