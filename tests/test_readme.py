"""Checks that README and docs/ say what the code does. `python tests/test_readme.py` rewrites the tables that are generated from it."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from pathlib import Path

import click
import pyarrow as pa
import pytest

from pipeline.cli import main
from pipeline.failure_kinds import KINDS, find_failure_kind
from pipeline.job import Job
from pipeline.job.model_section import Section
from pipeline.job.sections import JobSections
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.sources import SOURCE_SCHEMA
from pipeline.records import Stage
from pipeline.report import ExitCode, Report
from pipeline.stages.record_plan import PROVENANCE_COLUMNS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pipeline"
README = ROOT / "README.md"
README_BYTES = 12_000
DOCS = {
    "keys": ROOT / "docs/job.md",
    "commands": ROOT / "docs/commands.md",
    "columns": ROOT / "docs/records.md",
    "ledger": ROOT / "docs/records.md",
    "sources": ROOT / "docs/records.md",
    "report": ROOT / "docs/records.md",
    "failures": ROOT / "docs/failures.md",
}
"""Generated parts, each between <!-- marker --> and <!-- /marker -->, and the page that holds it."""
STAGE_TITLES = {
    Stage.SOURCE: "The file was not read.",
    Stage.RENDER: "The file was read, and not opened, or its pages were not drawn.",
    Stage.GENERATE: "The model was asked and gave no answer that can be used.",
    Stage.VALIDATE: "There is an answer, and the record is `invalid`; `internal` is `failed`.",
    Stage.SETTLE: "The record waits for an answer.",
}
PAGES = [README, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").glob("*.md"))]
JSON_TYPES = {bool: "boolean", dict: "object", float: "number", int: "integer", list: "array", str: "string", type(None): "number"}
FOLDERS = ("pipeline", "tests", "benchmarks", "jobs", "schemas", "notebooks", "docs", ".ci")
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


# ---- Generated parts ----------------------------------------------------------------------------------------------


def make_key_table() -> str:
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


def make_command_list() -> str:
    """Return every command with its help and its options."""
    parts = []
    for name, command in main.commands.items():
        usage = " ".join(["pipeline", name, *command.collect_usage_pieces(click.Context(command))])
        parts += [f"## {name}\n", f"    {usage}\n", f"{' '.join((command.help or '').replace(chr(8), '').split())}\n"]
        parts += ["| option | what it does |", "| --- | --- |"]
        for option in command.params:
            if isinstance(option, click.Option):
                metavar = "" if option.is_flag else " " + option.make_metavar(click.Context(command)).replace("INTEGER RANGE", "N")
                parts.append(f"| `{option.opts[-1]}{metavar}` | {option.help} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def make_column_table() -> str:
    """Return the table of the columns that every record has."""
    lines = ["| column | type | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {shorten_type(kind)} | {meaning} |" for name, (kind, meaning) in PROVENANCE_COLUMNS.items()]
    return "\n".join(lines)


def make_described_table(first: str, types: dict[str, str], written: str) -> str:
    """Return a table whose names and types come from the code, and whose meanings are those that the page has already."""
    meanings = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (.*) \|$", written, re.MULTILINE))
    lines = [f"| {first} | type | meaning |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| `{name}` | {kind} | {meanings.get(name, '?')} |" for name, kind in types.items())])


def shorten_type(kind: pa.DataType) -> str:
    return re.sub(r"<.*>", "", str(kind)).replace("[us, tz=UTC]", ", UTC")


def list_report_types() -> dict[str, str]:
    """Return the fields of `report.json` and their JSON types; a null stands for a number that is not known."""
    return {name: JSON_TYPES[type(value)] for name, value in Report("", "", "", False).as_dict().items()}


def make_failure_tables() -> str:
    """Return a table of the kinds of failure for each stage."""
    parts = []
    for stage, kinds in KINDS.items():
        parts += [f"## {stage}\n", f"{STAGE_TITLES[stage]}\n", "| kind | cause | what to do |", "| --- | --- | --- |"]
        for kind in kinds:
            found = find_failure_kind(f"{stage}/{kind}")
            assert found
            parts.append(f"| `{kind}` | {found.cause} | {found.remedy} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def fill_page(page: Path) -> str:
    """Return a page's text with its generated parts made anew."""
    text = page.read_text()
    for marker in (name for name, place in DOCS.items() if place == page):
        start, end = f"<!-- {marker} -->\n", f"<!-- /{marker} -->"
        before, _, rest = text.partition(start)
        written, _, after = rest.partition(end)
        text = f"{before}{start}{make_part(marker, written)}\n{end}{after}"
    return text


