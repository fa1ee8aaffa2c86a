"""The command line with a scripted run: no Ray and no model, but their noise.

    python -m tests.support.scripted_run run JOB …

`flow.run` goes through its phases over the documents of the job's folder and writes to every place where Ray writes: descriptors 1 and 2,
sys.stdout and sys.stderr, Python's log; all of these also from a thread that never ends, and again while the process ends.
Environment variables: PAUSE_S, seconds a step; DIE_IN, the phase in which the process is killed.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable

import pipeline
from pipeline import cli
from pipeline.events import emit_event
from pipeline.job import Job
from pipeline.report import Phase, Progress, Report

NOISE = "(raylet) There are infinite retries remaining, so the task will be retried."
PAUSE_S = float(os.environ.get("PAUSE_S", "0.1"))


def make_noise() -> None:
    for descriptor in (1, 2):
        os.write(descriptor, f"{NOISE}\n".encode())
    for stream in (sys.stdout, sys.stderr):
        print(NOISE, file=stream)
    logging.getLogger("ray").error(NOISE)


def make_noise_often() -> None:
    while True:
        make_noise()
        time.sleep(0.01)


def run_scripted(
    job: Job, limit: int | None, on_progress: Callable[[Progress], None], on_demo: Callable[[str], None] | None, *_: object
) -> Report:
    documents = len(list((job.file.parent / "in").iterdir()))
    atexit.register(make_noise)
    threading.Thread(target=make_noise_often, daemon=True).start()

    def enter(phase: Phase, total: int | None, done: int = 0) -> None:
        on_progress(Progress(phase, total, done, 2 * done, done, 0, 1.0))
        if os.environ.get("DIE_IN") == phase:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(PAUSE_S)

    emit_event("scripted")
    enter(Phase.LISTING, None)
    enter(Phase.LISTING, documents)
    enter(Phase.STARTING_RAY, documents)
    if on_demo:
        on_demo("Qwen/Qwen2.5-VL-7B-Instruct-AWQ")
    enter(Phase.LOADING_MODEL, documents)
    for phase in (Phase.ASKING, Phase.SETTLING):
        for done in range(documents + 1):
            enter(phase, documents, done)
    return Report(
        job.sections.name, str(job.output), "demo", True, documents=documents, records=documents, statuses={"extracted": documents}
    )


if __name__ == "__main__":
    logging.getLogger("ray").addHandler(logging._StderrHandler())  # as Ray's own: writes to what sys.stderr is at the time
    scripted = types.ModuleType("pipeline.flow")
    vars(scripted)["run"] = run_scripted
    sys.modules["pipeline.flow"] = vars(pipeline)["flow"] = scripted
    cli.start_program()
