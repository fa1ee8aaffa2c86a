"""Records of an output, read back: an output folder in, its rows with their Arrow types and the columns of its schema out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import JobError
from pipeline.output import Output
from pipeline.output.shards import read_shards
from pipeline.schema import Schema, check_schema, parse_json
from pipeline.schema.arrow import ArrowPlan
from pipeline.storage.location import parse_location


@dataclass(frozen=True)
class RecordTable:
    """The records of an output, sorted by source and page."""

    place: str
    output: Output
    job: dict[str, Any]
    """The content of the output's `job.yaml`."""
    schema: Schema
    plan: ArrowPlan
    table: pa.Table

    @property
    def per_page(self) -> bool:
        return "_page" in self.table.column_names


def read_record_table(place: str) -> RecordTable:
    """Return the records of an output folder.

    Raises JobError when the place is no output folder or has no records, and RunError for damaged shards.
    """
    output = Output(parse_location(place))
    job = output.read_job()
    if job is None:
        raise JobError(f"{place} is not an output folder: it has no job.yaml", place)
    schema = check_schema(parse_json(json.dumps(job["asked"]["extract"]["schema"])))
    plan = ArrowPlan(schema)
    table = read_shards(output.records, None, pa.schema([]))
    if not table.num_rows:
        raise JobError(f"{place} has no records: run the job, or `pipeline settle`", place)
    if {*plan.schema.names, "_source"} - {*table.column_names}:
        raise JobError(f"the records in {place} lack columns of the schema in its job.yaml: run the job again", place)
    order = [("_source", "ascending"), *[("_page", "ascending")] * ("_page" in table.column_names)]
    return RecordTable(place, output, job, schema, plan, table.take(pc.sort_indices(table, order)))