def make_part(marker: str, written: str) -> str:
    """Return one generated part; `written` is what stands there now."""
    made = {"keys": make_key_table, "commands": make_command_list, "columns": make_column_table, "failures": make_failure_tables}
    if marker in made:
        return made[marker]()
    if marker == "report":
        return make_described_table("field", list_report_types(), written)
    schema = LEDGER_SCHEMA if marker == "ledger" else SOURCE_SCHEMA
    return make_described_table("column", {field.name: shorten_type(field.type) for field in schema}, written)


@pytest.mark.parametrize("page", sorted({*DOCS.values()}), ids=lambda page: page.name)
def test_generated_parts_are_current(page: Path) -> None:
    assert page.read_text() == fill_page(page), "run `python tests/test_readme.py`"


def test_every_column_and_field_has_a_meaning() -> None:
    assert not re.findall(r"^\| `\w+` \| \S* \| \? \|$", DOCS["ledger"].read_text(), re.MULTILINE)


# ---- What the code has ----------------------------------------------------------------------------------------------


def test_readme_names_every_command_and_exit_code() -> None:
    text = README.read_text()
    assert not [name for name in main.commands if f"`pipeline {name} " not in text]
    assert not [int(code) for code in ExitCode if f"| {int(code)} |" not in text]


def test_every_event_and_metric_is_documented() -> None:
    code = "".join(file.read_text() for file in sorted(PACKAGE.rglob("*.py")))
    page = DOCS["report"].read_text()
    events = set(re.findall(r'emit_event\(\s*"(\w+)"', code))
    metrics = set(re.findall(r'(?:Counter|Gauge|Histogram)\(\s*"(\w+)"', code))
    assert len(events) > 3
    assert len(metrics) > 3
    assert not {name for name in events if f"| `{name}` |" not in page}
    assert not {name for name in metrics if f"`ray_{name}" not in page}


def test_readme_and_the_architecture_have_every_folder_and_file_of_the_package() -> None:
    folders = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
    assert {*re.findall(r"^    (\w+)/ {2}", README.read_text(), re.MULTILINE)} == folders
    files = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if "demo" not in file.parts}
    written = list_architecture_files((ROOT / "docs/architecture.md").read_text())
    assert sorted(written - files) == []
    assert sorted(file for file in files - written if not file.endswith("__init__.py")) == []


def list_architecture_files(page: str) -> set[str]:
    """Return the files in the page's tree: `render/pdf.py` for `· pdf (MuPDF)` in the lines below `render/`."""
    found, folder = set(), ""
    for line in page.partition("## Folders\n")[2].partition("\n## ")[0].splitlines():
        found |= {*re.findall(r"\b\w+\.py\b", line)} if line.startswith("    ") else set()
        if heading := re.match(r" {4}(\w+)/", line):
            folder = heading[1]
        elif inner := re.match(r" {6}(?:(\w+)/ +)?(\w.*)", line):
            names = [part.split()[0] for part in inner[2].split(" · ")]
            found |= {"/".join(filter(None, (folder, inner[1], f"{name}.py"))) for name in names}
    return found


