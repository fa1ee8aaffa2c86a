"""Metrics that Ray exports while a run goes on."""

from __future__ import annotations

import asyncio
import re
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import ray

from pipeline import flow
from pipeline.engines import Engine
from pipeline.flow import ask_pass
from pipeline.job import Job
from pipeline.records import Completion, Request
from tests.support.engines import ScriptedEngine, make_completion
from tests.support.workspace import Workspace, draw_slip

pytest.importorskip("prometheus_client", reason="Ray exports metrics where ray[default] is installed")
PATIENCE_S = 120
METRIC = re.compile(r"^ray_pipeline_(\w+)\{(.*)\} (\S+)$", re.MULTILINE)


class WatchedEngine(ScriptedEngine):
    """Answers four requests, and the others when their metrics have been read."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    async def complete(self, request: Request) -> Completion:
        self.requests.append(request)
        deadline = time.monotonic() + PATIENCE_S
        while len(self.requests) > 4 and not (self.folder / "seen").exists() and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        return make_completion()


class WatchedActor(ask_pass.EngineActor):
    def load(self, job: Job, threads: int) -> Engine:
        return WatchedEngine(job.file.parent)


def read_metrics() -> Counter[str]:
    """Return what this node exports, by name and what tells several of a name apart."""
    with urllib.request.urlopen(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: Counter[str] = Counter()
    for name, labels, value in METRIC.findall(text):
        if 'job="watched"' not in labels:
            continue  # another test's run on the same Ray
        label = re.search(r'(?:status|kind)="(\w+)"', labels)
        found[f"{name}/{label[1]}" if label else name] += float(value)
    return found


def wait_for_metrics(folder: Path, seen: Counter[str]) -> None:
    """Read until four answers and their pages are exported, which each process does at its own time, and let the run go on."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and min(seen["requests_total/extracted"], seen["pages_rendered_total"]) < 4:
        time.sleep(0.5)
        seen.clear()
        seen.update(read_metrics())
    (folder / "seen").touch()


@pytest.mark.usefixtures("ray_session")
def test_a_run_is_seen_while_it_goes_on(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for page in range(8):
        workspace.put(f"{page}.pdf", draw_slip(page))
    monkeypatch.setattr(ask_pass, "EngineActor", WatchedActor)
    seen: Counter[str] = Counter()
    watcher = threading.Thread(target=wait_for_metrics, args=(workspace.folder, seen))
    watcher.start()
    report = flow.run(workspace.job("name=watched", "model.batch_size=1"))
    watcher.join()
    assert (report.statuses, report.requests) == ({"extracted": 8}, {"extracted": 8})
    assert 0 < (report.engine_busy_share or 0) <= 1
    assert (seen["requests_total/extracted"], seen["tokens_total/prompt"], seen["tokens_total/completion"]) == (4, 4 * 300, 4 * 20)
    assert 4 <= seen["pages_rendered_total"] <= 8
    assert 0 < seen["queue_depth"] <= 4
    assert seen["engine_busy_seconds_total"] > 0
