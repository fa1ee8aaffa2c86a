"""`pipeline preview` in a process of its own, with the demonstration model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.workspace import Workspace

ROOT = Path(__file__).parents[2]


def test_the_demonstration_answers_without_a_warning(workspace: Workspace) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "preview", workspace.file, workspace.put("a.pdf"), "--json"]
    ended = subprocess.run([*command, "--set", "sampling.max_tokens=200"], capture_output=True, text=True, check=False, cwd=ROOT)
    found = json.loads(ended.stdout)
    assert (found["status"], found["model"], found["engine"], found["errors"]) == ("extracted", "demo", "transformers", [])
    assert (ended.returncode, ended.stderr) == (0, "")