def test_ci_runs_what_readme_says() -> None:
    second = re.findall(r"^python3 -m venv .*$", README.read_text(), re.MULTILINE)[1]
    steps = [step.replace(".venv/", ".venv-ci/").replace("venv .venv", "venv .venv-ci") for step in second.split(" && ")]
    ci = (ROOT / ".ci/run").read_text().replace(" -q", "")
    assert all(step in ci for step in steps), steps


# ---- What the pages name --------------------------------------------------------------------------------------------


def list_definitions() -> set[str]:
    """Return the dotted names of the package's functions, classes and methods: `flow.run`, `render.sandbox.Sandbox.open`."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(f"{module}.{node.name}")
                members = node.body if isinstance(node, ast.ClassDef) else []
                found |= {f"{module}.{node.name}.{m.name}" for m in members if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)}
    return found


def test_every_function_that_is_named_exists() -> None:
    named = {name for page in PAGES for name in re.findall(r"([a-z_]+(?:\.\w+)+)\(\)", page.read_text())}
    missing = sorted(named - list_definitions())
    assert len(named) > 30
    assert not missing


def test_every_test_that_is_named_exists() -> None:
    named = {found for page in PAGES for found in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text())}
    existing = {file: (ROOT / file).read_text() if (ROOT / file).exists() else "" for file, _ in named}
    missing = [f"{file}::{test}" for file, test in sorted(named) if f"def {test}(" not in existing[file]]
    assert len(named) > 50
    assert not missing


def test_every_guarantee_names_a_test() -> None:
    page = (ROOT / "docs/guarantees.md").read_text().partition("\n## Limits\n")[0]
    guarantees = re.split(r"^\* (?=\*\*)", page, flags=re.MULTILINE)[1:]
    assert len(guarantees) > 20
    assert not [guarantee for guarantee in guarantees if "::test_" not in guarantee]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_is_named_exists(page: Path) -> None:
    named = re.findall(rf"`((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*)[`:]", page.read_text())
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)]*)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), link
        assert not anchor or anchor in list_anchors(place), link


def list_anchors(page: Path) -> list[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", CODE_BLOCK.sub("", page.read_text()), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


# ---- What the pages show ----------------------------------------------------------------------------------------------


def test_readme_is_short() -> None:
    assert len(README.read_bytes()) <= README_BYTES


def test_no_placeholder_is_left() -> None:
    for page in PAGES:
        assert not re.findall(r"^[A-Z]+_[A-Z_]+$|\b(?:RUN|RECORDS|DEMO)_[A-Z]+|\bTODO\b", page.read_text(), re.MULTILINE), page


def test_jobs_are_jobs(tmp_path: Path) -> None:
    blocks = [text for page in PAGES for kind, text in CODE_BLOCK.findall(page.read_text()) if kind == "yaml" and text.startswith("name:")]
    shutil.copytree(ROOT / "schemas", tmp_path / "schemas")
    (tmp_path / "jobs").mkdir()
    for block in blocks:
        file = tmp_path / "jobs" / "read.yaml"
        file.write_text(block)
        for more in ([], *([f"model.extra_body={found}"] for found in re.findall(r"extra_body: (\{.*\}) ", block))):
            Job.load(file, more)
    names = re.findall(r"^name: (\S+)", "".join(blocks), re.MULTILINE)
    assert sorted(names) == ["at-alibaba", "at-azion", "at-my-own-vllm", "invoices"]


def test_commands_are_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    shown = [text for page in PAGES for kind, text in CODE_BLOCK.findall(page.read_text()) if kind == "sh"]
    lines = re.findall(r"(?:^|&& |; |\$\(|bin/)pipeline (\w+) ([^;)\n]*)", "\n".join(shown), re.MULTILINE)
    assert len(lines) > 5
    for name, arguments in lines:
        main.commands[name].make_context(name, shlex.split(arguments, comments=True))


if __name__ == "__main__":
    for place in {*DOCS.values()}:
        place.write_text(fill_page(place))
