"""Row types: the fields of each are the columns of the Arrow schema that it describes."""

from __future__ import annotations

import pytest

from pipeline.flow.answer_writer import RECEIPT_COLUMNS
from pipeline.flow.settle_pass import SETTLED_SCHEMA, SettledRow
from pipeline.output.ledger import DISAGREEMENT_TYPE, FAILURE_TYPE, LEDGER_SCHEMA, PAGE_TYPE, TOKEN_TYPE
from pipeline.output.sources import SOURCE_SCHEMA
from pipeline.records import FailureRow, LedgerRow, PageRow, ReceiptRow, SourceRow, TokenRow
from pipeline.stages.record_plan import PROVENANCE_COLUMNS, DisagreementRow, ProvenanceRow


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (SourceRow, SOURCE_SCHEMA.names),
        (LedgerRow, LEDGER_SCHEMA.names),
        (FailureRow, [field.name for field in FAILURE_TYPE]),
        (PageRow, [field.name for field in PAGE_TYPE]),
        (TokenRow, [field.name for field in TOKEN_TYPE]),
        (SettledRow, SETTLED_SCHEMA.names),
        (DisagreementRow, [field.name for field in DISAGREEMENT_TYPE]),
        (ProvenanceRow, list(PROVENANCE_COLUMNS)),
    ],
)
def test_a_row_type_has_the_fields_of_its_schema(row: type, columns: list[str]) -> None:
    assert list(row.__annotations__) == columns


def test_a_receipt_has_columns_of_the_ledger_and_what_its_engine_says() -> None:
    assert {*RECEIPT_COLUMNS} <= {*LEDGER_SCHEMA.names}
    assert {*ReceiptRow.__annotations__} - {*RECEIPT_COLUMNS} == {"pages_shown", "actor", "alive_s", "busy_s"}
