"""How long do token masks take, beside a step of the model? Prints a table; needs no GPU and no weights.

    python benchmarks/masks.py [--tokenizer FOLDER] [--batch 16] [--threads 1 2]

Sixteen answers to two schemas are written side by side, each a little behind the one before, over the real vocabulary of
Qwen2.5-VL. A step's cost is what its masks cost on the CPU: filling them, and moving each answer's grammar on by a token. The clock's times
hold only on an idle machine; CPU time, of all threads together, is what the share is taken of.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from pipeline.schema.grammar import Constraint, Vocabulary

ROOT = Path(__file__).parents[1]
STEP_MS = 30.0
"""A decoding step of Qwen2-VL-7B AWQ by transformers on an A100: Qwen's README gives 32.1 tokens/s at batch 1, 31 ms; bf16 takes 26."""
SHARE = 0.05
LINES = [{"description": f"Service level {n}, per hour", "quantity": n + 0.5, "unit_price": 99.95, "amount": 149.93} for n in range(12)]
INVOICE = {
    "seller_name": "Müller & Söhne GmbH",
    "seller_tax_id": "DE811234567",
    "buyer_name": "Northwind Traders Ltd.",
    "invoice_number": "2024-000123/7",
    "invoice_date": "2024-02-29",
    "due_date": None,
    "purchase_order": "PO 4500017",
    "currency": "EUR",
    "line_items": LINES,
    "subtotal": 1799.16,
    "tax_amount": 341.84,
    "total": 2141.0,
}
RECEIPT = {
    "merchant_name": "Café Köpenick",
    "receipt_number": "0042",
    "date": "2024-06-30",
    "currency": "EUR",
    "line_items": [{"description": "Espresso doppio", "quantity": 2, "amount": 5.6} for _ in range(12)],
    "tax_amount": 0.89,
    "total": 67.2,
    "payment_method": "card",
}


def main() -> int:
    """Print the table; return 1 when masks take more than their share of a step."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--tokenizer", type=Path, default=ROOT.parent / "shared" / "qwen2.5-vl-7b-awq")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    if not options.tokenizer.is_dir():
        print(f"skipped: {options.tokenizer} is not there; --tokenizer takes the folder of a Qwen2.5-VL checkpoint")
        return 0
    words = AutoTokenizer.from_pretrained(options.tokenizer)
    size = json.loads((options.tokenizer / "config.json").read_text())["vocab_size"]
    print(f"{size:,} tokens, batch {options.batch}, a step of {STEP_MS:g} ms")
    shares = [measure(words, size, options.batch, threads) for threads in options.threads]
    return int(max(shares) >= SHARE)


def measure(words: Any, size: int, batch: int, threads: int) -> float:
    """Print one line and return the median step's CPU time as a share of the model's step."""
    start_s = time.perf_counter()
    vocabulary = Vocabulary(words.backend_tokenizer.to_str(), size=size, eos_ids=[words.eos_token_id], threads=threads)
    load_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    rows = [answer(words, vocabulary, at) for at in range(batch)]
    begun_ms = (time.perf_counter() - start_s) * 1000
    clock_ms, cpu_ms = zip(*write(vocabulary, rows), strict=True)
    share = statistics.median(cpu_ms) / STEP_MS
    print(
        f"{threads} thread{'s' if threads > 1 else ' '}: tokenizer {load_s:.2f} s once, {batch} answers begun in {begun_ms:.1f} ms; "
        f"{len(clock_ms)} steps: by the clock p50 {statistics.median(clock_ms):.2f} ms, p99 {percentile_99(clock_ms):.2f} ms; "
        f"CPU time p50 {statistics.median(cpu_ms):.2f} ms ({share:.1%} of a step), p99 {percentile_99(cpu_ms):.2f} ms"
    )
    return share


def percentile_99(values: Sequence[float]) -> float:
    """Return what 99 of 100 values stay below."""
    return statistics.quantiles(values, n=100)[98]


def answer(words: Any, vocabulary: Vocabulary, at: int) -> tuple[Constraint, list[int]]:
    """Return the constraint of one row and the tokens that it will write."""
    name, value = ("invoice", INVOICE) if at % 2 else ("receipt", RECEIPT)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    tokens = words(text, add_special_tokens=False)["input_ids"]
    constraint = vocabulary.start_constraint((ROOT / "schemas" / f"{name}.json").read_text())
    for token in tokens[: 3 * at]:  # so that rows are in different places
        constraint.accept_token(token)
    return constraint, tokens[3 * at :]


def write(vocabulary: Vocabulary, rows: list[tuple[Constraint, list[int]]]) -> list[tuple[float, float]]:
    """Write all answers token by token; return each step's milliseconds by the clock and of CPU time."""
    constraints, steps = [row[0] for row in rows], []
    for at in range(min(len(tokens) for _, tokens in rows)):
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        vocabulary.compute_masks(constraints)
        for constraint, tokens in rows:
            constraint.accept_token(tokens[at])
        steps.append(((time.perf_counter() - start_s) * 1000, (time.process_time() - start_cpu_s) * 1000))
    return steps


if __name__ == "__main__":
    sys.exit(main())
