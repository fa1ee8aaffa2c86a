"""Locations: takes the text of a path or URL and returns a local path or a checked object store URL, without opening either.

out/invoices                  a local folder
s3://bucket/out/invoices      an object store
s3://KEY:SECRET@bucket/out    refused: credentials come from the environment, and the message does not repeat these
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import JobError

Location = Path | str
"""A local path, or an object store URL that passed `check_store_url`."""
STORE_PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "az": ("adlfs", "azure"), "abfs": ("adlfs", "azure")}
"""Object store schemes: the package that each needs, and the extra of this package that installs it."""
URL_PATTERN = re.compile(rf"([A-Za-z][A-Za-z0-9+.-]*)://(.*)|({'|'.join(STORE_PACKAGES)}):/[^/]", re.DOTALL)
"""A URL, or an object store URL that pathlib reduced to one slash."""
GLOB_CHARACTERS = re.compile(r"[*?\[]")
CREDENTIALS = re.compile(r"(?<=://).*@", re.DOTALL)
QUERY = re.compile(r"(https?://[^?#]*)[?#].*", re.DOTALL | re.IGNORECASE)


def is_url(text: str) -> bool:
    return URL_PATTERN.match(text) is not None


def parse_scheme(text: str) -> str:
    """Return the scheme of a URL in lower case, "" for a path."""
    found = URL_PATTERN.match(text)
    return (found[1] or "").lower() if found else ""


def is_store_url(text: str) -> bool:
    """Return whether this is the URL of an object store."""
    return parse_scheme(text) in STORE_PACKAGES


def has_secret(url: str) -> bool:
    """Return whether a URL has a user or a password before its bucket.

    A secret may contain a slash, so the part before the first slash may end inside it; a bucket that is an ARN has colons too.
    """
    bucket = url.partition("://")[2].partition("/")[0]
    return "@" in bucket or (":" in bucket and "@" in url and not bucket.startswith("arn:"))


def redact_url(url: str) -> str:
    """Return a URL without user and password, for messages."""
    return hide_credentials(url) if has_secret(url) else url


def hide_credentials(url: str) -> str:
    """Return a URL with `***` in place of everything from `://` to the last `@`."""
    return CREDENTIALS.sub("***@", url)


def hide_query(text: str) -> str:
    """Return a text without what follows the query mark of an http(s) URL in it: the query may be a signature."""
    return QUERY.sub(r"\1?…", text)


def check_store_url(text: str) -> str:
    """Return an object store URL without a trailing slash. Raises ValueError with a sentence that repeats no secret."""
    found = URL_PATTERN.match(text)
    if found and not found[1]:
        raise ValueError("a slash is missing: write the URL as text (s3://bucket/folder); pathlib removes one of the two slashes")
    if not found or found[1].lower() not in STORE_PACKAGES:
        raise ValueError(f"it must be a folder or a URL that begins with {', '.join(f'{scheme}://' for scheme in STORE_PACKAGES)}")
    if has_secret(text):
        raise ValueError("it contains a user or a password; set them in the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID, …)")
    path = found[2].rstrip("/")
    if not path or path.startswith("/") or "//" in path or ".." in path.split("/"):
        raise ValueError("after '://' it must have a bucket and folders, separated by single slashes and without '..'")
    return f"{found[1].lower()}://{path}"


def parse_location(text: str) -> Location:
    """Return the location of an output folder. Raises JobError for a URL that is not an object store's."""
    try:
        return check_store_url(text) if is_url(text) else Path(text)
    except ValueError as error:
        raise JobError(f"output {redact_url(text)!r}: {error}", key="output.path") from None
