"""README says what the code does. `python tests/test_readme.py` writes its generated tables anew."""

import re
import shutil
from pathlib import Path
from textwrap import dedent

import click

from pipeline.cli import main
from pipeline.job import Job
from pipeline.job.model_section import Section
from pipeline.job.sections import JobSections
from pipeline.report import ExitCode
from pipeline.stages.settle import PROVENANCE_COLUMNS

README = Path(__file__).parents[1] / "README.md"
CI = Path(__file__).parents[1] / ".ci" / "run"


def keys() -> str:
    """Return the table of a job's keys."""
    lines = ["| key | default | what it does, and what choosing it costs |", "| --- | --- | --- |"]
    for name, part in JobSections.model_fields.items():
        section = part.annotation
        if not (isinstance(section, type) and issubclass(section, Section)):
            lines.append(f"| `{name}` | required | {part.description} |")
            continue
        for key, field in section.model_fields.items():
            default = "required" if field.is_required() else f"`{field.default}`" if field.default not in (None, "") else ""
            lines.append(f"| `{name}.{field.alias or key}` | {default} | {field.description} |")
    return "\n".join(lines)


def columns() -> str:
    """Return the table of the records' own columns."""
    lines = ["| column | type | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {re.sub('<.*>', '', str(kind))} | {meaning} |" for name, (kind, meaning) in PROVENANCE_COLUMNS.items()]
    return "\n".join(lines)


def filled(text: str) -> str:
    """Return README with its generated tables made anew."""
    for name, table in (("keys", keys()), ("columns", columns())):
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        text = before + start + table + "\n" + end + rest.partition(end)[2]
    return text


def test_the_generated_tables_are_current() -> None:
    assert README.read_text() == filled(README.read_text())


def test_every_command_and_option_is_documented() -> None:
    text = README.read_text()
    for name, command in main.commands.items():
        assert f"`pipeline {name} " in text, name
        missing = [o.opts[-1] for o in command.params if isinstance(o, click.Option) and o.opts[-1] not in text]
        assert not missing, f"{name}: {missing}"


def test_every_exit_code_is_documented() -> None:
    assert all(f"| {int(code)} |" in README.read_text() for code in ExitCode)


def test_ci_runs_what_readme_says() -> None:
    second = re.findall(r"^    (python3 -m venv .*)$", README.read_text(), re.MULTILINE)[1]
    steps = [step.replace(".venv/", ".venv-ci/").replace("venv .venv", "venv .venv-ci") for step in second.split(" && ")]
    ci = CI.read_text().replace(" -q", "")
    assert all(step in ci for step in steps), steps


def test_the_jobs_that_ask_servers_are_jobs(tmp_path: Path) -> None:
    chapter = README.read_text().partition("## vLLM, and servers elsewhere\n")[2].partition("\n## ")[0]
    blocks = [dedent(block) for block in re.findall(r"(?:^    .*\n)+", chapter, re.MULTILINE) if block.startswith("    name:")]
    shutil.copytree(README.parent / "schemas", tmp_path / "schemas")
    (tmp_path / "jobs").mkdir()
    for block in blocks:
        file = tmp_path / "jobs" / "read.yaml"
        file.write_text(block)
        for more in ([], *([f"model.extra_body={found}"] for found in re.findall(r"extra_body: (\{.*\})", chapter))):
            assert Job.load(file, more).sections.model.engine == "openai"
    assert re.findall(r"^name: at-(\S+)", "".join(blocks), re.MULTILINE) == ["my-own-vllm", "azion", "alibaba"]


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"^[A-Z]+_[A-Z_]+$|\b(?:RUN|RECORDS|DEMO)_[A-Z]+", README.read_text(), re.MULTILINE)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
