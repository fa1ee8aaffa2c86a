"""HTTP download: an http(s) URL in, its bytes out, from public addresses only.

    fetch_url("https://example.com/a.pdf", max_bytes)

The target of every redirect is checked like the first URL, by `ssrf.py`. Proxies in the environment are not used: a proxy looks
host names up itself, which would bypass the check. One deadline covers everything from the name look-up to the last byte of the
last redirect. Received bytes are counted as they arrive, whatever length the server announced. Nothing is decompressed, so there
are no decompression bombs.
"""

from __future__ import annotations

import hashlib
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
from pipeline.storage.location import hide_credentials
from pipeline.version import __version__

HTTP_PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
MAX_URL_CHARS = 8192
READ_BYTES = 2**16
HEADERS_BYTES = 2**20
ENCODINGS = {"Content-Encoding": ("", "identity"), "Transfer-Encoding": ("", "chunked")}
"""Allowed values of the headers that say how a body is encoded; any other would have to be decoded."""

AMAZON_PARAMETERS = {f"x-amz-{name}" for name in ("algorithm", "credential", "date", "expires", "signedheaders", "signature")}
AZURE_PARAMETERS = set("sv sig se sp st sr ss srt spr sip skoid sktid skt ske sks skv saoid suoid scid sdd ses".split())
SIGNATURES: tuple[tuple[set[str], set[str]], ...] = (
    (AMAZON_PARAMETERS, {"x-amz-security-token"}),
    ({name.replace("x-amz", "x-goog") for name in AMAZON_PARAMETERS}, set()),
    ({"awsaccesskeyid", "signature", "expires"}, {"x-amz-security-token"}),
    ({"googleaccessid", "signature", "expires"}, set()),
    ({"key-pair-id", "signature"}, {"expires", "policy", "hash-algorithm"}),
    ({"sv", "sig", "se"}, AZURE_PARAMETERS),
)
"""The parameters of signed URLs that do not say which object is meant, by their scheme (Amazon S3, Google Cloud Storage, their older
ones, CloudFront, Azure): those that such a URL always has, and others that it may have."""
DIGEST_CHARS = 16

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""The surrogate escapes that Python decodes bytes to that are not UTF-8."""
SAFE_CHARACTERS = "/%:@!$&'()*+,;=~-._"
"""The punctuation of a path that is not percent-encoded (RFC 3986: `pchar`, `/`, and `%` because a path may be encoded already)."""


@dataclass(frozen=True)
class DownloadPolicy:
    """Limits of a download: whether private addresses are allowed, and its longest time."""

    allow_private: bool = False
    download_s: float = 120.0


PUBLIC_ONLY = DownloadPolicy()


@dataclass(frozen=True)
class HttpUrl:
    """A parsed URL, its parts encoded as they are sent."""

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


# ---- URLs ---------------------------------------------------------------------------------------------------------


def is_http_url(source: str) -> bool:
    """Say whether a source is an http(s) URL."""
    return source[:8].lower().startswith(("http://", "https://"))


def parse_http_url(url: str, base: str = "") -> HttpUrl:
    """Return a parsed URL, resolved against `base` if it is relative.

    Raises DocumentError `refused`, whose message contains no secret.
    """
    if len(url) > MAX_URL_CHARS:
        raise DocumentError("refused", f"it is longer than {MAX_URL_CHARS} characters")
    try:
        parts = urlsplit(urljoin(base, url))
        host, port = (parts.hostname or "").encode("idna").decode("ascii"), parts.port
    except ValueError:
        raise DocumentError("refused", "it is no URL that can be understood") from None
    problems = {
        "it has a control character in it": CONTROL.search(url),
        f"only http and https are fetched, not {parts.scheme[:20]!r}": parts.scheme not in HTTP_PORTS,
        "it has a user or a password in it, which are not sent and not kept": "@" in parts.netloc,
        "it has no host name that can be looked up": not HOST.fullmatch(host),
        "a URL is one file and no glob; where * [ ] are meant, write %2A %5B %5D": not base and re.search(r"[*\[\]]", parts.path),
    }
    for sentence, is_present in problems.items():
        if is_present:
            raise DocumentError("refused", sentence)
    path, query = quote(parts.path or "/", SAFE_CHARACTERS), quote(parts.query, SAFE_CHARACTERS + "?[]")
    return HttpUrl(parts.scheme, host, HTTP_PORTS[parts.scheme] if port is None else port, path, query)


def format_listed_url(url: str) -> str:
    """Return the `source` of a URL: as written, but with user and password hidden; such a URL is refused when it is read.

    `location.redact_url` is not used: it takes the `@` of `https://host:8080/@scope/a.pdf` for the end of a password, because a
    store's secret may contain a slash.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
        has_credentials = "@" in parts.netloc
    except ValueError:  # as for `https://me:pass/word@host/`, whose port would be `pass`
        has_credentials = True
    name = NOT_UTF8.sub(lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", hide_credentials(url) if has_credentials else url)
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def name_url(url: str, *, is_signature_named: bool = False) -> str:
    """Return the `source` of a URL whose query is not kept: `https://host/a.pdf?…3f9c…`, with a digest of the query.

    A signature is left out of the digest, so that a URL that was signed again keeps its name, unless `is_signature_named`.
    """
    path, mark, query = url.partition("?")
    if not mark:
        return url
    parameters = {part: part.partition("=")[0].lower() for part in query.split("&")}
    found = set(parameters.values())
    signed: set[str] = set().union(*(always | also for always, also in SIGNATURES if always <= found))
    kept = query if is_signature_named else "&".join(part for part, name in parameters.items() if name not in signed)
    return f"{path}?…{hashlib.sha256(kept.encode()).hexdigest()[:DIGEST_CHARS] if kept else ''}"


def redact_query(url: str) -> str:
    """Return a URL for messages, without its query, which may be a signature, and without credentials."""
    parts = re.split(r"[?#]", format_listed_url(url), maxsplit=1)
    return parts[0] + ("?…" if len(parts) > 1 else "")


# ---- Download -----------------------------------------------------------------------------------------------------


def fetch_url(url: str, max_bytes: int, policy: DownloadPolicy = PUBLIC_ONLY) -> bytes:
    """Return the bytes that a URL's server sends.

    Raises DocumentError: `refused`, `vanished` (404 and 410), `too_large`, `timeout`, or `unreadable`.
    """
    deadline = time.monotonic() + policy.download_s
    try:
        return follow_redirects(parse_http_url(url), max_bytes, policy.allow_private, deadline)
    except DocumentError as error:
        kind, reason = error.kind, error.message
    except TimeoutError:
        is_over = time.monotonic() >= deadline
        kind = "timeout"
        reason = f"it took more than {policy.download_s:g} s (`limits.download_s`)" if is_over else "its server does not answer"
    except ssl.SSLCertVerificationError as error:
        kind, reason = "refused", f"its certificate is not trusted: {error.verify_message}"
    except OSError as error:
        kind, reason = "unreadable", error.strerror or str(error)
    except (HTTPException, ValueError) as error:
        kind, reason = "unreadable", f"its server does not speak HTTP as it should ({type(error).__name__})"
    raise DocumentError(kind, f"{redact_query(url)} cannot be fetched: {reason}")


def follow_redirects(url: HttpUrl, max_bytes: int, allow_private: bool, deadline: float) -> bytes:
    """Return the body at a URL, or at the URL that it redirects to after at most `MAX_REDIRECTS` steps."""
    for _ in range(MAX_REDIRECTS + 1):
        with connect_checked(url.host, url.port, url.scheme == "https", allow_private, deadline) as connection:
            response = send_request(connection, url, max_bytes, deadline)
            if response.status not in REDIRECTS:
                return read_body(response, max_bytes)
            url = resolve_redirect(url, response.headers["Location"] or "")
    raise DocumentError("refused", f"it redirects more than {MAX_REDIRECTS} times")


def resolve_redirect(url: HttpUrl, location: str) -> HttpUrl:
    """Return the target of a redirect. Raises DocumentError for a missing, refused or unencrypted one."""
    if not location:
        raise DocumentError("unreadable", "it redirects without saying where to")
    target = parse_http_url(location.encode("latin-1").decode("utf-8", "replace"), url.url)
    if url.scheme == "https" and target.scheme == "http":
        raise DocumentError("refused", f"it redirects from https to http ({redact_query(target.url)})")
    return target


def send_request(connection: socket.socket, url: HttpUrl, max_bytes: int, deadline: float) -> HTTPResponse:
    """Send a GET request and return the response with its headers read and its body unread."""
    lines = (
        f"GET {url.target} HTTP/1.1",
        f"Host: {url.authority}",
        f"User-Agent: pipeline/{__version__}",
        "Accept: */*",
        "Accept-Encoding: identity",
        "Connection: close",
    )
    connection.settimeout(compute_time_left(deadline))
    connection.sendall("\r\n".join((*lines, "", "")).encode("ascii"))
    response = HTTPResponse(cast(Any, BoundedSocketReader(connection, max_bytes, deadline)), method="GET")
    response.begin()
    return response


def read_body(response: HTTPResponse, max_bytes: int) -> bytes:
    """Return the body of a response. Raises DocumentError unless its status is 200 and its body plain, complete and small enough."""
    if response.status != 200:
        raise DocumentError("vanished" if response.status in (404, 410) else "unreadable", f"its server answers {response.status}")
    for name, allowed in ENCODINGS.items():
        found = ", ".join(response.headers.get_all(name, ())).strip().lower()
        if found not in allowed:
            raise DocumentError("refused", f"its server sends it as {name}: {found[:40]!r}, unasked; nothing is unpacked")
    if response.length is not None and response.length > max_bytes:
        raise make_size_error(max_bytes, f"has {response.length} bytes")
    data = io.BytesIO()
    while block := response.read1(READ_BYTES):
        if data.tell() + len(block) > max_bytes:
            raise make_size_error(max_bytes)
        data.write(block)
    if response.length:
        raise DocumentError("unreadable", f"the connection ended {response.length} bytes too early")
    return data.getvalue()


def make_size_error(max_bytes: int, problem: str = "is larger") -> DocumentError:
    return DocumentError("too_large", f"it {problem}; `limits.max_file_mib` allows {max_bytes / 2**20:g} MiB")


class BoundedSocketReader(io.RawIOBase):
    """Reader for everything a server sends, with one deadline and a byte limit a little above that of the body.

    http.client alone has neither: its timeout starts again at each read, it reads any number of trailers, and it reads a chunk
    of -1 bytes to the end of the stream. All of that passes through `readinto`.
    """

    def __init__(self, connection: socket.socket, max_bytes: int, deadline: float) -> None:
        self.connection, self.max_bytes, self.deadline = connection, max_bytes, deadline
        self.left_bytes = max_bytes + max_bytes // 8 + HEADERS_BYTES

    def makefile(self, _: str) -> io.BufferedReader:
        return io.BufferedReader(self, READ_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.connection.settimeout(compute_time_left(self.deadline))
        count = self.connection.recv_into(buffer)
        self.left_bytes -= count
        if self.left_bytes < 0:
            raise make_size_error(self.max_bytes)
        return count
