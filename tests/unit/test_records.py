"""Row types: the fields of each are the columns of the Arrow schema that it describes."""

from __future__ import annotations

from typing import get_type_hints

import pyarrow as pa
import pytest

from pipeline.flow.ask_pass import ANSWERED_SCHEMA, RENDERED_SCHEMA
from pipeline.flow.settle_pass import SETTLED_SCHEMA, SettledRow
from pipeline.output.ledger import FAILURE_TYPE, LEDGER_SCHEMA, PAGE_TYPE, TOKEN_TYPE
from pipeline.output.sources import SOURCE_SCHEMA
from pipeline.records import AnsweredRow, FailureRow, LedgerRow, PageRow, RequestRow, SourceRow, TokenRow
from pipeline.stages.settle import DISAGREEMENT_TYPE, PROVENANCE_COLUMNS, DisagreementRow, ProvenanceRow


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


@pytest.mark.parametrize(("row", "schema"), [(RequestRow, RENDERED_SCHEMA), (AnsweredRow, ANSWERED_SCHEMA)])
def test_rows_under_way_have_fields_for_all_columns_that_travel(row: type, schema: pa.Schema) -> None:
    assert {*schema.names} <= {*get_type_hints(row)}
