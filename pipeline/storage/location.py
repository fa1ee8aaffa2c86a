"""What someone wrote as a place -> a path here, or the URL of a prefix in an object store.

    out/invoices                  a folder here
    s3://bucket/out/invoices      an object store
    s3://KEY:SECRET@bucket/out    refused: secrets come from the environment, and messages do not repeat this one

Opens neither, and does not know whether there is anything.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import JobError

Location = Path | str
"""A path here, or the URL of an object store, checked by `checked`."""
STORE_PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "az": ("adlfs", "azure"), "abfs": ("adlfs", "azure")}
"""Schemes of object stores: the package that each needs, and the extra of this package that brings it."""
URL_PATTERN = re.compile(rf"([A-Za-z][A-Za-z0-9+.-]*)://(.*)|({'|'.join(STORE_PACKAGES)}):/[^/]", re.DOTALL)
"""A URL, or what pathlib makes of an object store's."""
CREDENTIALS = re.compile(r"(?<=://).*@", re.DOTALL)


def is_url(text: str) -> bool:
    return URL_PATTERN.match(text) is not None


def parse_scheme(text: str) -> str:
    """Return the scheme of a URL in lower case; nothing for a path."""
    found = URL_PATTERN.match(text)
    return (found[1] or "").lower() if found else ""


def is_store_url(text: str) -> bool:
    """Say whether this is the URL of an object store."""
    return parse_scheme(text) in STORE_PACKAGES


def has_secret(url: str) -> bool:
    """Say whether a URL has a user or a password where the bucket should stand.

    A secret may have a slash in it, so that what is before the first slash ends in the middle of one; an ARN has colons, too.
    """
    bucket = url.partition("://")[2].partition("/")[0]
    return "@" in bucket or (":" in bucket and "@" in url and not bucket.startswith("arn:"))


def redact_url(url: str) -> str:
    """Return a URL as messages may show it."""
    return hide_credentials(url) if has_secret(url) else url


def hide_credentials(url: str) -> str:
    """Return a URL with `***` in place of everything from `://` to the last `@`."""
    return CREDENTIALS.sub("***@", url)


def check_store_url(text: str) -> str:
    """Return an object store's URL without a slash at its end. Raises ValueError with a sentence that repeats no secret."""
    found = URL_PATTERN.match(text)
    if found and not found[1]:
        raise ValueError("it lost a slash: a URL is text (s3://bucket/folder), pathlib takes one of the two away")
    if not found or found[1].lower() not in STORE_PACKAGES:
        raise ValueError(f"allowed are folders and URLs that begin with {', '.join(f'{scheme}://' for scheme in STORE_PACKAGES)}")
    if has_secret(text):
        raise ValueError("it has a user or a password in it: the environment holds them (AWS_PROFILE, AWS_ACCESS_KEY_ID, …), no job does")
    path = found[2].rstrip("/")
    if not path or path.startswith("/") or "//" in path or ".." in path.split("/"):
        raise ValueError("after the two slashes come a bucket and, separated by single ones, folders")
    return f"{found[1].lower()}://{path}"


def parse_location(text: str) -> Location:
    """Return where results go, as someone wrote it. Raises JobError for a URL that cannot be written to."""
    try:
        return check_store_url(text) if is_url(text) else Path(text)
    except ValueError as error:
        raise JobError(f"output {redact_url(text)!r}: {error}") from None
