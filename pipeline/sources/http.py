"""An http(s) URL -> the bytes behind it, fetched from public addresses alone. Knows no document and no page.

    fetch("https://example.com/a.pdf", max_bytes)

Where a redirect leads is checked as the first URL was, by `net.py`. Proxies in the environment are not used: a proxy
looks names up by itself, and the check would be void. The whole of it, looking up, connecting, redirects and the last
byte, has one deadline; what comes is counted as it comes, whatever the server announced. Nothing is unpacked, so there
is nothing to blow up.
"""

from __future__ import annotations

import io
import re
import socket
import ssl
import time
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any, cast
from urllib.parse import quote, urljoin, urlsplit

from pipeline.deadline import compute_time_left
from pipeline.errors import DocumentError
from pipeline.sources.ssrf import connect_checked
from pipeline.version import __version__

HTTP_PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
MAX_URL_CHARS = 8192
READ_BYTES = 2**16
HEADERS_BYTES = 2**20
ENCODINGS = {"Content-Encoding": ("", "identity"), "Transfer-Encoding": ("", "chunked")}
"""What a body may come in; anything else would have to be unpacked."""

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What Python reads a byte as that is no UTF-8."""
HTTP_URL_SECRET = re.compile(r"(?<=://).*@", re.DOTALL)
KEPT = "/%:@!$&'()*+,;=~-._"


@dataclass(frozen=True)
class DownloadPolicy:
    """How far a download may go: into private networks or not, and for how long."""

    allow_private: bool = False
    download_s: float = 120.0


PUBLIC_ONLY = DownloadPolicy()


@dataclass(frozen=True)
class HttpUrl:
    """A URL taken apart, its parts as they are sent."""

    scheme: str
    host: str
    port: int
    path: str
    query: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == HTTP_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def target(self) -> str:
        return f"{self.path}?{self.query}" if self.query else self.path

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"


# ---- Names --------------------------------------------------------------------------------------------------------


def is_http_url(source: str) -> bool:
    """Say whether a source is an http(s) URL."""
    return source[:8].lower().startswith(("http://", "https://"))


def parse_http_url(url: str, base: str = "") -> HttpUrl:
    """Return a URL's parts, seen from `base` if it is relative. Raises DocumentError `refused`, with no secret in it."""
    if len(url) > MAX_URL_CHARS:
        raise DocumentError("refused", f"it is longer than {MAX_URL_CHARS} characters")
    try:
        parts = urlsplit(urljoin(base, url))
        host, port = (parts.hostname or "").encode("idna").decode("ascii"), parts.port
    except ValueError:
        raise DocumentError("refused", "it is no URL that can be understood") from None
    faults = {
        "it has a control character in it": CONTROL.search(url),
        f"only http and https are fetched, not {parts.scheme[:20]!r}": parts.scheme not in HTTP_PORTS,
        "it has a user or a password in it, which are not sent and not kept": "@" in parts.netloc,
        "it has no host name that can be looked up": not HOST.fullmatch(host),
        "a URL is one file and no glob; where * [ ] are meant, write %2A %5B %5D": not base and re.search(r"[*\[\]]", parts.path),
    }
    for sentence, found in faults.items():
        if found:
            raise DocumentError("refused", sentence)
    path, query = quote(parts.path or "/", KEPT), quote(parts.query, KEPT + "?[]")
    return HttpUrl(parts.scheme, host, HTTP_PORTS[parts.scheme] if port is None else port, path, query)


