"""Folders of many shards and prefixes of many documents -> seconds to list and to read them, on this disk and in an object store.

    python benchmarks/listing.py --names 100000 --shards 2000 --latency-ms 100

A name costs nothing but its listing; a shard of one row costs its opening, which is what `settle` saves by gathering them.
The object store is moto's S3 server, in a process of its own on loopback (`pip install ".[dev]"`). It lists a thousand objects
a request, as S3 does, and most of the time is its own: so boto3, which does no more than ask, lists the same beside us.

Documents are listed side by side, which a server that does one thing at a time cannot show. So three listings of documents are asked of a
server that answers each page after `--latency-ms`, as S3 does after some 100 ms, and from a text that was made before: flat, in a hundred
folders, and two in a folder. boto3 lists the same beside us, one page after another.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar, TypeVar
from urllib.parse import parse_qs, urlsplit
from urllib.request import Request, urlopen

import fsspec
import pyarrow as pa

from pipeline.output import SHARD_SUFFIX, Output
from pipeline.output.compaction import compact_shards
from pipeline.output.ledger import LEDGER_SCHEMA, read_ledger_state
from pipeline.output.shards import write_shard
from pipeline.sources import find_documents
from pipeline.storage.listing import PAGE_KEYS
from pipeline.storage.store import FolderStore, ObjectStore

T = TypeVar("T")
BUCKET = "many"
OBJECT = '<Contents><Key>{}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"e"</ETag><Size>70000</Size></Contents>'
FOLDER = "<CommonPrefixes><Prefix>{}</Prefix></CommonPrefixes>"


def timed(what: str, work: Callable[[], T]) -> T:
    started, cpu = time.monotonic(), time.process_time()
    found = work()
    print(f"{what}: {time.monotonic() - started:.2f} s, of which {time.process_time() - cpu:.2f} s CPU")
    return found


def row(number: int) -> dict[str, object]:
    return {"key": f"{number:064x}", "attempt": 1, "source": f"{number}.pdf", "doc_id": f"{number * 7919:064x}", "status": "extracted"}


def name(number: int) -> str:
    return f"{number:024x}{SHARD_SUFFIX}"


def serve(names: int, ready: Connection) -> None:
    """The other process: a server whose bucket has so many objects; says where it is."""
    from moto.s3.models import s3_backends
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    urlopen(Request(f"{url}/{BUCKET}", method="PUT")).close()
    for number in range(names):
        s3_backends["123456789012"]["aws"].put_object(BUCKET, f"requests/{name(number)}", b"")
    ready.send(url)
    ready.recv()


@contextmanager
def other_process(serve: Callable[..., None], *given: object) -> Iterator[str]:
    """Run a server, and give its address."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(*given, there), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.kill()


def by_boto(url: str, prefix: str = "requests/") -> int:
    """Ask for all names and do nothing else."""
    import boto3

    pages = boto3.client("s3", endpoint_url=url).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return sum(len(page["Contents"]) for page in pages)


LAYOUTS: dict[str, Callable[[int], str]] = {
    "flat": lambda number: f"{number:07}.pdf",
    "a hundred folders": lambda number: f"{number % 100:02}/{number:07}.pdf",
    "two in a folder": lambda number: f"{number // 2:07}/{number % 2}.pdf",
}


class PageServer(BaseHTTPRequestHandler):
    """S3's listing of one bucket, and no more of S3: a page of keys and folders, after a wait."""

    protocol_version = "HTTP/1.1"
    keys: ClassVar[list[str]]
    latency_s: ClassVar[float]

    def do_GET(self) -> None:
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        prefix, token, by_folder = query.get("prefix", ""), query.get("continuation-token", ""), "delimiter" in query
        at = bisect_right(self.keys, token) if token else bisect_left(self.keys, prefix)
        entries: list[str] = []
        while at < len(self.keys) and self.keys[at].startswith(prefix) and len(entries) < PAGE_KEYS:
            slash = self.keys[at].find("/", len(prefix)) if by_folder else -1
            entries.append(self.keys[at] if slash < 0 else self.keys[at][: slash + 1])
            at = at + 1 if slash < 0 else bisect_left(self.keys, entries[-1][:-1] + "0")  # the character after the slash
        body = "".join(FOLDER.format(name) if name.endswith("/") else OBJECT.format(name) for name in entries)
        if at < len(self.keys) and self.keys[at].startswith(prefix):
            body += f"<IsTruncated>true</IsTruncated><NextContinuationToken>{self.keys[at - 1]}</NextContinuationToken>"
        time.sleep(self.latency_s)
        content = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{body}</ListBucketResult>'.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def serve_pages(names: int, layout: str, latency_s: float, ready: Connection) -> None:
    """The other process: a bucket of so many documents in a layout; says where it is."""
    PageServer.keys = sorted(f"docs/{LAYOUTS[layout](number)}" for number in range(names))
    PageServer.latency_s = latency_s
    server = ThreadingHTTPServer(("127.0.0.1", 0), PageServer)
    ready.send(f"http://127.0.0.1:{server.server_port}")
    server.serve_forever()


def list_documents(names: int, latency_s: float) -> None:
    """List the documents of each layout, with this package and with boto3."""
    url = f"s3://{BUCKET}/docs"
    for layout in LAYOUTS:
        with other_process(serve_pages, names, layout, latency_s) as endpoint:
            os.environ["AWS_ENDPOINT_URL"] = endpoint
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            found = timed(f"{names} documents, {layout}", lambda: find_documents([url], Path("/")).num_rows)
            assert found == timed("the same by boto3, one page after another", lambda: by_boto(os.environ["AWS_ENDPOINT_URL"], "docs/"))


def in_folders(names: int, shards: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        many = Path(place) / "many"
        many.mkdir()
        for number in range(names):
            os.close(os.open(many / name(number), os.O_CREAT | os.O_WRONLY))
        timed(f"{names} names listed", lambda: FolderStore(many).list_names(SHARD_SUFFIX))
        output = Output(Path(place) / "out")
        output.create()
        for number in range(shards):
            write_shard(output.requests, pa.Table.from_pylist([row(number)], LEDGER_SCHEMA), [str(number)])
        timed(f"{shards} shards of a row read", lambda: read_ledger_state(output))
        print(timed("gathered", lambda: compact_shards(output)), "shards fewer")
        timed("the same rows read", lambda: read_ledger_state(output))


def in_object_store(names: int) -> None:
    with other_process(serve, names) as os.environ["AWS_ENDPOINT_URL"]:
        found = timed(f"{names} objects listed", lambda: ObjectStore(f"s3://{BUCKET}/requests").list_names(SHARD_SUFFIX))
        assert len(found) == timed("the same by boto3", lambda: by_boto(os.environ["AWS_ENDPOINT_URL"]))


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--names", type=int, default=100_000)
    given.add_argument("--shards", type=int, default=2_000)
    given.add_argument("--latency-ms", type=float, default=100.0)
    wanted = given.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
    in_folders(wanted.names, wanted.shards)
    in_object_store(wanted.names)
    list_documents(wanted.names, wanted.latency_ms / 1000)


if __name__ == "__main__":
    main()
