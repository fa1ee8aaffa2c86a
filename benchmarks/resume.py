"""How much memory does a run take that is resumed and has nothing to ask? Prints the driver's peak; needs no Ray, no GPU and no weights.

    python benchmarks/resume.py [--documents 1000000]

The output of a finished run is synthesised: its ledger, compacted, its list of sources and its records' digests are left out, so that what
is measured ends where settling begins. The documents are only listed, with paths of 40 characters. The peak is that of a process of its
own. Returns 1 when it is above the bound.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.job import Job

BOUND_MIB, BOUND_DOCUMENTS = 500.0, 1_000_000
SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"], "additionalProperties": False}
JOB = """\
name: scale
source: {paths: [in]}
pages: {per_request: 1}
extract: {schema: schema.json}
model: {name: demo, batch_size: 64}
ray: {cpus_per_actor: 0.5}
output: {path: out}
"""


ROWS_PER_SHARD = 5000
STARTED_AT = datetime(2026, 1, 1, tzinfo=UTC)


def make_listing(count: int) -> pa.Table:
    """Return a listing of documents that do not exist, with paths of 40 characters."""
    numbers = pc.utf8_lpad(pa.array(np.arange(count)).cast(pa.string()), 32, "0")
    return pa.table(
        {
            "source": pc.binary_join_element_wise("in/", numbers, ".pdf", ""),
            "size_bytes": pa.array(np.ones(count, np.int64)),
            "version": pa.array(np.full(count, 1_760_000_000_000_000_000)).cast(pa.string()),
            "full_url": pa.nulls(count, pa.string()),
        }
    )


def load_job(folder: Path) -> Job:
    (folder / "job.yaml").write_text(JOB)
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    return Job.load(folder / "job.yaml")


def write_answers(folder: Path, count: int) -> None:
    """Write an output in which so many documents are answered."""
    from pipeline import engines
    from pipeline.flow import preparation
    from pipeline.output import Output
    from pipeline.output.compaction import compact_shards
    from pipeline.output.ledger import LEDGER_SCHEMA
    from pipeline.output.shards import write_shard
    from pipeline.output.sources import SOURCE_SCHEMA, read_sources, replace_sources
    from pipeline.stages.requests import compute_document_keys

    job = engines.resolve_engine(load_job(folder), 0)
    (output := Output(job.output)).create()
    output.write_job(preparation.describe_run(job))
    listing = make_listing(count)
    answered = {"attempt": 1, "first_page": 1, "last_page": 1, "status": "extracted", "asks": 1, "started_at": STARTED_AT}
    for start in range(0, count, ROWS_PER_SHARD):
        documents = listing.slice(start, ROWS_PER_SHARD).to_pylist()
        for document in documents:
            document |= {"doc_id": hashlib.sha256(document["source"].encode()).hexdigest(), "page_count": 1}
        keys = [next(iter(compute_document_keys(document, 1, job.fingerprint))) for document in documents]
        rows = [{**document, **answered, "key": key, "answer": '{"text":"x"}'} for document, key in zip(documents, keys, strict=True)]
        write_shard(output.requests, pa.Table.from_pylist(rows, LEDGER_SCHEMA))
        write_shard(output.sources, pa.Table.from_pylist(documents, SOURCE_SCHEMA))
    replace_sources(output, read_sources(output))
    compact_shards(output)


def resume_answered(folder: Path, count: int) -> float:
    """Return the peak memory in MiB of resuming that output."""
    from pipeline import flow
    from pipeline.flow import passes, pending

    listing = make_listing(count)
    pending.DocumentListing.begin = lambda job: pending.DocumentListing(job, listing)  # type: ignore[method-assign]
    passes.settle_output = lambda *_: None  # type: ignore[assignment]
    report = flow.run(load_job(folder))
    assert not report.requests_asked
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=BOUND_DOCUMENTS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.folder:
        print(resume_answered(chosen.folder, chosen.documents))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_answers(Path(folder), chosen.documents)
        command = [sys.executable, __file__, "--folder", folder, "--documents", str(chosen.documents)]
        own = os.environ | {"MIMALLOC_PURGE_DELAY": "0"}  # as `import pipeline` sets it, before pyarrow
        peak_mib = float(subprocess.run(command, capture_output=True, text=True, check=True, env=own).stdout)
    bound_mib = BOUND_MIB * max(1.0, chosen.documents / BOUND_DOCUMENTS)
    print(f"resume of {chosen.documents:,} answered documents: peak {peak_mib:.0f} MiB (bound {bound_mib:.0f})")
    return int(peak_mib > bound_mib)


if __name__ == "__main__":
    raise SystemExit(main())