def format_listed_url(url: str) -> str:
    """Return the name a URL is listed by: as it was written, but for a user and a password, which are refused anyway."""
    try:
        parts = urlsplit(url)
        _ = parts.port
        secret = "@" in parts.netloc
    except ValueError:  # as for `https://me:pass/word@host/`, whose port would be `pass`
        secret = True
    name = NOT_UTF8.sub(lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", HTTP_URL_SECRET.sub("***@", url) if secret else url)
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def redact_query(url: str) -> str:
    """Return a URL as messages show it: its query may be a signature and is left out."""
    bare = re.split(r"[?#]", format_listed_url(url), maxsplit=1)
    return bare[0] + ("?…" if len(bare) > 1 else "")


# ---- One download -------------------------------------------------------------------------------------------------


def fetch_url(url: str, max_bytes: int, access: DownloadPolicy = PUBLIC_ONLY) -> bytes:
    """Return the bytes behind a URL.

    Raises DocumentError: `refused`, `vanished` (404 and 410), `too_large`, `timeout`, or `unreadable`.
    """
    deadline = time.monotonic() + access.download_s
    try:
        return follow_redirects(parse_http_url(url), max_bytes, access.allow_private, deadline)
    except DocumentError as error:
        kind, why = error.kind, error.message
    except TimeoutError:
        over = time.monotonic() >= deadline
        kind, why = "timeout", f"it took more than {access.download_s:g} s (`limits.download_s`)" if over else "its server does not answer"
    except ssl.SSLCertVerificationError as error:
        kind, why = "refused", f"its certificate is not trusted: {error.verify_message}"
    except OSError as error:
        kind, why = "unreadable", error.strerror or str(error)
    except (HTTPException, ValueError) as error:
        kind, why = "unreadable", f"its server does not speak HTTP as it should ({type(error).__name__})"
    raise DocumentError(kind, f"{redact_query(url)} cannot be fetched: {why}")


def follow_redirects(place: HttpUrl, max_bytes: int, allow_private: bool, deadline: float) -> bytes:
    """Return what is at a place, or where that redirects to."""
    for _ in range(MAX_REDIRECTS + 1):
        with connect_checked(place.host, place.port, place.scheme == "https", allow_private, deadline) as connection:
            answer = send_request(connection, place, max_bytes, deadline)
            if answer.status not in REDIRECTS:
                return read_body(answer, max_bytes)
            place = resolve_redirect(place, answer.headers["Location"] or "")
    raise DocumentError("refused", f"it redirects more than {MAX_REDIRECTS} times")


def resolve_redirect(place: HttpUrl, location: str) -> HttpUrl:
    """Return where a redirect leads."""
    if not location:
        raise DocumentError("unreadable", "it redirects without saying where to")
    there = parse_http_url(location.encode("latin-1").decode("utf-8", "replace"), place.url)
    if place.scheme == "https" and there.scheme == "http":
        raise DocumentError("refused", f"it redirects from https to http ({redact_query(there.url)})")
    return there


def send_request(connection: socket.socket, place: HttpUrl, max_bytes: int, deadline: float) -> HTTPResponse:
    """Send the request and return the answer, its body still to be read."""
    lines = (
        f"GET {place.target} HTTP/1.1",
        f"Host: {place.authority}",
        f"User-Agent: pipeline/{__version__}",
        "Accept: */*",
        "Accept-Encoding: identity",
        "Connection: close",
    )
    connection.settimeout(compute_time_left(deadline))
    connection.sendall("\r\n".join((*lines, "", "")).encode("ascii"))
    answer = HTTPResponse(cast(Any, BoundedSocketReader(connection, max_bytes, deadline)), method="GET")
    answer.begin()
    return answer


def read_body(answer: HTTPResponse, max_bytes: int) -> bytes:
    """Return the body of an answer that is a plain 200."""
    if answer.status != 200:
        raise DocumentError("vanished" if answer.status in (404, 410) else "unreadable", f"its server answers {answer.status}")
    for name, allowed in ENCODINGS.items():
        found = ", ".join(answer.headers.get_all(name, ())).strip().lower()
        if found not in allowed:
            raise DocumentError("refused", f"its server sends it as {name}: {found[:40]!r}, unasked; nothing is unpacked")
    if answer.length is not None and answer.length > max_bytes:
        raise make_size_error(max_bytes, f"has {answer.length} bytes")
    data = io.BytesIO()
    while block := answer.read1(READ_BYTES):
        if data.tell() + len(block) > max_bytes:
            raise make_size_error(max_bytes)
        data.write(block)
    if answer.length:
        raise DocumentError("unreadable", f"the connection ended {answer.length} bytes too early")
    return data.getvalue()


def make_size_error(max_bytes: int, what: str = "is larger") -> DocumentError:
    return DocumentError("too_large", f"it {what}; `limits.max_file_mib` allows {max_bytes / 2**20:g} MiB")


class BoundedSocketReader(io.RawIOBase):
    """What a server sends: no later than the deadline, and not much more than a body may have.

    http.client waits anew for each of its reads, reads as many trailers as come, and takes a chunk of -1 bytes for all
    there is. Here is the one place that all of it comes through.
    """

    def __init__(self, connection: socket.socket, max_bytes: int, deadline: float) -> None:
        self.connection, self.max_bytes, self.deadline = connection, max_bytes, deadline
        self.rest_bytes = max_bytes + max_bytes // 8 + HEADERS_BYTES

    def makefile(self, _: str) -> io.BufferedReader:
        return io.BufferedReader(self, READ_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.connection.settimeout(compute_time_left(self.deadline))
        count = self.connection.recv_into(buffer)
        self.rest_bytes -= count
        if self.rest_bytes < 0:
            raise make_size_error(self.max_bytes)
        return count
