"""Runs that are killed, starved and robbed, then resumed -> a table of what that cost: lost, doubled, asked twice, hung.

    python benchmarks/reliability.py [--kills 50] [--documents 40] [--only NAME ...] [--seed 0]

Makes its own documents, lets the demonstration model read them once undisturbed, and then again under each fault, as
`pipeline run` in processes of its own; after a fault the same command runs until it ends with 0 or 1. Needs Linux, and
root or user namespaces for the small volumes. Knows nothing of how a run survives; it reads what lies on the disk.

    lost          documents without a record at the end, and answers that were in the ledger and no longer are
    doubled       records beyond one per document, rows of the ledger beyond one per request and attempt
    asked twice   requests asked again although their answers were in the ledger when the fault struck
    hung          runs that did not end within `--patience` seconds
    gone s        the longest that processes of a run stayed when its driver had ended
    left over     processes still there after a third of the patience, temporary files after the last run
    same          the records are byte for byte those of the undisturbed run; with eight requests at once their confidences are left out,
                  whose last bits depend on the batch
    ends          exit codes of the runs that were struck; in brackets those of the runs after
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import faults
import runs
from faults import FAULTS, FULL, Fault
from runs import Ended, Ledger, Run

from pipeline.demo import documents, drawing

JOB = """\
name: reliability
source: {paths: [in]}
extract: {schema: schema.json, re_asks: 0}
model: {name: demo, batch_size: 1}
sampling: {max_tokens: 256}
limits: {timeout_s: 10, memory_mib: 256}
output: {path: out}
"""
"""One request at a time: beside others in a batch, the last bit of a float may differ, and once in a great while a character."""
RESUMES = 3
AFTER_FIRST_ANSWER_S = 6.0
"""How long after the first answer, as the undisturbed run had it, a kill at any time may come: longer than a shard is held."""


@dataclass
class Tally:
    """A row of the table."""

    tried: int = 0
    lost: int = 0
    doubled: int = 0
    twice: int = 0
    hung: int = 0
    left: int = 0
    gone_s: float = 0.0
    same: bool = True
    ends: Counter[str] = field(default_factory=Counter)
    later: Counter[str] = field(default_factory=Counter)
    unexpected: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.same and not any((self.lost, self.doubled, self.twice, self.hung, self.left, self.unexpected))

    def ended(self, ended: Ended, allowed: Sequence[int], *, struck: bool) -> None:
        """Count the end of one run."""
        (self.ends if struck else self.later)[str(ended.code)] += 1
        self.hung += ended.code is None
        self.left += len(ended.left)
        self.gone_s = max(self.gone_s, ended.gone_s)
        self.notes += [f"left: {title}" for title in ended.left]
        if ended.noise:
            self.unexpected += 1
            self.notes.append(f"on stdout, beside the JSON: {ended.noise.splitlines()[0][:150]}")
        if ended.code is not None and (ended.code not in allowed or (ended.code == 1 and not ended.done)):
            self.unexpected += 1
            self.notes.append(f"ended with {ended.code}: {' | '.join(ended.err.strip().splitlines()[-2:])[-300:] or 'it says nothing'}")

    def compared(self, before: Ledger, after: Ledger) -> None:
        """Count what one run did to answers that were there."""
        lost = [key for key in before if key not in after]
        twice = [key for key, times in before.items() if any(time not in times for time in after.get(key, times))]
        self.lost, self.twice = self.lost + len(lost), self.twice + len(twice)


class Bench:
    """The documents, the undisturbed run, and where the others are made."""

    def __init__(self, folder: Path, count: int, patience_s: float, seed: int) -> None:
        self.folder, self.patience_s, self.rng = folder, patience_s, random.Random(seed)
        self.job, self.names = folder / "job.yaml", [f"in/{number:03}.pdf" for number in range(count)]
        (folder / "in").mkdir()
        self.job.write_text(JOB)
        shutil.copy(runs.ROOT / "schemas" / "receipt.json", folder / "schema.json")
        for number, name in enumerate(self.names):
            (folder / name).write_bytes(drawing.draw_pdf(documents.draw_sample(documents.HELD_OUT + number, "receipt").sheets))
        self.undisturbed = folder / "undisturbed"
        self.first_answer_s = 0.0

    def start(self, output: Path, *arguments: str) -> Run:
        return Run(self.job, output, arguments)

    def reference(self) -> str:
        """Run undisturbed; return a sentence about it."""
        run = self.start(self.undisturbed)
        run.wait(lambda: any((self.undisturbed / "requests").glob("*.parquet")), self.patience_s)
        self.first_answer_s = time.monotonic() - run.started
        ended = run.end(self.patience_s)
        if ended.code not in (0, 1) or ended.report["records"] != len(self.names):
            sys.exit(f"the undisturbed run ended with {ended.code}: {ended.err[-1000:]}")
        elapsed_s = time.monotonic() - run.started
        return f"undisturbed: {len(self.names)} documents, first answer after {self.first_answer_s:.1f} s, end after {elapsed_s:.1f} s"

    def attack(self, name: str, fault: Fault, output: Path) -> Tally:
        """Strike one job after another until there were enough strikes; resume and judge each."""
        tally, goes = Tally(), 0
        while tally.tried < fault.tries and goes < 3 * fault.tries:
            at, done = output / f"job-{goes}", False
            while tally.tried < fault.tries and goes < 3 * fault.tries and not done:
                goes, done = goes + 1, self.struck(fault, at, tally)
            self.finish(fault, at, tally, done=done)
        return tally

    def struck(self, fault: Fault, output: Path, tally: Tally) -> bool:
        """Start a run, strike it, and say whether it came to its end all the same."""
        before = runs.read_ledger(output)
        run = self.start(output, *self.settings(fault))
        self.await_moment(fault.moment, run, output)
        at_strike = runs.read_ledger(output)
        hit = fault.strike(run, output, self.rng)
        ended = run.end(self.patience_s)
        if not fault.robs:
            after = runs.read_ledger(output)
            tally.compared(before | at_strike, after)
        tally.tried += hit
        tally.ended(ended, fault.codes if hit else (0, 1), struck=hit)
        damaged = fault.mend(output, self.rng)
        return self.mended(output, damaged, tally) if damaged else ended.done

    def mended(self, output: Path, damaged: str, tally: Tally) -> bool:
        """Resume after a shard was damaged, and see that it is named."""
        ended = self.start(output).end(self.patience_s)
        tally.ended(ended, (0, 1), struck=False)
        if damaged not in ended.err + str(ended.report):
            tally.unexpected += 1
            tally.notes.append(f"{damaged} was damaged and not named")
        return ended.done

    def await_moment(self, moment: str, run: Run, output: Path) -> None:
        """Wait until it is time to strike."""
        known = set(output.glob("requests/*.parquet"))
        if moment == "answering":
            run.wait(lambda: set(output.glob("requests/*.parquet")) - known, self.patience_s)
            pause_s = self.rng.uniform(0, 1)
        elif moment == "drawing":
            run.wait(lambda: run.find("pipeline.render.worker"), self.patience_s)
            pause_s = self.rng.uniform(0, 1)
        else:
            pause_s = self.rng.uniform(0, self.first_answer_s + AFTER_FIRST_ANSWER_S)
        until = time.monotonic() + pause_s
        run.wait(lambda: time.monotonic() >= until, self.patience_s)

    def finish(self, fault: Fault, output: Path, tally: Tally, *, done: bool) -> None:
        """Resume a job until it is done, and judge it."""
        for _ in range(RESUMES * (not done)):
            before = runs.read_ledger(output)
            ended = self.start(output, *self.settings(fault)).end(self.patience_s)
            tally.ended(ended, (0, 1), struck=False)
            tally.compared(before, runs.read_ledger(output))
            if ended.done:
                break
        if fault.retry and any(row["_status"] == "failed" for row in runs.read_records(output)):
            tally.ended(self.start(output, "--retry", "failed").end(self.patience_s), (0, 1), struck=False)
        self.judge(output, tally, runs.read_values if fault.settings else runs.record_bytes)

    def judge(self, output: Path, tally: Tally, read: Callable[[Path], object]) -> None:
        """Compare a finished job with the undisturbed one; of the records what `read` returns of them."""
        count, ledger = runs.settled(output), runs.read_ledger(output)
        tally.lost += sum(name not in count for name in self.names)
        tally.doubled += sum(number - 1 for number in count.values()) + sum(len(times) - 1 for times in ledger.values())
        tally.left += len(found := runs.temporary(output))
        tally.notes += [f"left: {name}" for name in found]
        tally.same &= read(output) == read(self.undisturbed)

    @staticmethod
    def settings(fault: Fault) -> Iterator[str]:
        for setting in fault.settings:
            yield from ("--set", setting)

    # ---- Faults that are no strike ----------------------------------------------------------------------------------

    def read_only(self, output: Path) -> Tally:
        """Start on a volume that takes nothing, then on the same one when it does."""
        tally = Tally(tried=1)
        with runs.volume(output, 64) as place:
            runs.remount(place, "ro")
            tally.ended(self.start(place / "out").end(self.patience_s), (2,), struck=True)
            runs.remount(place, "rw")
            self.finish(Fault(faults.fill, "", ()), place / "out", tally, done=False)
        return tally

    def hostile(self, output: Path) -> Tally:
        """Put a page that never ends and one that needs 30 GiB among the documents: they fail, the others do not notice."""
        tally, kinds = Tally(tried=2), {"in/endless.pdf": "timeout", "in/huge.pdf": "memory"}
        pages = {"in/endless.pdf": faults.endless_page(), "in/huge.pdf": faults.page_of_30_gib()}
        for name, page in pages.items():
            (self.folder / name).write_bytes(page)
        tally.ended(self.start(output).end(self.patience_s), (1,), struck=True)
        for name in pages:
            (self.folder / name).unlink()
        rows = runs.read_records(output)
        found = {row["_source"]: (row["_failure"] or {}).get("kind") for row in rows}
        tally.lost = sum(name not in found for name in [*self.names, *pages])
        tally.doubled, tally.left = len(rows) - len(found), len(runs.temporary(output))
        others = [row for row in rows if row["_source"] not in pages]
        tally.same = others == runs.read_records(self.undisturbed)
        wrong = [f"{name} failed of {found.get(name)}, not of {kind}" for name, kind in kinds.items() if found.get(name) != kind]
        tally.unexpected, tally.notes = tally.unexpected + len(wrong), [*tally.notes, *wrong]
        return tally


def main() -> int:
    """Print the table; return 1 when something in it should not be there."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs of the driver")
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="faults whose names hold one of these words")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=180.0, metavar="S")
    parser.add_argument("--keep", type=Path, help="an empty folder to work in, kept at the end")
    options = parser.parse_args()
    if os.geteuid() and not subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.argv])  # root in a namespace of its own: it may mount
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and so their runs, ignore it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that volumes are unmounted and runs ended
    with workplace(options.keep) as folder:
        bench = Bench(folder, options.documents, options.patience, options.seed)
        print(bench.reference(), flush=True)
        return table(bench, scenarios(bench, options.kills), options.only)


