"""The wheel, installed where the repository is not: it contains the sample jobs, and a new user gets from them to corrected records."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.test_readme import CODE_BLOCK, PAGES

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "pipeline", "jobs", "schemas")
WITHOUT_NETWORK = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
PATIENCE_S = 300


def run_python(*arguments: str | Path, folder: Path, python: Path | str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, without the repository on its path."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | WITHOUT_NETWORK
    return subprocess.run([python, *arguments], cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


def build_wheel(source: Path, into: Path) -> Path:
    """Build a folder's wheel with what is installed here."""
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir")
    ended = run_python("-m", "pip", "wheel", "--quiet", *options, into, source, folder=into)
    assert ended.returncode == 0, ended.stderr
    [wheel] = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is built from: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


def list_content(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name)


def list_repository_samples() -> list[Path]:
    """Return what git knows of the samples."""
    kinds = ("jobs/*.yaml", "jobs/samples", "schemas")
    found = subprocess.run(["git", "ls-files", "-z", *kinds], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(Path(name) for name in found.split("\0") if name and Path(name).parts[:2] != ("jobs", "cluster"))


def test_the_wheel_has_the_package_and_its_samples(wheel: Path) -> None:
    package = [file.relative_to(ROOT) for file in (ROOT / "pipeline").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    samples = ["pipeline/demo/sample" / name for name in list_repository_samples()]
    assert len(samples) > 20
    assert list_content(wheel) == sorted(map(str, (*package, *samples)))


def test_a_source_distribution_gives_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    assert run_python("-c", build, tmp_path, folder=source).returncode == 0
    [archive] = tmp_path.glob("pipeline_documents-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (tmp_path / "wheel").mkdir()
    [unpacked] = tmp_path.glob("pipeline_documents-*/")
    assert list_content(build_wheel(unpacked, tmp_path / "wheel")) == list_content(wheel)


def test_a_copy_without_samples_builds_nothing(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns("schemas", "build"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    ended = run_python("-c", build, tmp_path, folder=tmp_path / "source")
    assert ended.returncode == 1
    assert "no file is there for schemas/*.json: build in a complete copy of the repository" in ended.stderr


@dataclass(frozen=True)
class InstalledWheel:
    """An environment with the wheel, and an empty folder that the program runs in."""

    bin: Path
    folder: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_python(self.bin / "pipeline", *arguments, folder=self.folder, python=self.bin / "python")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> InstalledWheel:
    """An environment of the wheel and, from this one, its dependencies: a path in a .pth file brings no editable install with it."""
    place = tmp_path_factory.mktemp("installed")
    made = InstalledWheel(place / "venv" / "bin", tmp_path_factory.mktemp("empty"))
    assert run_python("-m", "venv", "--without-pip", place / "venv", folder=place).returncode == 0
    [packages] = (place / "venv" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    install = ("-m", "pip", "--python", made.bin / "python", "install", "--quiet", "--no-deps", "--force-reinstall")
    ended = run_python(*install, wheel, folder=place)
    assert ended.returncode == 0, ended.stderr
    return made


def test_the_repository_is_not_on_the_path(installed: InstalledWheel) -> None:
    show = "import json, sys, pipeline; print(json.dumps([pipeline.__file__, *sys.path]))"
    imported, *path = json.loads(run_python("-c", show, folder=installed.folder, python=installed.bin / "python").stdout)
    assert Path(imported).is_relative_to(installed.bin.parent)
    assert str(ROOT) not in path


@pytest.fixture(scope="module")
def sample(installed: InstalledWheel) -> subprocess.CompletedProcess[str]:
    return installed.run("init", "--sample", "my samples", "--json")


def test_init_writes_what_the_repository_has(installed: InstalledWheel, sample: subprocess.CompletedProcess[str]) -> None:
    found = json.loads(sample.stdout)
    written = sorted(file.relative_to(installed.folder) for file in installed.folder.rglob("*") if file.is_file())
    assert (sample.returncode, sample.stderr, found["files"]) == (0, "", [str(file) for file in written])
    assert [file.relative_to("my samples") for file in written] == list_repository_samples()
    assert all((installed.folder / file).read_bytes() == (ROOT / file.relative_to("my samples")).read_bytes() for file in written)


# ---- What a new user does ---------------------------------------------------------------------------------------------

KEPT = ("invoice-01.pdf", "invoice-04.pdf")
"""The samples that are run."""


@pytest.fixture(scope="module")
def home(installed: InstalledWheel, sample: subprocess.CompletedProcess[str]) -> InstalledWheel:
    """The samples, fewer of them, and beside them the guide's folder with the same documents, as `init` says to go on; both are run."""
    next_command = json.loads(sample.stdout)["next"]
    assert next_command == "pipeline run 'my samples/jobs/invoices.yaml'"
    folder = installed.folder / "my samples"
    for file in (folder / "jobs/samples/invoices").iterdir():
        if file.name not in KEPT:
            file.unlink()
    made = replace(installed, folder=folder)
    assert made.run("init", "contracts").returncode == 0
    for name in KEPT:
        shutil.copy(folder / "jobs/samples/invoices" / name, folder / "contracts/documents")
    for job in ("jobs/invoices.yaml", "contracts/job.yaml"):
        ended = made.run("run", job, "--json")
        report = json.loads(ended.stdout)
        assert (ended.returncode, report["statuses"], report["demonstration"]) == (0, {"extracted": 2}, True), ended.stderr
    return made


def test_a_run_writes_where_its_job_says(home: InstalledWheel) -> None:
    assert [len([*(home.folder / name / "records").glob("*.parquet")]) for name in ("out/invoices", "contracts/out")] == [1, 1]


PYTHON_BLOCKS = {page.name: [text for kind, text in CODE_BLOCK.findall(page.read_text()) if kind == "python"] for page in PAGES}


def test_python_stands_in_these_pages() -> None:
    assert {name for name, blocks in PYTHON_BLOCKS.items() if blocks} == {"commands.md", "guide.md", "records.md"}


@pytest.mark.parametrize("page", [name for name, blocks in PYTHON_BLOCKS.items() if blocks])
def test_python_runs_as_it_is_written(home: InstalledWheel, page: str) -> None:
    ended = run_python("-c", "\n".join(PYTHON_BLOCKS[page]), folder=home.folder, python=home.bin / "python")
    assert ended.returncode == 0, ended.stderr
    assert "Warning" not in ended.stderr


def test_a_correction_is_scored_and_settled(home: InstalledWheel) -> None:
    assert home.run("review", "out/invoices").returncode == 0
    lines = (home.folder / "jobs/samples/truth/invoices.jsonl").read_text().splitlines()
    truth = next(json.loads(line) for line in lines if KEPT[1] in line)
    about = {"_source": f"samples/invoices/{KEPT[1]}", "_corrected": ["$.invoice_date"], "invoice_date": truth["invoice_date"]}
    (home.folder / "corrections.jsonl").write_text(json.dumps(about) + "\n")
    score = ("eval", "out/invoices", "--truth", "jobs/samples/truth/invoices.jsonl", "--json")
    before = json.loads(home.run(*score).stdout)
    settled = home.run("settle", "jobs/invoices.yaml", "--corrections", "corrections.jsonl")
    assert (settled.returncode, settled.stderr.splitlines()[0]) == (0, "1 value in 1 record corrected by corrections.jsonl")
    after = json.loads(home.run(*score).stdout)
    assert [found["scores"]["fields"]["invoice_date"]["outcomes"]["wrong"] for found in (before, after)] == [1, 0]
