"""A server that really reads what it is shown confirms true values in the parts of pages, and altered ones hardly ever."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
RECEIPTS = ROOT.parent / "shared" / "corpora" / "receipts"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """`benchmarks/reread.py`, whose server reads images by OCR."""
    pytest.importorskip("rapidocr")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("reread_benchmark", ROOT / "benchmarks" / "reread.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


def test_true_values_of_a_sample_are_reread_and_altered_totals_and_dates_are_not(benchmark: ModuleType) -> None:
    documents = [one for one in benchmark.list_documents(ROOT / "jobs" / "samples") if one[0].name in ("invoice-01.pdf", "receipt-06.png")]
    counts, server = benchmark.measure_documents(documents)
    for kind in ("total", "date"):
        assert counts[kind, "true reread"] == counts[kind, "true"] > 0
        assert (counts[kind, "altered"] > 0, counts[kind, "altered reread there"]) == (True, 0)
    assert server.requests["records"] == 2 * (1 + 3)
    assert server.requests["readings"] >= server.requests["places"] == server.requests["records"]


@pytest.mark.skipif(not RECEIPTS.exists(), reason="the receipts are not here")
def test_the_total_and_the_date_of_a_real_receipt_are_reread(benchmark: ModuleType) -> None:
    counts, _ = benchmark.measure_documents(one for one in benchmark.list_documents(RECEIPTS) if one[0].name == "048.jpg")
    assert [counts[kind, "true reread"] for kind in ("total", "date")] == [1, 1]
    assert [counts[kind, "altered reread there"] for kind in ("total", "date")] == [0, 0]
