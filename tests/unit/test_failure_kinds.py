"""Kinds of failure: each that the code raises is described, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.failure_kinds import KINDS, find_failure_kind
from pipeline.job.sections import JobSections
from pipeline.records import Stage
from pipeline.sources import UNREADABLE_REASONS

PACKAGE = Path(__file__).parents[2] / "pipeline"
FOLDERS = {
    Stage.SOURCE: ["sources", "storage"],
    Stage.RENDER: ["render"],
    Stage.GENERATE: ["engines", "schema/grammar.py", "flow/quarantine.py", "stages/render.py"],
}
RAISED = re.compile(r'(?:DocumentError|RetryableError)\(\s*"(\w+)"|\bkind(?:, reason)? = "(\w+)"(?: if [^"]*? else "(\w+)")?')
NOT_RECORDED = {"unreachable"}
"""Ends as `connection`, or as the end of the engine."""


def list_raised(stage: Stage) -> set[str]:
    """Return the kinds that the code of a stage raises by name."""
    found: set[str] = set()
    for place in FOLDERS[stage]:
        for file in sorted((PACKAGE / place).rglob("*.py")) or [PACKAGE / place]:
            found |= {kind for match in RAISED.findall(file.read_text()) for kind in match if kind}
    return found - NOT_RECORDED


@pytest.mark.parametrize("stage", FOLDERS)
def test_every_kind_that_is_raised_is_described(stage: Stage) -> None:
    raised = list_raised(stage) | ({*UNREADABLE_REASONS} if stage is Stage.SOURCE else set())
    assert len(raised) > 5
    assert raised - KINDS[stage].keys() == set()


@pytest.mark.parametrize("stage", KINDS)
def test_every_kind_that_is_described_is_in_the_code(stage: Stage) -> None:
    code = "".join(file.read_text() for file in sorted(PACKAGE.rglob("*.py")) if file.name != "failure_kinds.py")
    assert not [kind for kind in KINDS[stage] if f'"{kind}"' not in code]


def test_each_has_a_sentence_for_cause_and_remedy() -> None:
    for stage, kinds in KINDS.items():
        for kind in kinds:
            found = find_failure_kind(f"{stage}/{kind}")
            assert found
            assert all(text[0].isupper() or text[0] == "`" for text in (found.cause, found.remedy)), kind
            assert found.cause.endswith(".")
            assert found.remedy.endswith(".")
            assert "{" not in found.remedy


def test_the_keys_that_are_named_are_keys() -> None:
    text = " ".join(f"{kind.cause} {kind.remedy}" for kinds in KINDS.values() for kind in kinds.values())
    named = re.findall(r"`(\w+)\.(\w+)", text)
    assert len(named) > 10
    sections = {
        name: field.annotation.model_fields for name, field in JobSections.model_fields.items() if hasattr(field.annotation, "model_fields")
    }  # type: ignore[union-attr]
    assert not [f"{section}.{key}" for section, key in named if key not in sections[section]]


@pytest.mark.parametrize("name", ["render/odd", "odd/broken", "broken", ""])
def test_another_version_may_have_other_kinds(name: str) -> None:
    assert find_failure_kind(name) is None
