"""The distribution's name and version stand in pyproject.toml and in the package; no message or page names a stranger's."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from pipeline.version import DISTRIBUTION, __version__

ROOT = Path(__file__).parents[2]
INSTALLED = re.compile(r"""(?:pip install|"|'|`)[^\n"'`]*?\b(pipeline[\w-]*)\[[a-z0-9,]+\]""")
TEXTS = [
    *(
        file
        for folder in ("pipeline", "docs", "jobs", "benchmarks")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".md", ".yaml")
    ),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml", "jobs/cluster/Dockerfile", ".ci/run", ".ci/vllm")),
]


def test_the_package_knows_its_name_and_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["version"]) == (DISTRIBUTION, __version__)


def test_nobody_is_told_to_install_another_package() -> None:
    """A path that ends with `/pipeline[s3]`, as in the Dockerfile, is this repository."""
    named = {(file.name, name) for file in TEXTS for name in INSTALLED.findall(file.read_text().replace("/home/ray/pipeline", ""))}
    assert named
    assert not [(file, name) for file, name in named if name != DISTRIBUTION]


def test_a_strangers_package_would_be_noticed() -> None:
    for text in ("pip install 'pipeline[vllm]'", "(`pipeline[vllm]`)", 'pip install "pipeline[cluster,s3]"'):
        assert INSTALLED.findall(text) == ["pipeline"]