@contextmanager
def workplace(keep: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        (keep or Path(folder)).mkdir(parents=True, exist_ok=True)
        try:
            yield (keep or Path(folder)).resolve()
        finally:
            Run.kill_all()


def scenarios(bench: Bench, kills: int) -> dict[str, Callable[[Path], Tally]]:
    """Return what is tried, by name; each makes its output in a folder of its own."""

    def attack(name: str, fault: Fault) -> Callable[[Path], Tally]:
        return lambda output: bench.attack(name, fault, output)

    def on_small_volume(output: Path) -> Tally:
        with runs.volume(output, 64) as place:
            return bench.attack("volume full", FULL, place)

    ready = {name: attack(name, fault) for name, fault in FAULTS.items()}
    kill = FAULTS["driver killed"]
    ready["driver killed"] = attack("driver killed", Fault(kill.strike, kill.moment, kill.codes, kills))
    return ready | {"volume of 64 MiB full": on_small_volume, "output read-only": bench.read_only, "hostile pages": bench.hostile}


def table(bench: Bench, ready: dict[str, Callable[[Path], Tally]], only: Sequence[str]) -> int:
    """Try each and print its row; below, what was odd."""
    heads = "fault,tried,documents,lost,doubled,asked twice,hung,gone s,left over,same,seconds,ends (later runs)".split(",")
    line = "{:<24} {:>5} {:>9} {:>4} {:>7} {:>11} {:>4} {:>6} {:>9} {:>4} {:>7}  {}"
    print(line.format(*heads), flush=True)
    wrong = 0
    for name, attempt in ready.items():
        if only and not any(word in name for word in only):
            continue
        started = time.monotonic()
        try:
            tally = attempt(bench.folder / name.replace(" ", "-"))
        except OSError as error:
            print(f"{name:<24} skipped: {error}", flush=True)
            continue
        ends = f"{shown(tally.ends)} ({shown(tally.later)})"
        counts = (tally.tried, len(bench.names), tally.lost, tally.doubled, tally.twice, tally.hung, round(tally.gone_s, 1), tally.left)
        print(line.format(name, *counts, "yes" if tally.same else "NO", round(time.monotonic() - started), ends), flush=True)
        for note in tally.notes:
            print(f"    {note}", flush=True)
        wrong += not tally.good
    return int(bool(wrong))


def shown(codes: Counter[str]) -> str:
    return ", ".join(f"{number}× {code}" for code, number in sorted(codes.items())) or "none"


if __name__ == "__main__":
    sys.exit(main())
