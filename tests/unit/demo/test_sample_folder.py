"""The sample folder, from a copy of the repository. `tests/ray/test_wheel.py` has it from a wheel."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from pipeline.demo import sample_folder
from pipeline.demo.sample_folder import PATTERNS, write_sample_folder
from pipeline.errors import JobError
from pipeline.job import Job

ROOT = Path(__file__).parents[3]


def test_every_job_that_is_written_can_be_loaded(tmp_path: Path) -> None:
    written = [Path(file) for file in write_sample_folder(tmp_path)]
    jobs = [Job.load(file) for file in written if file.suffix == ".yaml"]
    assert {job.sections.name for job in jobs} >= {"invoices", "receipts"}
    assert all(job.output.is_relative_to(tmp_path / "out") for job in jobs if isinstance(job.output, Path))


def test_samples_are_written_beside_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    assert {file.name for file in tmp_path.iterdir()} == {"mine.txt"}
    write_sample_folder(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"mine.txt", "jobs", "schemas"}


def test_nothing_is_overwritten_and_nothing_is_written_beside_it(tmp_path: Path) -> None:
    own = tmp_path / "schemas" / "invoice.json"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(JobError, match=r"schemas/invoice\.json exists already and is not overwritten: name another folder") as caught:
        write_sample_folder(tmp_path)
    assert (own.read_text(), [*tmp_path.rglob("*")]) == ("mine", [own.parent, own])
    assert (caught.value.file, caught.value.key) == (str(own), "--sample")


def test_a_package_without_samples_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_folder, "__file__", str(tmp_path / "pipeline" / "demo" / "sample_folder.py"))
    with pytest.raises(JobError, match="this copy of the package has no samples"):
        write_sample_folder(tmp_path / "out")


def test_the_build_takes_the_same_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    assert runpy.run_path(str(ROOT / "setup.py"))["PATTERNS"] == PATTERNS
