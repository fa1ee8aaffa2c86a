"""A Ray that counts a GPU which torch cannot use: the run ends with exit code 3, and no page is asked on the CPU."""

from __future__ import annotations

import re

import pytest
import torch

from pipeline.engines.model_files import DEMO_CHECKPOINT
from tests.support.ray_head import start_head
from tests.support.workspace import Workspace


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_the_run_ends_with_exit_code_3_and_one_sentence(workspace: Workspace) -> None:
    workspace.put("a.pdf")
    with start_head(gpus=1) as head:
        settings = [f"--set=model.name={DEMO_CHECKPOINT}", "--set=ray.shared_filesystem=true"]
        ended = head.run("run", workspace.file, "--address", head.address, *settings)
    assert ended.returncode == 3
    [error] = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(r"error: Ray reserves a GPU for the model, but torch \S+, built .*, cannot use it; the NVIDIA driver is .*", error)
    assert list((workspace.folder / "out" / "requests").iterdir()) == []
