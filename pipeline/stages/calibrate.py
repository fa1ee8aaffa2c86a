"""Facts of an output: its ledger in, what is known of each value of its records out, as settling knows it.

The ledger is settled in memory, so that a calibration is fitted on the facts that it is applied to later.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import JobError
from pipeline.evidence.calibration import ValueFacts
from pipeline.job import Job
from pipeline.job.sections import JobSections
from pipeline.output.ledger import iterate_requests, read_requests
from pipeline.output.records import RecordTable
from pipeline.output.sources import read_sources
from pipeline.output.words import group_words, read_ocr_words
from pipeline.stages.record_plan import RecordPlan
from pipeline.stages.settle import SettleStage
from pipeline.stages.value_facts import rate_raw
from pipeline.storage.location import parse_location

DOCUMENTS_AT_ONCE = 200


def restore_job(records: RecordTable) -> Job:
    """Return the job that an output was made by, without its calibration. Raises JobError for a `job.yaml` of another version."""
    keys = records.job["job"]
    try:
        sections = JobSections.model_validate(keys | {"extract": keys["extract"] | {"rules": records.job.get("rules", [])}})
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(
            f"{records.place}/job.yaml is not one of this version: {' '.join(str(error).split())[:200]}", records.place
        ) from None
    extract = sections.extract.model_copy(update={"calibration": None})
    sections = sections.model_copy(update={"extract": extract})
    return Job(Path(records.place) / "job.yaml", sections, records.schema, parse_location(records.place))


def collect_output_facts(records: RecordTable) -> dict[tuple[str, int | None], list[ValueFacts]]:
    """Return the facts of the values of each record by its source and page; of values without log-probabilities there are none.

    Raises JobError and RunError.
    """
    job = restore_job(records)
    stage = SettleStage(RecordPlan(job), job.pages_per_request, str(records.job["fingerprint"]))
    taken: list[ValueFacts] = []

    def note_facts(facts: Sequence[ValueFacts]) -> list[float]:
        taken.extend(facts)
        return rate_raw(facts)

    stage.rate = note_facts
    documents, found = read_sources(records.output), dict[tuple[str, int | None], list[ValueFacts]]()
    for start in range(0, documents.num_rows, DOCUMENTS_AT_ONCE):
        some = documents.slice(start, DOCUMENTS_AT_ONCE)
        rows = iterate_requests(read_requests(records.output, some["doc_id"], with_tokens=True))
        words = read_ocr_words(records.output, some["doc_id"]).to_pylist() if stage.plan.uses_ocr else []
        for record in stage.settle_documents(some.to_pylist(), rows, group_words(words)):
            found[str(record["_source"]), record["_page"]] = taken[:]
            taken.clear()
    return found
