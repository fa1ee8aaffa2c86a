"""The house stands: nothing imports upwards, and each heavy library comes in by its own door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pipeline"
FLOORS = {
    0: {"errors", "records", "budget", "schema", "cells", "arrow", "prompt", "validate", "merge", "place"},
    1: {"job", "jobfile", "keys", "parcel", "report", "attempts", "events"},
    2: {"source", "folders", "manifest", "net", "web", "render", "sandbox", "objects", "store", "sink", "compaction", "lease"}
    | {"awq", "decoding", "engines"},
    3: {"abroad", "stages", "listing", "settle", "status"},
    4: {"afar", "cluster", "sizing", "outlook", "metrics", "asking", "settling", "flow", "preview", "submit", "watch"},
    5: {"cli", "guard", "show"},
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
DOORS = {
    "pymupdf": {"render", "demo"},
    "PIL": {"render", "engines", "demo"},
    "fsspec": {"objects"},
    "torch": {"engines", "awq", "demo"},
    "transformers": {"engines", "awq", "demo"},
    "httpx2": {"engines"},
    "vllm": {"engines"},
    "awq": {"awq"},
    "llguidance": {"decoding"},
    "pydantic": {"job", "jobfile", "keys"},
    "yaml": {"show", "jobfile", "sink"},
    "jsonschema": {"schema", "validate"},
    "ray": {"afar", "flow", "asking", "settling", "metrics", "cluster", "outlook", "submit"},
    "click": {"cli", "show"},
    "rich": {"show"},
}


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


def room(file: Path) -> str:
    """Return the room a file belongs to: its folder in the package, or its own name."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_downwards(file: Path) -> None:
    own = room(file)
    if own == "demo":
        return
    below = {name.split(".")[1] for name in imports(file) if name.startswith("pipeline.")} - {own, "__version__", "demo"}
    assert not {other for other in below if FLOOR[other] > FLOOR[own]}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_heavy_libraries_have_one_door(file: Path) -> None:
    heavy = {name.split(".")[0] for name in imports(file)} & DOORS.keys()
    assert not {name for name in heavy if room(file) not in DOORS[name]}


def test_every_room_has_a_floor() -> None:
    assert {room(file) for file in FILES} - {"demo"} == FLOOR.keys()


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, pipeline.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"ray", "torch", "transformers", "pymupdf", "pyarrow", "pydantic", "jsonschema", "rich", "PIL"} & set(loaded)
