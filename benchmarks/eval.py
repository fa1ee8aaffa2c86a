"""How long does `pipeline eval` take for 10,000 documents? Writes an output with known mistakes, scores it and prints a table.

    python benchmarks/eval.py [--documents 10000] [--wrong 0.05]

The documents are invoices of schemas/invoice.json with 0 to 12 line items. A share of the values is changed, removed or invented, and one
document in twenty lacks an item. Each answer has a token for every two letters, with its log-probability. The scores are compared with
the mistakes that were made. The bound is one minute of CPU time; on a busy machine the clock's time is longer.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import schema
from pipeline.output import Output
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.shards import write_shard
from pipeline.schema.arrow import ArrowPlan

ROOT = Path(__file__).parents[1]
BOUND_S = 60.0
TOLERATED = 0.001
"""Share of the mistakes by which the count may differ: where an item is missing beside a changed one, another pairing can be better."""
SHARD_ROWS = 1000
WORDS = "Tea Milk Steel Saw Hose Hosting Support Twin Screw Bolt Keyboard Monitor Copper Muffin Garden Bikes Tools Systems Motor".split()
Values = dict[str, Any]


def main() -> int:
    """Print the table; return 1 when it used more than the bound or the mistakes were counted wrongly."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--wrong", type=float, default=0.05, help="share of wrong values (default: %(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output, truth = Path(folder) / "out", Path(folder) / "truth.jsonl"
        made = write_documents(output, truth, given.documents, given.wrong)
        start = time.monotonic()
        command = [sys.executable, "-m", "pipeline.cli", "eval", str(output), "--truth", str(truth), "--by", "currency", "--json"]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        elapsed_s, used = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    scores = json.loads(ended.stdout)["scores"]
    counted = {name: scores["total"]["outcomes"][name] for name in ("wrong", "missing", "invented")}
    print(f"documents {scores['documents']}, values {scores['total']['cells']}, errors {sum(counted.values())}")
    print(f"mistakes made    {dict(made)}\nmistakes counted {counted}")
    print(f"AUROC {scores['certainty']['auroc']:.3f} over {scores['certainty']['values']} values")
    cpu_s = used.ru_utime + used.ru_stime
    print(f"CPU {cpu_s:.1f} s (bound {BOUND_S:.0f}), elapsed {elapsed_s:.1f} s, peak memory {used.ru_maxrss / 1024:.0f} MiB")
    return int(cpu_s > BOUND_S or abs(sum(counted.values()) - made.total()) > TOLERATED * made.total())


def write_documents(folder: Path, truth: Path, count: int, wrong: float) -> Counter[str]:
    """Write an output and its truth; return the mistakes in it by their outcome."""
    draw, made = random.Random(0), Counter({"wrong": 0, "missing": 0, "invented": 0})
    given = json.loads((ROOT / "schemas" / "invoice.json").read_text())
    plan, output = ArrowPlan(schema.load_schema(ROOT / "schemas" / "invoice.json")), Output(folder)
    output.create()
    output.write_job({"job": {"name": "eval"}, "fingerprint": "f", "asked": {"extract": {"schema": given, "per": "document"}}})
    about = pa.schema([(name, pa.string()) for name in ("_source", "_doc_id", "_status")])
    with truth.open("w") as lines:
        for start in range(0, count, SHARD_ROWS):
            records, ledger = [], []
            for number in range(start, min(start + SHARD_ROWS, count)):
                values = draw_invoice(draw)
                lines.write(json.dumps({"source": f"{number}.pdf", **values}) + "\n")
                wrong_paths = make_mistakes(values, draw, wrong, made)
                answer = json.dumps(values, separators=(",", ":"))
                name, columns = f"in/{number}.pdf", plan.build_row(schema.parse_json(answer))[0]
                records.append({**columns, "_source": name, "_doc_id": name, "_status": "extracted"})
                ledger.append(make_request(name, answer, wrong_paths, draw))
            write_shard(output.records, pa.Table.from_pylist(records, pa.schema([*plan.schema, *about])), [f"{start}"])
            write_shard(output.requests, pa.Table.from_pylist(ledger, LEDGER_SCHEMA), [f"{start}"])
    return made


def draw_invoice(draw: random.Random) -> Values:
    def name(words: int = 2) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    def amount() -> float:
        return draw.randrange(100, 10**6) / 100

    items = [
        {"description": f"{name()} {at}", "quantity": draw.randrange(1, 9), "unit_price": amount(), "amount": amount()}
        for at in range(draw.randrange(13))
    ]
    dates = [f"20{draw.randrange(10, 26)}-{draw.randrange(1, 13):02}-{draw.randrange(1, 29):02}" for _ in range(2)]
    return {
        "seller_name": name(3),
        "seller_tax_id": f"DE{draw.randrange(10**8, 10**9)}",
        "buyer_name": name(3),
        "invoice_number": f"{draw.randrange(10**6)}",
        "invoice_date": dates[0],
        "due_date": draw.choice([None, dates[1]]),
        "purchase_order": draw.choice([None, f"PO {draw.randrange(10**5)}"]),
        "currency": draw.choice(["EUR", "USD", "GBP"]),
        "line_items": items,
        "subtotal": draw.choice([None, amount()]),
        "tax_amount": draw.choice([None, amount()]),
        "total": amount(),
    }


def make_mistakes(values: Values, draw: random.Random, wrong: float, made: Counter[str]) -> set[str]:
    """Change, remove and invent values in place and count them; return the changed values as JSON."""
    changed = set[str]()
    items = values["line_items"]
    if items and draw.random() < 0.05:
        made["missing"] += sum(value is not None for value in items.pop(draw.randrange(len(items))).values())
    for part in (values, *items):
        for key in ("description", "unit_price", "seller_name", "invoice_number", "due_date", "total"):
            if key not in part or draw.random() >= wrong:
                continue
            before = part[key]
            if before is None:
                part[key] = "2001-01-01"
                made["invented"] += 1
            elif draw.random() < 0.3:
                part[key] = None
                made["missing"] += 1
            else:
                part[key] = before + 1 if isinstance(before, float) else "1999-09-09" if key == "due_date" else f"{before[:-1]}#"
                made["wrong"] += 1
            changed.add(json.dumps(part[key]))
    return changed


def make_request(name: str, answer: str, changed: set[str], draw: random.Random) -> Values:
    """Return a ledger row with two letters a token; values that are wrong are less certain, most of the time."""
    starts = {answer.find(text) for text in changed} - {-1}
    pieces = [answer[at : at + 2] for at in range(0, len(answer), 2)]
    doubtful = {start // 2 + step for start in starts for step in range(3)}
    tokens = [
        {"text": piece, "logprob": -draw.expovariate(1) if at in doubtful else -draw.expovariate(50)} for at, piece in enumerate(pieces)
    ]
    whole = {"key": name, "attempt": 1, "source": name, "doc_id": name, "first_page": 1, "last_page": 1, "page_count": 1}
    return {**whole, "status": "extracted", "answer": answer, "tokens": tokens}


if __name__ == "__main__":
    sys.exit(main())
