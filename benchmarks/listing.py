"""Folders of many shards -> seconds to list and to read them, before and after a compaction, on this disk and in an object store.

    python benchmarks/listing.py --names 100000 --shards 2000

A name costs nothing but its listing; a shard of one row costs its opening, which is what `settle` saves by gathering them.
The object store is moto's S3 server, in a process of its own on loopback (`pip install ".[dev]"`). It lists a thousand objects
a request, as S3 does, and most of the time is its own: so boto3, which does no more than ask, lists the same beside us.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar
from urllib.request import Request, urlopen

import pyarrow as pa

from pipeline.output import SHARD_SUFFIX, Output
from pipeline.output.compaction import compact_shards
from pipeline.output.ledger import LEDGER_SCHEMA, read_ledger_state
from pipeline.output.shards import write_shard
from pipeline.storage.store import FolderStore, ObjectStore

T = TypeVar("T")
BUCKET = "many"


def timed(what: str, work: Callable[[], T]) -> T:
    started = time.monotonic()
    found = work()
    print(f"{what}: {time.monotonic() - started:.2f} s")
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
def store(names: int) -> Iterator[str]:
    """Run the server, and give its address."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(names, there), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.kill()


def by_boto(url: str) -> int:
    """Ask for all names and do nothing else."""
    import boto3

    pages = boto3.client("s3", endpoint_url=url).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="requests/")
    return sum(len(page["Contents"]) for page in pages)


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
    os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
    with store(names) as os.environ["AWS_ENDPOINT_URL"]:
        found = timed(f"{names} objects listed", lambda: ObjectStore(f"s3://{BUCKET}/requests").list_names(SHARD_SUFFIX))
        assert len(found) == timed("the same by boto3", lambda: by_boto(os.environ["AWS_ENDPOINT_URL"]))


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--names", type=int, default=100_000)
    given.add_argument("--shards", type=int, default=2_000)
    wanted = given.parse_args()
    in_folders(wanted.names, wanted.shards)
    in_object_store(wanted.names)


if __name__ == "__main__":
    main()
