"""The layout of the package: every import runs downwards, each heavy library comes in by its own folder, no name is defined twice."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pipeline"
FLOORS = (
    *("version", "wording", "errors", "deadline", "processes", "scratch", "records", "failure_kinds", "budget", "events", "report"),
    *("schema", "evidence", "storage", "render", "job", "sources", "output", "registry", "export", "score", "engines", "cluster"),
    *("stages", "review", "flow", "plan", "demo", "cli"),
)
"""Files and folders of the package in the order of the data's way, read backwards: each imports only what stands before it."""
DOORS = {
    "PIL": {"render", "engines", "demo"},
    "aiobotocore": {"storage"},
    "awq": {"engines"},
    "azure": {"storage"},
    "botocore": {"storage"},
    "cel": {"schema"},
    "click": {"cli"},
    "filelock": {"output", "engines"},
    "duckdb": {"export"},
    "fsspec": {"storage"},
    "httpx2": {"engines"},
    "imagecodecs": {"render"},
    "isal": {"engines"},
    "jsonschema": {"schema"},
    "llguidance": {"schema"},
    "matplotlib": {"score"},
    "openpyxl": {"export", "job"},
    "pillow_heif": {"render"},
    "pydantic": {"job"},
    "pymupdf": {"render", "demo"},
    "pypdfium2": {"render"},
    "qwen_vl_utils": {"engines"},
    "rapidocr": {"evidence"},
    "ray": {"cluster", "flow"},
    "rich": {"cli"},
    "scipy": {"score"},
    "stdnum": {"schema"},
    "tifffile": {"render"},
    "torch": {"engines", "demo"},
    "transformers": {"engines", "demo"},
    "vllm": {"engines"},
    "yaml": {"job", "output", "cli"},
}
"""The folders that import each heavy library."""
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


def imports(file: Path) -> set[str]:
    """Return the dotted names that a file imports, wherever in it they stand."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            names |= {f"pipeline.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def folder(file: Path) -> str:
    """Return the folder or file directly in the package to which a file belongs."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_downwards(file: Path) -> None:
    below = {name.split(".")[1] for name in imports(file) if name.startswith("pipeline.")} - {folder(file)}
    assert not {other for other in below if FLOORS.index(other) >= FLOORS.index(folder(file))}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_by_their_own_folders(file: Path) -> None:
    heavy = {name.split(".")[0] for name in imports(file)} & DOORS.keys()
    assert not {name for name in heavy if folder(file) not in DOORS[name]}


def test_every_file_has_a_floor() -> None:
    assert {folder(file) for file in FILES} == {*FLOORS}


def test_no_top_level_name_is_defined_twice() -> None:
    defined: Counter[str] = Counter()
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                defined[node.name] += 1
    assert not {name for name, count in defined.items() if count > 1}


def test_functions_are_called_by_what_they_do() -> None:
    """Verb + object: no name of one word but those of the package's own commands, none that begins with a participle."""
    names = {
        node.name for file in FILES for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name for name in names if "_" not in name} == {"main", "read", "run", "settle"}
    assert not {name for name in names if name.partition("_")[0].endswith("ed")}


def test_what_the_package_offers_can_be_called() -> None:
    code = "import pipeline, pipeline.flow; print([callable(getattr(pipeline, n)) for n in pipeline.__all__ if n[0] != '_'])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[True, True, True, True, True]\n"
    )


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, pipeline.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"ray", "torch", "transformers", "pymupdf", "pyarrow", "pydantic", "jsonschema", "rich", "PIL", "scipy"} & set(loaded)
